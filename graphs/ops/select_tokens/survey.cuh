// What the first launch finds out about every token, with the whole device and no step that waits for another token.
#pragma once

#include "block.cuh"
#include "kernel.h"

namespace btp {

// Whether rules 2 and 4 pick by gain; without similarity there is nothing to pick by but the order.
BTP_HOST_DEVICE bool by_gain(const BtpSelect& s)
{
    return s.diversity_rule == BTP_COVERAGE && s.similarity != BTP_NO_SIMILARITY;
}

// The workspace of one call; every array has one element a token [B,V] where nothing else is said. "Near" is by distance the
// smallest distance's key, by gain the largest level.
struct Survey {
    uint16_t* levels;    // [B,V,stride] by gain only: s of the definition, 0 behind the V of a row
    size_t stride;       // of the rows of `levels`: whole reads of 8
    uint32_t* alone;     // by distance: near to any other token (start of rule 2); by gain: the gain where none is selected
    uint32_t* ahead;     // tokens before this one in the order: below the boundary (low half), the others (high half)
    uint32_t* base;      // near to picks A and seeds (rule 4), which the second launch finds
    uint32_t* below;     // [B] candidates below the boundary (rule 1)
    uint32_t* drawn;     // [B] parts of `base` that a block works at or has done
    uint32_t* finished;  // [B] parts of `base` that are complete
    uint32_t* ticket;    // [1] blocks of the second launch that have started

    static size_t stride_of(const BtpSelect& select) { return (static_cast<size_t>(select.tokens) + 7) / 8 * 8; }

    static size_t level_count(const BtpSelect& select)
    {
        const size_t rows = static_cast<size_t>(select.batch) * static_cast<size_t>(select.tokens);
        return by_gain(select) ? rows * stride_of(select) : 0;
    }

    static size_t bytes(const BtpSelect& select)
    {
        const size_t batch = static_cast<size_t>(select.batch);
        return sizeof(uint16_t) * level_count(select)
               + sizeof(uint32_t) * (3 * batch * static_cast<size_t>(select.tokens) + 3 * batch + 1);
    }

    Survey(const BtpSelect& select, void* workspace)
    {
        const size_t batch = static_cast<size_t>(select.batch);
        const size_t tokens = batch * static_cast<size_t>(select.tokens);
        levels = static_cast<uint16_t*>(workspace);
        stride = stride_of(select);
        alone = reinterpret_cast<uint32_t*>(levels + level_count(select));
        ahead = alone + tokens;
        base = ahead + tokens;
        below = base + tokens;
        drawn = below + batch;
        finished = drawn + batch;
        ticket = finished + batch;
    }
};

// One batch row's inputs and its part of the survey. Element: of the matrix that the steps read, similarity or levels.
template <typename Element>
struct Row {
    const Element* matrix;    // [V,stride] or null
    size_t stride;
    const float* scores;      // [V]
    const int32_t* seeds;     // [m] or null
    const uint32_t* alone;    // [V], as all that follow but the last three
    const uint32_t* ahead;
    uint32_t* base;
    const uint32_t* below;    // [1]
    uint32_t* drawn;          // [1]
    uint32_t* finished;       // [1]

    BTP_DEVICE Row(const BtpSelect& select, const Element* matrices, size_t stride_, const float* scores_,
                   const int32_t* seeds_, const Survey& survey, size_t batch)
    {
        const size_t tokens = static_cast<size_t>(select.tokens);
        matrix = matrices == nullptr ? nullptr : matrices + batch * tokens * stride_;
        stride = stride_;
        scores = scores_ + batch * tokens;
        seeds = seeds_;
        alone = survey.alone + batch * tokens;
        ahead = survey.ahead + batch * tokens;
        base = survey.base + batch * tokens;
        below = survey.below + batch;
        drawn = survey.drawn + batch;
        finished = survey.finished + batch;
    }

