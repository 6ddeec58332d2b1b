// The coverage rule of BtpSelectTokens on the CPU. A gain only falls while tokens are selected, and so does its product
// with a weight that is not negative: what was summed before is an upper bound. The token with the largest bound is
// summed again, and then only those whose bound is not below the largest sum. The picks are those of summing all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../common/cpu_loops.h"

namespace btp {

// `one` is 1: a sum of products of 16-bit integers is an instruction, a sum of 16-bit integers is not.
BTP_INLINE int32_t sum_of_row_body(const int16_t* __restrict row, int n, int16_t one)
{
    int32_t sum = 0;
    for (int i = 0; i < n; ++i) {
        sum += int32_t{row[i]} * int32_t{one};
    }
    return sum;
}
BTP_FOR_PROCESSORS(int32_t, sum_of_row, (const int16_t* row, int n, int16_t one), (row, n, one))

// The sum of the larger of each two: what is covered together with this row.
BTP_INLINE int32_t sum_of_larger_body(const int16_t* __restrict row, const int16_t* __restrict covered, int n,
                                      int16_t one)
{
    int32_t sum = 0;
    for (int i = 0; i < n; ++i) {
        const int16_t larger = row[i] > covered[i] ? row[i] : covered[i];
        sum += int32_t{larger} * int32_t{one};
    }
    return sum;
}
BTP_FOR_PROCESSORS(int32_t, sum_of_larger, (const int16_t* row, const int16_t* covered, int n, int16_t one),
                   (row, covered, n, one))

// covered = the larger of each two; returns its sum.
BTP_INLINE int32_t cover_row_body(int16_t* __restrict covered, const int16_t* __restrict row, int n)
{
    int32_t sum = 0;
    for (int i = 0; i < n; ++i) {
        const int16_t larger = row[i] > covered[i] ? row[i] : covered[i];
        covered[i] = larger;
        sum += larger;
    }
    return sum;
}
BTP_FOR_PROCESSORS(int32_t, cover_row, (int16_t* covered, const int16_t* row, int n), (covered, row, n))

BTP_INLINE int32_t largest_of_body(const int32_t* __restrict values, int n)
{
    int32_t best = values[0];
    for (int i = 1; i < n; ++i) {
        best = values[i] > best ? values[i] : best;
    }
    return best;
}
BTP_FOR_PROCESSORS(int32_t, largest_of, (const int32_t* values, int n), (values, n))

// The first place from `start` on with a value that is not below `least`, n if there is none: whole chunks at once.
BTP_INLINE int next_not_below_body(const int32_t* __restrict values, int n, int start, int32_t least)
{
    constexpr int kTogether = 32;
    for (; start + kTogether <= n; start += kTogether) {
        int32_t found = 0;
        for (int i = 0; i < kTogether; ++i) {
            found |= values[start + i] >= least ? 1 : 0;
        }
        if (found != 0) {
            break;
        }
    }
    while (start < n && values[start] < least) {
        ++start;
    }
    return start;
}
#ifdef BTP_X86
BTP_AVX512 inline int next_not_below_avx512(const int32_t* values, int n, int start, int32_t least)
{
    constexpr int kLanes = 16;
    const __m512i bound = _mm512_set1_epi32(least);
    for (; start + kLanes <= n; start += kLanes) {
        const uint32_t found = _mm512_cmpge_epi32_mask(_mm512_loadu_si512(values + start), bound);
        if (found != 0) {
            return start + __builtin_ctz(found);
        }
    }
    return next_not_below_body(values, n, start, least);
}
BTP_AVX2 inline int next_not_below_avx2(const int32_t* values, int n, int start, int32_t least)
{
    return next_not_below_body(values, n, start, least);
}
#endif
inline int next_not_below(const int32_t* values, int n, int start, int32_t least)
{
#ifdef BTP_X86
    if (kInstructions == Instructions::avx512) {
        return next_not_below_avx512(values, n, start, least);
    }
    if (kInstructions == Instructions::avx2) {
        return next_not_below_avx2(values, n, start, least);
    }
#endif
    return next_not_below_body(values, n, start, least);
}

class Coverage {
public:
    // levels [V,V] of cpu_levels.h; scores [V] weigh the gains, null: all gains count alike.
    Coverage(int tokens, const int16_t* levels, const float* scores)
        : tokens_(tokens), size_(static_cast<size_t>(tokens)), levels_(levels), weights_(size_, 1.0f), covered_(size_),
          summed_at_(size_), first_(size_), bounds_(size_)
    {
        for (size_t token = 0; token < size_; ++token) {
            if (scores != nullptr) {
                weights_[token] = scores[token] > 0.0f ? scores[token] : 0.0f;
            }
            first_[token] = value(sum_of_row(row(token), tokens_, 1), token);
        }
    }

    // Selects from nothing again.
    void start()
    {
        std::fill(covered_.begin(), covered_.end(), int16_t{0});
        std::fill(summed_at_.begin(), summed_at_.end(), 0);
        covered_sum_ = 0;
        selected_ = 0;
        bounds_ = first_;
    }

    void select(int token)
    {
        bounds_[static_cast<size_t>(token)] = kTaken;
        covered_sum_ = cover_row(covered_.data(), row(static_cast<size_t>(token)), tokens_);
        ++selected_;
    }

    // Selects the token with the largest value, the first of equal ones, and returns it. One must be left.
    int select_next()
    {
        int32_t best = largest_of(bounds_.data(), tokens_);
        int token = next_not_below(bounds_.data(), tokens_, 0, best);
        if (best > 0) {  // a bound of 0 is the value
            best = sum_again(token);
            for (int other = next_not_below(bounds_.data(), tokens_, 0, best); other < tokens_;
                 other = next_not_below(bounds_.data(), tokens_, other + 1, best)) {
                const bool may_be_first = other < token || bounds_[static_cast<size_t>(other)] > best;
                if (other == token || !may_be_first) {
                    continue;
                }
                const int32_t found = sum_again(other);
                if (found > best || (found == best && other < token)) {
                    best = found;
                    token = other;
                }
            }
        }
        select(token);
        return token;
    }

private:
    static constexpr int32_t kTaken = -1;  // below every value

    const int16_t* row(size_t token) const { return levels_ + token * size_; }

    // What a gain is worth. Values are not negative: their bits have their order.
    int32_t value(int32_t gain, size_t token) const
    {
        const float worth = gain > 0 ? static_cast<float>(gain) * weights_[token] : 0.0f;
        int32_t bits;
        std::memcpy(&bits, &worth, sizeof bits);
        return bits;
    }

    // The token's value now, which becomes its bound.
    int32_t sum_again(int place)
    {
        const size_t token = static_cast<size_t>(place);
        if (summed_at_[token] != selected_) {
            summed_at_[token] = selected_;
            bounds_[token] = value(sum_of_larger(row(token), covered_.data(), tokens_, 1) - covered_sum_, token);
        }
        return bounds_[token];
    }

    const int tokens_;
    const size_t size_;
    const int16_t* const levels_;
    std::vector<float> weights_;
    std::vector<int16_t> covered_;
    std::vector<int32_t> summed_at_;  // how many tokens were selected when a token's bound was summed
    std::vector<int32_t> first_;      // the bounds from nothing
    std::vector<int32_t> bounds_;
    int32_t covered_sum_ = 0;
    int32_t selected_ = 0;
};

}  // namespace btp
