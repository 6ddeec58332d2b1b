// BtpSelectTokens on the CPU. Distances are float32, 1 - similarity, kept as signed keys in float order, so that minimum,
// maximum and ties are integer operations that compilers vectorise and results equal the reference's bit for bit.
#include "cpu.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <numeric>
#include <thread>
#include <vector>

#include "../common/half.h"
#include "cpu_coverage.h"
#include "../common/cpu_loops.h"
#include "cpu_rows.h"

namespace btp {
namespace {

constexpr int32_t kChosen = std::numeric_limits<int32_t>::min();  // below every key: not to be picked again
constexpr int32_t kLowest = kChosen + 1;                          // NaN
constexpr int32_t kFar = std::numeric_limits<int32_t>::max();

// Signed key with the order of the floats: NaN lowest, then -inf ... +inf, -0 equal to +0.
inline int32_t order_key(float x)
{
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const int32_t magnitude = bits & 0x7fffffff;
    const int32_t ordered = bits < 0 ? -magnitude : bits;
    return magnitude > 0x7f800000 ? kLowest : ordered;
}

inline int32_t distance_key(float similarity) { return order_key(1.0f - similarity); }
inline int32_t distance_key(uint16_t similarity) { return distance_key(half_to_float(similarity)); }

// distance = min(distance, distance to the token whose similarities are `row`); returns the largest that is left.
template <typename T>
BTP_INLINE int32_t approach_body(int32_t* __restrict distance, const T* __restrict row, int n)
{
    int32_t best = kChosen;
    for (int i = 0; i < n; ++i) {
        const int32_t key = distance_key(row[i]);
        const int32_t nearer = key < distance[i] ? key : distance[i];
        distance[i] = nearer;
        best = nearer > best ? nearer : best;
    }
    return best;
}
BTP_FOR_PROCESSORS(int32_t, approach, (int32_t* distance, const float* row, int n), (distance, row, n))
BTP_FOR_PROCESSORS(int32_t, approach, (int32_t* distance, const uint16_t* row, int n), (distance, row, n))

template <typename T>
BTP_INLINE int32_t nearest_body(const T* __restrict row, int n)
{
    int32_t best = kFar;
    for (int i = 0; i < n; ++i) {
        const int32_t key = distance_key(row[i]);
        best = key < best ? key : best;
    }
    return best;
}
BTP_FOR_PROCESSORS(int32_t, nearest, (const float* row, int n), (row, n))
BTP_FOR_PROCESSORS(int32_t, nearest, (const uint16_t* row, int n), (row, n))

template <typename T>
class Selection {
public:
    // levels: what the coverage rule reads, in place of the similarity.
    Selection(const BtpSelect& select, const float* scores, const T* similarity, const int16_t* levels,
              const int32_t* seeds)
        : select_(select), tokens_(select.tokens), scores_(scores), similarity_(similarity), levels_(levels),
          seeds_(seeds), member_(static_cast<size_t>(tokens_), 0)
    {
    }

    void run(int32_t* indices)
    {
        const bool by_order = similarity_ == nullptr && levels_ == nullptr;
        if (select_.attention_quota > 0 || by_order) {
            sort_by_score();
            pick_attention();
        }
        if (by_order) {
            for (const int token : order_) {
                take(token);
            }
        } else if (levels_ != nullptr) {
            select_by_gain();
        } else {
            select_by_distance();
        }
        for (int token = 0; token < tokens_; ++token) {
            if (member_[static_cast<size_t>(token)] != 0) {
                *indices++ = token;
            }
        }
    }

private:
    void take(int token)
    {
        if (static_cast<int>(base_.size()) < select_.keep && member_[static_cast<size_t>(token)] == 0) {
            member_[static_cast<size_t>(token)] = 1;
            base_.push_back(token);
        }
    }