    BTP_DEVICE const Element* of(int token) const { return matrix + static_cast<size_t>(token) * stride; }
};

BTP_HOST_DEVICE bool uses_order(const BtpSelect& s)
{
    return s.attention_quota > 0 || s.similarity == BTP_NO_SIMILARITY;
}

// Whether the base is empty if no seed names a token; then rule 4 starts from nothing.
BTP_HOST_DEVICE bool only_seeds(const BtpSelect& s)
{
    return s.similarity != BTP_NO_SIMILARITY && s.diversity_quota == 0 && s.attention_quota == 0;
}

// Whether a seed names a token, looked at by the threads `first`, `first` + `step` ... together: one of them says so.
BTP_DEVICE bool names_token(const BtpSelect& select, const int32_t* seeds, unsigned first, unsigned step)
{
    bool any = false;
    for (int seed = static_cast<int>(first); seed < select.seeds && !any; seed += static_cast<int>(step)) {
        any = seeds[seed] >= 0 && seeds[seed] < select.tokens;
    }
    return any;
}

// Place in the order of a token whose entry of Survey::ahead this is.
BTP_DEVICE int place_of(uint32_t ahead) { return static_cast<int>((ahead & 0xffffu) + (ahead >> 16)); }

// Rule 1: whether a token is among picks A, cut at keep as in rule 3. `below`: its batch row's entry of Survey::below.
BTP_DEVICE bool is_attention_pick(const BtpSelect& select, int token, uint32_t ahead, uint32_t below)
{
    const uint32_t candidate = token < select.boundary ? ahead & 0xffffu : below + (ahead >> 16);
    return place_of(ahead) < select.pool && static_cast<int>(candidate) < lower(select.attention_quota, select.keep);
}

// Calls visit(index, value, inside) for every element of a row [tokens] and some behind its end, which are not `inside` (the
// visitor ignores them without a branch), all lanes of a warp together. Several reads are under way before the first is
// used. kWide: the row is aligned for reads of 4 elements, and `tokens` is a multiple of 4.
template <bool kWide, typename T, typename Visit>
BTP_DEVICE void visit_row(const T* row, int tokens, Visit visit)
{
    constexpr int kUnit = kWide ? 4 : 1;
    constexpr int kReads = kWide ? 4 : 8;
    constexpr int kStep = 32 * kUnit;
    for (int start = (static_cast<int>(threadIdx.x) & 31) * kUnit; start < tokens; start += kReads * kStep) {
        Unit<T, kUnit> units[kReads] = {};
#pragma unroll
        for (int read = 0; read < kReads; ++read) {
            if (start + read * kStep < tokens) {
                units[read] = *reinterpret_cast<const Unit<T, kUnit>*>(row + start + read * kStep);
            }
        }
#pragma unroll
        for (int read = 0; read < kReads; ++read) {
#pragma unroll
            for (int i = 0; i < kUnit; ++i) {
                const int index = start + read * kStep + i;
                visit(index, units[read].value[i], index < tokens);
            }
        }
    }
}

// Smallest distance from `token` to another one; row [V].
template <bool kWide, typename T>
BTP_DEVICE uint32_t nearest_other(const T* row, int token, int tokens)
{
    uint32_t best = kNone;
    visit_row<kWide>(row, tokens, [&](int other, T similarity, bool inside) {
        best = inside & (other != token) ? lower(best, distance_key(similarity)) : best;
    });
    return warp_min(best);
}

// s of the definition: 32767 times the similarity within 0 ... 1, halves to even; NaN is 0.
template <typename T>
BTP_DEVICE uint16_t level_of(T similarity)
{
    const float inside = fminf(fmaxf(to_float(similarity), 0.0f), 1.0f);
    return static_cast<uint16_t>(__float2int_rn(__fmul_rn(32767.0f, inside)));
}

// Writes a token's row of levels [stride] from its row of similarities [tokens], by one warp; returns the sum.
template <bool kWide, typename T>
BTP_DEVICE uint32_t write_levels(const T* row, int tokens, uint16_t* levels, int stride)
{
    constexpr int kReads = 4;
    uint32_t sum = 0;
    for (int start = (static_cast<int>(threadIdx.x) & 31) * 4; start < stride; start += kReads * 128) {
        Unit<T, 4> units[kReads] = {};
#pragma unroll
        for (int read = 0; read < kReads; ++read) {
            const int first = start + read * 128;
            if (kWide && first < tokens) {
                units[read] = *reinterpret_cast<const Unit<T, 4>*>(row + first);
            }
            for (int i = 0; !kWide && i < 4; ++i) {
                if (first + i < tokens) {
                    units[read].value[i] = row[first + i];
                }
            }
        }
#pragma unroll
        for (int read = 0; read < kReads; ++read) {
            Unit<uint16_t, 4> four;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                four.value[i] = level_of(units[read].value[i]);  // of 0 behind the end
                sum += four.value[i];
            }
            if (start + read * 128 < stride) {
                *reinterpret_cast<Unit<uint16_t, 4>*>(levels + start + read * 128) = four;
            }
        }
    }
    return warp_sum(sum);
}

