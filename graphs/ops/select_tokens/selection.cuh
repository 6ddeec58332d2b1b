// The selection of one batch row by one thread block: rules 1, 2, 3 and 4 of the operator's definition (schema.py).
#pragma once

#include "block.cuh"
#include "kernel.h"

namespace btp {

BTP_DEVICE float to_float(float x) { return x; }
BTP_DEVICE float to_float(__half x) { return __half2float(x); }

template <typename T>
BTP_DEVICE uint32_t distance_key(T similarity)
{
    return order_key(__fsub_rn(1.0f, to_float(similarity)));
}

BTP_DEVICE uint32_t lower(uint32_t a, uint32_t b) { return a < b ? a : b; }

template <typename B, typename T>
struct Selection {
    using Shared = typename B::Shared;

    const BtpSelect& select;
    const float* scores;       // [V]
    const T* similarity;       // [V,V] or null
    const int32_t* seeds;      // [m] or null
    const uint32_t* nearest;   // [V] or null
    Shared& shared;
    uint32_t distance[B::kItems] = {};  // key of the distance to the nearest selected token; 0: selected or no token
    int kept = 0;              // tokens in the base so far
    int turn = 0;

    BTP_DEVICE void run(int32_t* indices)
    {
        for (int item = 0; item < B::kItems; ++item) {
            shared.member[B::element(item)] = 0;
        }
        if (select.attention_quota > 0 || similarity == nullptr) {
            sort_by_score();
            pick_attention();
        }
        const int from_attention = kept;
        const bool nothing = select.attention_quota == 0 && select.seeds == 0;
        const int diverse = select.diversity_quota > 0 ? select.diversity_quota
                            : similarity != nullptr && nothing ? select.keep : 0;
        start_distances();
        if (diverse > 0) {
            pick_diverse(diverse);
        }
        const int before_seeds = kept;
        if (select.seeds > 0) {
            pick_seeds();
        }
        if (kept < select.keep) {
            if (similarity == nullptr) {
                fill_by_order();
            } else {
                approach_base(0, from_attention);
                approach_base(before_seeds, kept);
                fill_by_distance();
            }
        }
        write_members(indices);
    }

    // order: tokens by score, highest first, ties to the lower index.
    BTP_DEVICE void sort_by_score()
    {
        uint64_t value[B::kItems];
        for (int item = 0; item < B::kItems; ++item) {
            const int token = B::element(item);
            const uint64_t key = token < select.tokens ? order_key(scores[token]) : 0u;
            value[item] = (key << 32) | (kNone - static_cast<uint32_t>(token));
        }
        B::sort_descending(value, shared);
        for (int item = 0; item < B::kItems; ++item) {
            shared.order[B::element(item)] = kNone - static_cast<uint32_t>(value[item]);
        }
        // No barrier: a thread only ever reads the places that it wrote.
    }

    // Rule 1: the candidates below the boundary, then the others, until the quota is full; rule 3 cuts at keep.
    BTP_DEVICE void pick_attention()
    {
        const int limit = select.attention_quota < select.keep ? select.attention_quota : select.keep;
        bool flag[B::kItems];
        int rank[B::kItems];
        for (int part = 0; part < 2; ++part) {
            for (int item = 0; item < B::kItems; ++item) {
                const int place = B::element(item);
                const bool candidate = place < select.pool && place < select.tokens;
                const bool below = static_cast<int>(shared.order[place]) < select.boundary;
                flag[item] = candidate && below == (part == 0);
            }
            take(flag, rank, limit, [this](int place) { return shared.order[place]; });
        }
    }

    // Rule 2: farthest-point selection from nothing; the picks that are new join the base, cut at keep.
    BTP_DEVICE void pick_diverse(int count)
    {
        uint32_t start[B::kItems];
        for (int item = 0; item < B::kItems; ++item) {
            const int token = B::element(item);
            start[item] = token < select.tokens ? nearest[token] : 0u;
        }
        int token = B::farthest(start, turn++, shared);
        for (int pick = 0;; ++pick) {
            if (threadIdx.x == 0) {
                shared.picks[pick] = static_cast<uint32_t>(token);
            }
            approach(token);
            if (pick + 1 == count) {
                break;
            }
            token = B::farthest(distance, turn++, shared);
        }
        __syncthreads();
        bool flag[B::kItems];
        int rank[B::kItems];
        for (int item = 0; item < B::kItems; ++item) {
            const int pick = B::element(item);
            flag[item] = pick < count && shared.member[shared.picks[pick < count ? pick : 0]] == 0;
        }
        take(flag, rank, select.keep, [this](int pick) { return shared.picks[pick]; });
    }