    // One integer a token: descending key above ascending index, so that plain sorting gives the order with its ties.
    void sort_by_score()
    {
        std::vector<int64_t> places(static_cast<size_t>(tokens_));
        for (int token = 0; token < tokens_; ++token) {
            places[static_cast<size_t>(token)] = -(int64_t{order_key(scores_[token])} * (int64_t{1} << 31)) + token;
        }
        std::sort(places.begin(), places.end());
        for (const int64_t place : places) {
            order_.push_back(static_cast<int>(place & 0x7fffffff));
        }
    }

    // Rule 1.
    void pick_attention()
    {
        const int pool = std::min(select_.pool, tokens_);
        int left = select_.attention_quota;
        for (const bool below : {true, false}) {
            for (int place = 0; place < pool && left > 0; ++place) {
                const int token = order_[static_cast<size_t>(place)];
                if ((token < select_.boundary) == below) {
                    take(token);
                    --left;
                }
            }
        }
    }

    // Rule 3, its last part.
    void take_seeds()
    {
        for (int seed = 0; seed < select_.seeds; ++seed) {
            if (seeds_[seed] >= 0 && seeds_[seed] < tokens_) {
                take(seeds_[seed]);
            }
        }
    }

    // Rules 2 to 4 by gain.
    void select_by_gain()
    {
        Coverage coverage(tokens_, levels_, select_.weighted != 0 ? scores_ : nullptr);
        coverage.start();
        for (int pick = 0; pick < select_.diversity_quota; ++pick) {
            take(coverage.select_next());
        }
        take_seeds();
        coverage.start();
        for (const int token : base_) {
            coverage.select(token);
        }
        while (static_cast<int>(base_.size()) < select_.keep) {
            take(coverage.select_next());
        }
    }

    // Rules 2 to 4 by distance. Rule 4 from nothing is rule 2 with more picks.
    void select_by_distance()
    {
        const bool nothing = select_.attention_quota == 0 && select_.diversity_quota == 0 && !any_seed();
        distance_.assign(static_cast<size_t>(tokens_), kFar);
        const int diverse = nothing ? select_.keep : select_.diversity_quota;
        const std::vector<int> attention = base_;
        const int32_t best = diverse > 0 ? pick_diverse(diverse) : kFar;
        const size_t before_seeds = base_.size();
        take_seeds();
        fill_by_distance(attention, before_seeds, best);
    }

    bool any_seed() const
    {
        return std::any_of(seeds_, seeds_ + select_.seeds, [this](int32_t seed) { return seed >= 0 && seed < tokens_; });
    }

    const T* row(int token) const { return similarity_ + static_cast<size_t>(token) * static_cast<size_t>(tokens_); }

    // Selects a token: its own distance goes below all others; returns the largest distance left.
    int32_t approach_token(int token)
    {
        distance_[static_cast<size_t>(token)] = kChosen;
        return approach(distance_.data(), row(token), tokens_);
    }

    // Rule 2: the first token is the one whose nearest other token is farthest.
    int32_t pick_diverse(int count)
    {
        std::vector<int32_t> alone(static_cast<size_t>(tokens_));
        for (int token = 0; token < tokens_; ++token) {
            const T* const values = row(token);
            alone[static_cast<size_t>(token)] =
                std::min(nearest(values, token), nearest(values + token + 1, tokens_ - token - 1));
        }
        int token = next_not_below(alone.data(), tokens_, 0, *std::max_element(alone.begin(), alone.end()));
        take(token);
        int32_t best = approach_token(token);
        for (int pick = 1; pick < count; ++pick) {
            token = next_not_below(distance_.data(), tokens_, 0, best);
            take(token);
            best = approach_token(token);
        }
        return best;
    }

