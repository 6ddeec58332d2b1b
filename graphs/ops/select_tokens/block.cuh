// What a thread block does together in the selection: read a row, rank flags.
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

BTP_DEVICE uint32_t higher(uint32_t a, uint32_t b) { return a > b ? a : b; }
BTP_DEVICE uint32_t lower(uint32_t a, uint32_t b) { return a < b ? a : b; }
BTP_DEVICE int lower(int a, int b) { return a < b ? a : b; }

// What one read takes.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Unit {
    T value[kCount];
};

// One read of memory that nobody writes during the launch, wherever the compiler believes that it lies.
template <typename T, int kCount>
BTP_DEVICE Unit<T, kCount> read_unit(const char* at)
{
    Unit<T, kCount> unit;
#ifdef BTP_SIMT_EMULATION
    unit = *reinterpret_cast<const Unit<T, kCount>*>(at);
#else
    if constexpr (sizeof(unit) == 16) {
        const uint4 bits = __ldg(reinterpret_cast<const uint4*>(at));
        memcpy(&unit, &bits, sizeof unit);
    } else if constexpr (sizeof(unit) == 8) {
        const uint2 bits = __ldg(reinterpret_cast<const uint2*>(at));
        memcpy(&unit, &bits, sizeof unit);
    } else if constexpr (sizeof(unit) == 4) {
        const uint32_t bits = __ldg(reinterpret_cast<const uint32_t*>(at));
        memcpy(&unit, &bits, sizeof unit);
    } else {
        const uint16_t bits = __ldg(reinterpret_cast<const uint16_t*>(at));
        memcpy(&unit, &bits, sizeof unit);
    }
#endif
    return unit;
}

// kWide: rows are aligned for reads of 4 elements, and so many are whole numbers of them.
template <int kItems_, bool kWide_>
struct Block {
    static constexpr int kItems = kItems_;
    static constexpr bool kWide = kWide_;
    static constexpr int kMaxThreads = 1024;
    static constexpr int kTokens = kMaxThreads * kItems;

    // While the block goes from pick to pick.
    struct Steps {
        uint16_t picks[kTokens];        // of rule 2
        uint32_t covered[kTokens / 2];  // by gain: how far each token is covered, two tokens a word
    };

    // Shared memory of the block.
    struct Shared {
        uint64_t partial[2][32];  // at an address that 512 divides: what each warp tells the others, two turns (Exchange)
        uint32_t counts[32];      // flags set in each warp
        uint32_t word;            // what one thread tells the others
        union alignas(16) {
            Steps steps;
            uint32_t list[kTokens];  // first seed that names a token; order
        };
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

    // This thread's entries of an array [tokens], all read before the first is used; what is behind its end stays as it is.
    static BTP_DEVICE void read_entries(const uint32_t* entries, int tokens, uint32_t (&values)[kItems])
    {
#pragma unroll
        for (int item = 0; item < kItems; ++item) {
            if (element(item) < tokens) {
                values[item] = entries[element(item)];
            }
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

    static BTP_DEVICE int first_lane(bool flag) { return __ffs(static_cast<int>(__ballot_sync(kAllLanes, flag))) - 1; }
};

// Each warp tells all others two numbers. Two turns of memory alternate, so one barrier a turn is enough: a warp can be one
// turn ahead of another, never two.
template <typename B>
struct Exchange {
    static constexpr uint32_t kTurn = sizeof(B::Shared::partial[0]);

    uint32_t out, in;  // shared addresses for this turn

    // Warps that the block does not have tell 0, 0. A barrier must stand before the first meet().
    BTP_DEVICE void start(typename B::Shared& shared)
    {
        for (int entry = static_cast<int>(threadIdx.x); entry < 64; entry += static_cast<int>(blockDim.x)) {
            shared.partial[entry / 32][entry % 32] = 0;
        }
        const uint32_t first = shared_address(shared.partial);
        out = opaque(first + 8 * static_cast<uint32_t>(B::warp()));
        in = opaque(first + 8 * static_cast<uint32_t>(B::lane()));
    }

    // One lane of each warp `tells` a and b; every lane gets those of the warp with its number.
    BTP_DEVICE void meet(bool tells, uint32_t a, uint32_t b, uint32_t& its_a, uint32_t& its_b)
    {
        if (tells) {
            store_shared(out, a, b);
        }
        __syncthreads();
        load_shared(in, its_a, its_b);
        out ^= kTurn;
        in ^= kTurn;
    }
};

}  // namespace btp
