// The selection of one batch row: rules 1, 2, 3 and 4 of the operator's definition (schema.py).
//
// One block goes from pick to pick. What rule 4 wants to know of picks A and the seeds, the distance of every token to the
// nearest of them, does not depend on those steps: other blocks find it meanwhile (approach_base).
#pragma once

#include "block.cuh"
#include "kernel.h"
#include "survey.cuh"

namespace btp {

constexpr int kPartTokens = 32;  // tokens whose rows one block of approach_base reads, at most

// Rule 4 looks at picks A and the seeds only where the base is not full without them.
inline int base_parts(const BtpSelect& select)
{
    const bool any = select.similarity != BTP_NO_SIMILARITY && (select.attention_quota > 0 || select.seeds > 0);
    return any && select.attention_quota < select.keep ? (select.tokens + kPartTokens - 1) / kPartTokens : 0;
}

// One batch row's inputs and its part of the survey.
template <typename T>
struct Row {
    const T* similarity;      // [V,V] or null
    const int32_t* seeds;     // [m] or null
    const uint32_t* nearest;  // [V]
    const uint32_t* ahead;    // [V]
    uint32_t* base;           // [V]
    const uint32_t* below;    // [1]
    uint32_t* finished;       // [1]

    BTP_DEVICE Row(const BtpSelect& select, const T* similarity_, const int32_t* seeds_, const Survey& survey, size_t batch)
    {
        const size_t tokens = static_cast<size_t>(select.tokens);
        similarity = similarity_ == nullptr ? nullptr : similarity_ + batch * tokens * tokens;
        seeds = seeds_;
        nearest = survey.nearest + batch * tokens;
        ahead = survey.ahead + batch * tokens;
        base = survey.base + batch * tokens;
        below = survey.below + batch;
        finished = survey.finished + batch;
    }
};

// Lowers row.base to the distances from those of kPartTokens tokens, beginning at part * kPartTokens, that are among picks
// A or the seeds. (Rule 3 may cut some of them from the base; then the base is full and nobody asks.)
template <typename B, typename T>
BTP_DEVICE void approach_base(const BtpSelect& select, const Row<T>& row, int part, typename B::Shared& shared)
{
    constexpr int kRows = 4;  // rows under way at once
    const int first = part * kPartTokens;
    if (threadIdx.x == 0) {
        shared.word = 0;
    }
    __syncthreads();
    const int own = first + static_cast<int>(threadIdx.x);
    if (threadIdx.x < kPartTokens && own < select.tokens && select.attention_quota > 0
        && is_attention_pick(select, own, row.ahead[own], *row.below)) {
        atomicOr(&shared.word, 1u << threadIdx.x);
    }
    for (int seed = static_cast<int>(threadIdx.x); seed < select.seeds; seed += static_cast<int>(blockDim.x)) {
        const int token = row.seeds[seed];
        if (token >= first && token < lower(first + kPartTokens, select.tokens)) {
            atomicOr(&shared.word, 1u << (token - first));
        }
    }
    __syncthreads();
    const uint32_t chosen = shared.word;
    uint32_t nearest[B::kItems];
    for (int item = 0; item < B::kItems; ++item) {
        nearest[item] = kNone;
    }
    for (uint32_t left = chosen; left != 0;) {
        T values[kRows][B::kItems] = {};
        int next = 0;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            next = left != 0 ? __ffs(static_cast<int>(left)) - 1 : next;  // none left: the last one again changes nothing
            left &= left - 1;
            const size_t token = static_cast<size_t>(first + next);
            B::read_row(row.similarity + token * static_cast<size_t>(select.tokens), select.tokens, values[i]);
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            B::approach(values[i], nearest);
        }
    }
    for (int item = 0; item < B::kItems; ++item) {
        if (chosen != 0 && B::element(item) < select.tokens) {
            atomicMin(&row.base[B::element(item)], nearest[item]);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // the block's minima can be seen before its count
        atomicAdd(row.finished, 1u);
    }
}

// The block that goes from pick to pick.
template <typename B, typename T>
struct Selection {
    const BtpSelect& select;
    const Row<T>& row;
    typename B::Shared& shared;
    uint32_t distance[B::kItems] = {};  // key of the distance to the nearest selected token; 0: selected or no token
    int kept = 0;                       // tokens in the base so far
    int turn = 0;