// Survey::ahead of `token`; scores [V].
template <bool kWide>
BTP_DEVICE uint32_t tokens_ahead(const float* scores, int token, int tokens, int boundary)
{
    const uint32_t own = order_key(scores[token]);
    uint32_t count = 0;
    visit_row<kWide>(scores, tokens, [&](int other, float score, bool inside) {
        const uint32_t key = order_key(score) + (other < token ? 1u : 0u);  // of equals the lower index comes first
        const uint32_t one = other < boundary ? 1u : 0x10000u;
        count += inside & (key > own) ? one : 0u;
    });
    return warp_sum(count);
}

constexpr int kSurveyWarps = 8;  // warps a block

// One warp a token. Also sets to their start what the second launch counts in. With the registers that the bounds leave, all
// reads of a turn are under way at once; without them the compiler saves registers and puts one behind the other.
template <bool kWide, bool kByGain, typename T>
__global__ void __launch_bounds__(32 * kSurveyWarps, 4)
survey_tokens(const BtpSelect select, const float* __restrict__ scores, const T* __restrict__ similarity,
              const int32_t* __restrict__ seeds, const Survey survey)
{
    const size_t row = size_t{blockIdx.x} * kSurveyWarps + (threadIdx.x >> 5);
    const size_t tokens = static_cast<size_t>(select.tokens);
    if (row >= static_cast<size_t>(select.batch) * tokens) {
        return;  // whole warps leave, and the block has no barrier
    }
    const size_t batch = row / tokens;
    const int token = static_cast<int>(row % tokens);
    const unsigned lane = threadIdx.x & 31u;
    const bool writes = lane == 0;
    if (kByGain) {
        const uint32_t gain = write_levels<kWide>(similarity + row * tokens, select.tokens,
                                                  survey.levels + row * survey.stride, static_cast<int>(survey.stride));
        if (writes) {
            survey.alone[row] = gain;
        }
    } else if (select.diversity_quota > 0
               || (only_seeds(select) && __ballot_sync(kAllLanes, names_token(select, seeds, lane, 32)) == 0)) {
        const uint32_t nearest = nearest_other<kWide>(similarity + row * tokens, token, select.tokens);
        if (writes) {
            survey.alone[row] = nearest;
        }
    }
    if (uses_order(select)) {
        const uint32_t ahead = tokens_ahead<kWide>(scores + batch * tokens, token, select.tokens, select.boundary);
        if (writes) {
            survey.ahead[row] = ahead;
            if (place_of(ahead) == lower(select.pool, select.tokens) - 1) {  // the last candidate has counted them all
                survey.below[batch] = (ahead & 0xffffu) + (token < select.boundary ? 1u : 0u);
            }
        }
    }
    if (writes) {
        survey.base[row] = kByGain ? 0u : kNone;
        if (token == 0) {
            survey.drawn[batch] = 0;
            survey.finished[batch] = 0;
        }
        if (row == 0) {
            *survey.ticket = 0;
        }
    }
}

}  // namespace btp