    // Rule 3, end: the seeds that are new, in their order, cut at keep. A seed named twice counts where it stands first.
    BTP_DEVICE void pick_seeds()
    {
        for (int item = 0; item < B::kItems; ++item) {
            shared.owner[B::element(item)] = kNone;
        }
        __syncthreads();
        for (int seed = static_cast<int>(threadIdx.x); seed < select.seeds; seed += B::kThreads) {
            const int token = seeds[seed];
            if (token >= 0 && token < select.tokens) {
                atomicMin(&shared.owner[token], static_cast<uint32_t>(seed));
            }
        }
        __syncthreads();
        bool flag[B::kItems];
        int rank[B::kItems];
        for (int first = 0; first < select.seeds; first += B::kTokens) {
            for (int item = 0; item < B::kItems; ++item) {
                const int seed = first + B::element(item);
                const int token = seed < select.seeds ? seeds[seed] : -1;
                const bool inside = token >= 0 && token < select.tokens;
                flag[item] = inside && shared.owner[inside ? token : 0] == static_cast<uint32_t>(seed)
                             && shared.member[inside ? token : 0] == 0;
            }
            take(flag, rank, select.keep, [this, first](int e) { return static_cast<uint32_t>(seeds[first + e]); });
        }
    }

    // Rule 4 without similarity: the best of the order that are not held yet.
    BTP_DEVICE void fill_by_order()
    {
        bool flag[B::kItems];
        int rank[B::kItems];
        for (int item = 0; item < B::kItems; ++item) {
            const int place = B::element(item);
            flag[item] = place < select.tokens && shared.member[shared.order[place]] == 0;
        }
        take(flag, rank, select.keep, [this](int place) { return shared.order[place]; });
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

    BTP_DEVICE void start_distances()
    {
        for (int item = 0; item < B::kItems; ++item) {
            distance[item] = B::element(item) < select.tokens ? kNone : 0u;
        }
    }

    // Selects `token`: its own distance becomes 0 and every other token may have come nearer.
    BTP_DEVICE void approach(int token)
    {
        const T* const row = similarity + static_cast<size_t>(token) * select.tokens;
        uint32_t key[B::kItems];
#pragma unroll
        for (int item = 0; item < B::kItems; ++item) {
            const int other = B::element(item);
            key[item] = other < select.tokens ? distance_key(row[other]) : 0u;
        }
#pragma unroll
        for (int item = 0; item < B::kItems; ++item) {
            distance[item] = B::element(item) == token ? 0u : lower(distance[item], key[item]);
        }
    }

    // The same for base[first, last): independent rows, so that many reads are under way at once.
    BTP_DEVICE void approach_base(int first, int last)
    {
#pragma unroll 4
        for (int place = first; place < last; ++place) {
            approach(shared.base[place]);
        }
    }

    // Lets the flagged elements join the base in element order until it holds `limit` tokens. Flags may be made from
    // `member` just before: rank() has a barrier between those reads and the writes here.
    template <typename Token>
    BTP_DEVICE void take(const bool (&flag)[B::kItems], int (&rank)[B::kItems], int limit, Token token_of)
    {
        const int flagged = B::rank(flag, rank, shared);
#pragma unroll
        for (int item = 0; item < B::kItems; ++item) {
            if (flag[item] && kept + rank[item] < limit) {
                const uint32_t token = token_of(B::element(item));
                shared.base[kept + rank[item]] = static_cast<uint16_t>(token);
                shared.member[token] = 1;
            }
        }
        kept = kept + flagged < limit ? kept + flagged : (kept < limit ? limit : kept);
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
