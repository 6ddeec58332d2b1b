// The coverage rule of BtpSelectTokens on the CPU. A gain only falls while tokens are selected, and so does its product
// with a weight that is not negative: what was summed before is an upper bound. The token with the largest bound is
// summed again; if it stays on top it is the pick, and no other row was read. The picks are those of summing all.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "../common/half.h"
#include "cpu_loops.h"

namespace btp {

inline float as_float(float x) { return x; }
inline float as_float(uint16_t x) { return half_to_float(x); }

// One row of similarities as integers, 0 ... 32767; returns their sum. Comparisons with NaN are false: it becomes 0.
#define BTP_LEVELS(name, T)                                                                         \
    BTP_CLONES inline int32_t name(int16_t* __restrict levels, const T* __restrict row, int n)      \
    {                                                                                               \
        int32_t sum = 0;                                                                            \
        for (int i = 0; i < n; ++i) {                                                               \
            const float given = as_float(row[i]);                                                   \
            const float positive = given > 0.0f ? given : 0.0f;                                     \
            const float cut = positive < 1.0f ? positive : 1.0f;                                    \
            const int32_t level = static_cast<int32_t>(std::nearbyint(cut * 32767.0f));             \
            levels[i] = static_cast<int16_t>(level);                                                \
            sum += level;                                                                           \
        }                                                                                           \
        return sum;                                                                                 \
    }
BTP_LEVELS(levels_of, float)
BTP_LEVELS(levels_of, uint16_t)

// The sum of the larger of each two: what is covered together with this row.
BTP_CLONES inline int32_t sum_of_larger(const int16_t* __restrict row, const int16_t* __restrict covered, int n)
{
    int32_t sum = 0;
    for (int i = 0; i < n; ++i) {
        sum += row[i] > covered[i] ? row[i] : covered[i];
    }
    return sum;
}

// covered = the larger of each two; returns its sum.
BTP_CLONES inline int32_t cover_row(int16_t* __restrict covered, const int16_t* __restrict row, int n)
{
    int32_t sum = 0;
    for (int i = 0; i < n; ++i) {
        const int16_t larger = row[i] > covered[i] ? row[i] : covered[i];
        covered[i] = larger;
        sum += larger;
    }
    return sum;
}

class Coverage {
public:
    // similarity [V,V]; scores [V] weigh the gains, null: all gains count alike. Keeps 2 V^2 bytes.
    template <typename T>
    Coverage(int tokens, const T* similarity, const float* scores)
        : tokens_(tokens), size_(static_cast<size_t>(tokens)), levels_(new int16_t[size_ * size_]), weights_(size_, 1.0f),
          covered_(size_), taken_(size_), summed_at_(size_), first_(size_)
    {
        for (size_t token = 0; token < size_; ++token) {
            if (scores != nullptr) {
                weights_[token] = scores[token] > 0.0f ? scores[token] : 0.0f;
            }
            const int32_t gain = levels_of(levels_.get() + token * size_, similarity + token * size_, tokens_);
            first_[token] = bound(gain, token);
        }
    }

    // Selects from nothing again.
    void start()
    {
        std::fill(covered_.begin(), covered_.end(), int16_t{0});
        std::fill(taken_.begin(), taken_.end(), uint8_t{0});
        std::fill(summed_at_.begin(), summed_at_.end(), 0);
        covered_sum_ = 0;
        selected_ = 0;
        bounds_ = first_;
        std::make_heap(bounds_.begin(), bounds_.end());
    }

    void select(int token)
    {
        taken_[static_cast<size_t>(token)] = 1;
        covered_sum_ = cover_row(covered_.data(), row(static_cast<size_t>(token)), tokens_);
        ++selected_;
    }

    // Selects the token with the largest value, the first of equal ones, and returns it. One must be left.
    int select_next()
    {
        for (;;) {
            std::pop_heap(bounds_.begin(), bounds_.end());
            const uint64_t top = bounds_.back();
            const size_t token = UINT32_MAX - static_cast<uint32_t>(top);
            if (taken_[token] != 0) {
                bounds_.pop_back();
            } else if (summed_at_[token] == selected_ || top >> 32 == 0) {  // a bound of 0 is the value
                bounds_.pop_back();
                select(static_cast<int>(token));
                return static_cast<int>(token);
            } else {
                summed_at_[token] = selected_;
                bounds_.back() = bound(sum_of_larger(row(token), covered_.data(), tokens_) - covered_sum_, token);
                std::push_heap(bounds_.begin(), bounds_.end());
            }
        }
    }

private:
    const int16_t* row(size_t token) const { return levels_.get() + token * size_; }

    // A token's value above its place from the end, so that the largest is the one to pick, ties included. Values are not
    // negative: their bits have their order.
    uint64_t bound(int32_t gain, size_t token) const
    {
        const float value = gain > 0 ? static_cast<float>(gain) * weights_[token] : 0.0f;
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        return uint64_t{bits} << 32 | (UINT32_MAX - static_cast<uint32_t>(token));
    }

    const int tokens_;
    const size_t size_;
    const std::unique_ptr<int16_t[]> levels_;
    std::vector<float> weights_;
    std::vector<int16_t> covered_;
    std::vector<uint8_t> taken_;
    std::vector<int32_t> summed_at_;  // how many tokens were selected when a token's bound was summed
    std::vector<uint64_t> first_;     // the bounds from nothing
    std::vector<uint64_t> bounds_;    // a heap
    int32_t covered_sum_ = 0;
    int32_t selected_ = 0;
};

}  // namespace btp
