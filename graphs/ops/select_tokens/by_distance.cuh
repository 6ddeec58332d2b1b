// Rules 2 and 4 where diversity_rule is "farthest": the next token is the farthest from its nearest selected one.
#pragma once

#include "block.cuh"
#include "survey.cuh"

namespace btp {

template <typename B, typename T>
struct ByDistance {
    using Element = T;                            // of the rows that are read
    static constexpr uint32_t kUnselected = kNone;  // `state` where nothing is selected

    const BtpSelect& select;
    const Row<T>& row;
    typename B::Shared& shared;
    uint32_t state[B::kItems] = {};  // key of the distance to the nearest selected token; 0: selected or no token
    int turn = 0;

    // state = the smaller of it and the distances in a row.
    static BTP_DEVICE void approach(const T (&values)[B::kItems], uint32_t (&state)[B::kItems])
    {
#pragma unroll
        for (int item = 0; item < B::kItems; ++item) {
            state[item] = lower(state[item], distance_key(values[item]));
        }
    }

    static BTP_DEVICE void merge(uint32_t* base, uint32_t value) { atomicMin(base, value); }

    BTP_DEVICE void start()
    {
        for (int item = 0; item < B::kItems; ++item) {
            state[item] = B::element(item) < select.tokens ? kUnselected : 0u;
        }
    }

    // From nothing: the token with the largest distance to its nearest other one.
    BTP_DEVICE int first()
    {
        uint32_t alone[B::kItems] = {};
        B::read_entries(row.alone, select.tokens, alone);
        return farthest(alone);
    }

    BTP_DEVICE int next() { return farthest(state); }

    // Selects `token`: its own distance becomes 0 and every other token may have come nearer.
    BTP_DEVICE void add(int token)
    {
        T values[B::kItems] = {};
        B::read_row(row.of(token), select.tokens, values);
#pragma unroll
        for (int item = 0; item < B::kItems; ++item) {  // 0 is the lowest key and stays; done while the row is read
            state[item] = B::element(item) == token ? 0u : state[item];
        }
        approach(values, state);
    }

    // The members are selected; base: see Survey.
    BTP_DEVICE void start_from(const uint32_t (&base)[B::kItems])
    {
        for (int item = 0; item < B::kItems; ++item) {
            state[item] = shared.member[B::element(item)] != 0 ? 0u : lower(state[item], base[item]);
        }
    }

private:
    // The token with the largest key, the lowest one of equals. Two turns of `partial` alternate, so one barrier a call is
    // enough: a warp can be one call ahead of another, never two.
    BTP_DEVICE int farthest(const uint32_t (&key)[B::kItems])
    {
        uint32_t best = key[0];
#pragma unroll
        for (int item = 1; item < B::kItems; ++item) {
            best = higher(key[item], best);
        }
        uint32_t top = warp_max(best);
        uint32_t token = 0;
#pragma unroll
        for (int item = B::kItems - 1; item >= 0; --item) {  // while the warp's maximum is under way
            token = key[item] == best ? static_cast<uint32_t>(B::element(item)) : token;
        }
        uint64_t* const partial = shared.partial[turn++ & 1];
        if (B::lane() == B::first_lane(best == top)) {
            partial[B::warp()] = (static_cast<uint64_t>(top) << 32) | token;
        }
        __syncthreads();
        const uint64_t mine = B::lane() < B::warps() ? partial[B::lane()] : 0u;
        const uint32_t its = static_cast<uint32_t>(mine >> 32);
        top = warp_max(its);
        return static_cast<int>(__shfl_sync(kAllLanes, static_cast<uint32_t>(mine), B::first_lane(its == top)));
    }
};

}  // namespace btp