    BTP_DEVICE void run(int parts, int32_t* indices)
    {
        for (int item = 0; item < B::kItems; ++item) {
            shared.member[B::element(item)] = 0;
        }
        if (select.attention_quota > 0) {
            pick_attention();
        }
        for (int item = 0; item < B::kItems; ++item) {
            distance[item] = B::element(item) < select.tokens ? kNone : 0u;
        }
        const bool nothing = select.attention_quota == 0 && select.seeds == 0;
        const int diverse = select.diversity_quota > 0 ? select.diversity_quota
                            : row.similarity != nullptr && nothing ? select.keep : 0;
        if (diverse > 0) {
            pick_diverse(diverse);
        }
        if (select.seeds > 0) {
            pick_seeds();
        }
        if (kept < select.keep) {
            if (row.similarity == nullptr) {
                fill_by_order();
            } else {
                wait_for_base(parts);
                fill_by_distance();
            }
        }
        write_members(indices);
    }

    // Rule 1. The members that a thread writes here are read by others behind a later barrier only.
    BTP_DEVICE void pick_attention()
    {
        uint32_t ahead[B::kItems] = {};
        read_entries(row.ahead, ahead);
        const uint32_t below = *row.below;
        for (int item = 0; item < B::kItems; ++item) {
            const int token = B::element(item);
            if (token < select.tokens && is_attention_pick(select, token, ahead[item], below)) {
                shared.member[token] = 1;
            }
        }
        kept = lower(select.attention_quota, select.keep);
    }

    // Rule 2: farthest-point selection from nothing; the picks that are new join the base, cut at keep.
    BTP_DEVICE void pick_diverse(int count)
    {
        uint32_t start[B::kItems] = {};
        read_entries(row.nearest, start);
        int token = B::farthest(start, turn++, shared);
        for (int pick = 0;; ++pick) {
            if (threadIdx.x == 0) {
                shared.list[pick] = static_cast<uint32_t>(token);
            }
            approach(token);
            if (pick + 1 == count) {
                break;
            }
            token = B::farthest(distance, turn++, shared);
        }
        __syncthreads();
        bool flag[B::kItems];
        for (int item = 0; item < B::kItems; ++item) {
            const int pick = B::element(item);
            flag[item] = pick < count && shared.member[shared.list[pick < count ? pick : 0]] == 0;
        }
        take(flag, select.keep, [this](int pick) { return shared.list[pick]; });
    }

    // Rule 3, end: the seeds that are new, in their order, cut at keep. A seed named twice counts where it stands first.
    BTP_DEVICE void pick_seeds()
    {
        uint32_t* const owner = shared.list;
        for (int item = 0; item < B::kItems; ++item) {
            owner[B::element(item)] = kNone;
        }
        __syncthreads();
        for (int seed = static_cast<int>(threadIdx.x); seed < select.seeds; seed += static_cast<int>(blockDim.x)) {
            const int token = row.seeds[seed];
            if (token >= 0 && token < select.tokens) {
                atomicMin(&owner[token], static_cast<uint32_t>(seed));
            }
        }
        __syncthreads();
        bool flag[B::kItems];
        for (int first = 0; first < select.seeds; first += static_cast<int>(blockDim.x) * B::kItems) {
            for (int item = 0; item < B::kItems; ++item) {
                const int seed = first + B::element(item);
                const int token = row.seeds[lower(seed, select.seeds - 1)];
                const bool inside = seed < select.seeds && token >= 0 && token < select.tokens;
                const int at = inside ? token : 0;
                flag[item] = (owner[at] == static_cast<uint32_t>(seed)) & (shared.member[at] == 0) & inside;
            }
            take(flag, select.keep, [this, first](int e) { return static_cast<uint32_t>(row.seeds[first + e]); });
        }
    }

