// What a thread block does together in the selection: read a row, rank flags, find the farthest token.
// Every thread owns kItems neighbouring tokens, thread 0 the first ones; so a row is read in wide units, and the lowest
// lane or warp that holds a value holds the lowest token with it.
#pragma once

#include "../common/device.h"

namespace btp {

BTP_DEVICE float to_float(float x) { return x; }
BTP_DEVICE float to_float(__half x) { return __half2float(x); }

template <typename T>
BTP_DEVICE uint32_t distance_key(T similarity)
{
    return key_without_minus_zero(__fsub_rn(1.0f, to_float(similarity)));  // 1 - x is never -0
}

BTP_DEVICE uint32_t lower(uint32_t a, uint32_t b) { return a < b ? a : b; }
BTP_DEVICE int lower(int a, int b) { return a < b ? a : b; }

// What one read takes.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Unit {
    T value[kCount];
};

// kWide: rows are aligned for reads of 4 elements, and so many are whole numbers of them.
template <int kItems_, bool kWide_>
struct Block {
    static constexpr int kItems = kItems_;
    static constexpr bool kWide = kWide_;
    static constexpr int kMaxThreads = 1024;
    static constexpr int kTokens = kMaxThreads * kItems;

    // Shared memory of the block.
    struct Shared {
        uint64_t partial[2][32];  // best (distance, token) of each warp, two turns
        uint32_t counts[32];      // flags set in each warp
        uint32_t word;            // what one thread tells the others
        uint32_t list[kTokens];   // one after the other: picks of rule 2; first seed that names a token; order
        uint8_t member[kTokens];  // 1: the token is kept
    };

    static BTP_DEVICE int element(int item) { return static_cast<int>(threadIdx.x) * kItems + item; }
    static BTP_DEVICE int lane() { return static_cast<int>(threadIdx.x) & 31; }
    static BTP_DEVICE int warp() { return static_cast<int>(threadIdx.x) >> 5; }
    static BTP_DEVICE int warps() { return static_cast<int>(blockDim.x) >> 5; }

    // This thread's part of one row [tokens]; what is behind its end stays as it is. All reads are under way before the
    // first value is used.
    template <typename T>
    static BTP_DEVICE void read_row(const T* row, int tokens, T (&values)[kItems])
    {
        if constexpr (kWide) {
#pragma unroll
            for (int first = 0; first < kItems; first += 4) {
                if (element(first) < tokens) {
                    const auto four = *reinterpret_cast<const Unit<T, 4>*>(row + element(first));
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        values[first + i] = four.value[i];
                    }
                }
            }
        } else {
#pragma unroll
            for (int item = 0; item < kItems; ++item) {
                if (element(item) < tokens) {
                    values[item] = row[element(item)];
                }
            }
        }
    }

    // distance = the smaller of it and the distances in a row.
    template <typename T>
    static BTP_DEVICE void approach(const T (&values)[kItems], uint32_t (&distance)[kItems])
    {
#pragma unroll
        for (int item = 0; item < kItems; ++item) {
            distance[item] = lower(distance[item], distance_key(values[item]));
        }
    }

    // For each set flag the number of set flags at lower elements; returns how many are set in all. A barrier must stand
    // between two calls, which share the scratch.
    static BTP_DEVICE int rank(const bool (&flag)[kItems], int (&ranks)[kItems], Shared& shared)
    {
        const uint32_t lanes_before = (1u << lane()) - 1u;
        int before = 0;
        int all = 0;
#pragma unroll
        for (int item = 0; item < kItems; ++item) {
            const uint32_t bits = __ballot_sync(kAllLanes, flag[item]);
            before += __popc(bits & lanes_before);
            all += __popc(bits);
        }
        if (lane() == 0) {
            shared.counts[warp()] = static_cast<uint32_t>(all);
        }
        __syncthreads();
        const uint32_t count = lane() < warps() ? shared.counts[lane()] : 0u;
        before += static_cast<int>(warp_sum(lane() < warp() ? count : 0u));
#pragma unroll
        for (int item = 0; item < kItems; ++item) {
            ranks[item] = before;
            before += flag[item] ? 1 : 0;
        }
        return static_cast<int>(warp_sum(count));
    }

    // The token with the largest distance key, the lowest one of equals. Two turns of `partial` alternate, so one barrier
    // a call is enough: a warp can be one call ahead of another, never two.
    static BTP_DEVICE int farthest(const uint32_t (&distance)[kItems], int turn, Shared& shared)
    {
        uint32_t best = distance[0];
#pragma unroll
        for (int item = 1; item < kItems; ++item) {
            best = distance[item] > best ? distance[item] : best;
        }
        uint32_t top = warp_max(best);
        uint32_t token = 0;
#pragma unroll
        for (int item = kItems - 1; item >= 0; --item) {  // while the warp's maximum is under way
            token = distance[item] == best ? static_cast<uint32_t>(element(item)) : token;
        }
        uint64_t* const partial = shared.partial[turn & 1];
        if (lane() == first_lane(best == top)) {
            partial[warp()] = (static_cast<uint64_t>(top) << 32) | token;
        }
        __syncthreads();
        const uint64_t mine = lane() < warps() ? partial[lane()] : 0u;
        const uint32_t key = static_cast<uint32_t>(mine >> 32);
        top = warp_max(key);
        return static_cast<int>(__shfl_sync(kAllLanes, static_cast<uint32_t>(mine), first_lane(key == top)));
    }

private:
    static BTP_DEVICE int first_lane(bool flag) { return __ffs(static_cast<int>(__ballot_sync(kAllLanes, flag))) - 1; }
};

}  // namespace btp
