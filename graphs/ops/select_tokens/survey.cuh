// What the first launch finds out about every token, with the whole device and no step that waits for another token.
#pragma once

#include "block.cuh"
#include "kernel.h"

namespace btp {

// The workspace of one call; every array has one element a token [B,V] where nothing else is said.
struct Survey {
    uint32_t* nearest;   // key of the smallest distance to another token (start of rule 2)
    uint32_t* ahead;     // tokens before this one in the order: below the boundary (low half), the others (high half)
    uint32_t* base;      // key of the smallest distance to picks A and seeds (rule 4), which the second launch finds
    uint32_t* below;     // [B] candidates below the boundary (rule 1)
    uint32_t* finished;  // [B] parts of `base` that are complete
    uint32_t* ticket;    // [1] blocks of the second launch that have started

    static size_t bytes(const BtpSelect& select)
    {
        const size_t batch = static_cast<size_t>(select.batch);
        return sizeof(uint32_t) * (3 * batch * static_cast<size_t>(select.tokens) + 2 * batch + 1);
    }

    Survey(const BtpSelect& select, void* workspace)
    {
        const size_t batch = static_cast<size_t>(select.batch);
        const size_t tokens = batch * static_cast<size_t>(select.tokens);
        nearest = static_cast<uint32_t*>(workspace);
        ahead = nearest + tokens;
        base = ahead + tokens;
        below = base + tokens;
        finished = below + batch;
        ticket = finished + batch;
    }
};

BTP_HOST_DEVICE bool uses_order(const BtpSelect& s)
{
    return s.attention_quota > 0 || s.similarity == BTP_NO_SIMILARITY;
}

BTP_HOST_DEVICE bool starts_from_nothing(const BtpSelect& s)
{
    return s.similarity != BTP_NO_SIMILARITY && (s.diversity_quota > 0 || (s.attention_quota == 0 && s.seeds == 0));
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
template <bool kWide, typename T>
__global__ void __launch_bounds__(32 * kSurveyWarps, 4)
survey_tokens(const BtpSelect select, const float* __restrict__ scores,
                              const T* __restrict__ similarity, const Survey survey)
{
    const size_t row = size_t{blockIdx.x} * kSurveyWarps + (threadIdx.x >> 5);
    const size_t tokens = static_cast<size_t>(select.tokens);
    if (row >= static_cast<size_t>(select.batch) * tokens) {
        return;  // whole warps leave, and the block has no barrier
    }
    const size_t batch = row / tokens;
    const int token = static_cast<int>(row % tokens);
    const bool writes = (threadIdx.x & 31u) == 0;
    if (starts_from_nothing(select)) {
        const uint32_t nearest = nearest_other<kWide>(similarity + row * tokens, token, select.tokens);
        if (writes) {
            survey.nearest[row] = nearest;
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
        survey.base[row] = kNone;
        if (token == 0) {
            survey.finished[batch] = 0;
        }
        if (row == 0) {
            *survey.ticket = 0;
        }
    }
}

}  // namespace btp