    // Rule 4 without similarity: the best of the order that are not held yet.
    BTP_DEVICE void fill_by_order()
    {
        uint32_t ahead[B::kItems] = {};
        read_entries(row.ahead, ahead);
        for (int item = 0; item < B::kItems; ++item) {
            const int token = B::element(item);
            if (token < select.tokens) {
                shared.list[place_of(ahead[item])] = static_cast<uint32_t>(token);
            }
        }
        __syncthreads();
        bool flag[B::kItems];
        for (int item = 0; item < B::kItems; ++item) {
            const int place = B::element(item);
            flag[item] = place < select.tokens && shared.member[shared.list[place < select.tokens ? place : 0]] == 0;
        }
        take(flag, select.keep, [this](int place) { return shared.list[place]; });
    }

    // The base is complete with what the blocks of approach_base found. They started before this block, so they end.
    BTP_DEVICE void wait_for_base(int parts)
    {
        if (threadIdx.x == 0) {
            while (*static_cast<volatile uint32_t*>(row.finished) < static_cast<uint32_t>(parts)) {
            }
            __threadfence();
        }
        __syncthreads();
        uint32_t base[B::kItems] = {};
        for (int item = 0; item < B::kItems; ++item) {
            if (B::element(item) < select.tokens) {
                base[item] = __ldcg(&row.base[B::element(item)]);  // from L2, where the other blocks put it
            }
        }
        for (int item = 0; item < B::kItems; ++item) {
            distance[item] = shared.member[B::element(item)] != 0 ? 0u : lower(distance[item], base[item]);
        }
    }

    // Rule 4 with similarity: farthest-point selection goes on from the base.
    BTP_DEVICE void fill_by_distance()
    {
        for (; kept < select.keep; ++kept) {
            const int token = B::farthest(distance, turn++, shared);
            if (threadIdx.x == 0) {
                shared.member[token] = 1;
            }
            if (kept + 1 < select.keep) {
                approach(token);
            }
        }
        __syncthreads();
    }

    // This thread's entries of an array of the survey, all read before the first is used; 0 stays behind the last token.
    BTP_DEVICE void read_entries(const uint32_t* entries, uint32_t (&values)[B::kItems])
    {
#pragma unroll
        for (int item = 0; item < B::kItems; ++item) {
            if (B::element(item) < select.tokens) {
                values[item] = entries[B::element(item)];
            }
        }
    }

    // Selects `token`: its own distance becomes 0 and every other token may have come nearer.
    BTP_DEVICE void approach(int token)
    {
        T values[B::kItems] = {};
        B::read_row(row.similarity + static_cast<size_t>(token) * static_cast<size_t>(select.tokens), select.tokens,
                    values);
#pragma unroll
        for (int item = 0; item < B::kItems; ++item) {  // 0 is the lowest key and stays; done while the row is read
            distance[item] = B::element(item) == token ? 0u : distance[item];
        }
        B::approach(values, distance);
    }

    // Lets the flagged elements join the base in element order until it holds `limit` tokens. Flags may be made from
    // `member` just before: rank() has a barrier between those reads and the writes here.
    template <typename Token>
    BTP_DEVICE void take(const bool (&flag)[B::kItems], int limit, Token token_of)
    {
        int rank[B::kItems];
        const int flagged = B::rank(flag, rank, shared);
#pragma unroll
        for (int item = 0; item < B::kItems; ++item) {
            if (flag[item] && kept + rank[item] < limit) {
                shared.member[token_of(B::element(item))] = 1;
            }
        }
        kept = lower(kept + flagged, limit);
        __syncthreads();
    }

    BTP_DEVICE void write_members(int32_t* indices)
    {
        bool flag[B::kItems];
        int rank[B::kItems];
        for (int item = 0; item < B::kItems; ++item) {
            flag[item] = shared.member[B::element(item)] != 0;
        }
        B::rank(flag, rank, shared);
        for (int item = 0; item < B::kItems; ++item) {
            if (flag[item]) {
                indices[rank[item]] = B::element(item);
            }
        }
    }
};

}  // namespace btp