    // Rule 4: distances to the diverse picks are known, the other members of the base come nearer one by one.
    void fill_by_distance(const std::vector<int>& attention, size_t before_seeds, int32_t best)
    {
        if (static_cast<int>(base_.size()) == select_.keep) {
            return;
        }
        for (const int token : attention) {
            best = approach_token(token);
        }
        for (size_t place = before_seeds; place < base_.size(); ++place) {
            best = approach_token(base_[place]);
        }
        while (static_cast<int>(base_.size()) < select_.keep) {
            const int token = next_not_below(distance_.data(), tokens_, 0, best);
            take(token);
            best = approach_token(token);
        }
    }

    const BtpSelect& select_;
    const int tokens_;
    const float* const scores_;
    const T* const similarity_;
    const int16_t* const levels_;
    const int32_t* const seeds_;
    std::vector<uint8_t> member_;
    std::vector<int> order_;
    std::vector<int> base_;
    std::vector<int32_t> distance_;
};

template <typename T>
void select_with(const BtpSelect& select, const float* scores, const T* similarity, const int32_t* seeds,
                 int16_t* levels, int32_t* indices)
{
    if (select.similarity == BTP_NO_SIMILARITY || select.diversity_rule != BTP_COVERAGE) {
        Selection<T>(select, scores, similarity, nullptr, seeds).run(indices);
        return;
    }
    const size_t tokens = static_cast<size_t>(select.tokens);
    for (size_t place = 0; place < tokens * tokens; place += tokens) {
        levels_of(levels + place, similarity + place, select.tokens);
    }
    Selection<T>(select, scores, nullptr, levels, seeds).run(indices);
}

}  // namespace

size_t select_tokens_cpu_scratch(const BtpSelect& select)
{
    const size_t tokens = static_cast<size_t>(select.tokens);
    const bool coverage = select.similarity != BTP_NO_SIMILARITY && select.diversity_rule == BTP_COVERAGE;
    return coverage ? tokens * tokens * sizeof(int16_t) : 0;
}

void select_tokens_cpu(const BtpSelect& select, const float* scores, const void* similarity, const int32_t* seeds,
                       void* scratch, int32_t* indices)
{
    auto* const levels = static_cast<int16_t*>(scratch);
    if (select.similarity == BTP_FLOAT16) {
        select_with(select, scores, static_cast<const uint16_t*>(similarity), seeds, levels, indices);
    } else {
        select_with(select, scores, static_cast<const float*>(similarity), seeds, levels, indices);
    }
}

size_t select_rows_cpu_scratch(const BtpSelect& select, int width)
{
    return levels_bytes(select.tokens) + units_bytes(select.tokens, width);
}

void select_rows_cpu(const BtpSelect& select, const TokenRows& rows, const float* scores, const int32_t* seeds,
                     const Parallel& parallel, void* scratch, int32_t* indices, float* norms)
{
    auto* const levels = static_cast<int16_t*>(scratch);
    auto* const units = reinterpret_cast<float*>(static_cast<char*>(scratch) + levels_bytes(select.tokens));
    const size_t tokens = static_cast<size_t>(select.tokens), parts = (tokens + kStripe - 1) / kStripe;
    const std::vector<float> mean = mean_row(rows, select.tokens);
    std::atomic<size_t> next{0}, made{0};
    // Threads take parts of the rows, then stripes, each of which needs all rows before its end.
    parallel(static_cast<int>(parts), [&](int) {
        for (size_t taken = next.fetch_add(1); taken < 2 * parts; taken = next.fetch_add(1)) {
            if (taken < parts) {
                unit_rows(units, norms, rows, mean, taken * kStripe, std::min(tokens, (taken + 1) * kStripe));
                made.fetch_add(1, std::memory_order_release);
                continue;
            }
            while (made.load(std::memory_order_acquire) < parts) {
                std::this_thread::yield();
            }
            // The last ones are the longest.
            multiply_stripe(levels, units, select.tokens, rows.width, (2 * parts - 1 - taken) * kStripe);
        }
    });
    Selection<float>(select, scores == nullptr ? norms : scores, nullptr, levels, seeds).run(indices);
}

}  // namespace btp
