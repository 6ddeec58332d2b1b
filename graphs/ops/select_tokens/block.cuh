// What a thread block does together in the selection: sort, rank flags, find the farthest token.
// Every element e of a block's [kTokens] arrays lives in registers of thread e % kThreads, item e / kThreads, so a warp
// reads 32 neighbours and word e / 32 of a ballot mask belongs to one warp and item.
#pragma once

#include "../common/device.h"

namespace btp {

template <int kThreads_, int kItems_>
struct Block {
    static constexpr int kThreads = kThreads_;
    static constexpr int kItems = kItems_;
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kTokens = kThreads * kItems;
    static constexpr int kWords = kTokens / 32;

    // Shared memory of the block. `exchange` serves the sort; afterwards its halves hold the order and, one after the
    // other, the diverse picks and the seeds' owners.
    struct Shared {
        union {
            uint64_t exchange[kTokens];
            struct {
                uint32_t order[kTokens];  // token at each place of the order
                union {
                    uint32_t picks[kTokens];  // tokens of rule 2 in the order of picking
                    uint32_t owner[kTokens];  // first seed that names the token
                };
            };
        };
        uint16_t base[kTokens];      // picked tokens, in the order in which they were picked
        uint8_t member[kTokens];     // 1: the token is kept
        uint32_t words[kWords];      // ballots of rank()
        uint32_t before[kWords + 1]; // flags set before each word
        uint64_t partial[2][32];     // best (distance, token) of each warp, two turns
    };

    static BTP_DEVICE int element(int item) { return item * kThreads + static_cast<int>(threadIdx.x); }
    static BTP_DEVICE int lane() { return static_cast<int>(threadIdx.x) & 31; }
    static BTP_DEVICE int warp() { return static_cast<int>(threadIdx.x) >> 5; }

    // Sorts the block's kTokens values, highest first (bitonic network). Partners less than a warp apart meet by shuffle,
    // partners kThreads or more apart live in the same thread, the rest go through shared memory.
    static BTP_DEVICE void sort_descending(uint64_t (&value)[kItems], Shared& shared)
    {
        for (int size = 2; size <= kTokens; size <<= 1) {
            for (int stride = size >> 1; stride > 0; stride >>= 1) {
                if (stride >= kThreads) {
                    merge_in_thread(value, size, stride / kThreads);
                } else if (stride >= 32) {
                    for (int item = 0; item < kItems; ++item) {
                        shared.exchange[element(item)] = value[item];
                    }
                    __syncthreads();
#pragma unroll
                    for (int item = 0; item < kItems; ++item) {
                        merge(value[item], shared.exchange[element(item) ^ stride], element(item), size, stride);
                    }
                    __syncthreads();
                } else {
#pragma unroll
                    for (int item = 0; item < kItems; ++item) {
                        const uint64_t other = __shfl_xor_sync(kAllLanes, value[item], stride);
                        merge(value[item], other, element(item), size, stride);
                    }
                }
            }
        }
    }

    // For each set flag the number of set flags at lower elements; returns how many are set in all. A barrier must stand
    // between two calls, which share the scratch.
    static BTP_DEVICE int rank(const bool (&flag)[kItems], int (&ranks)[kItems], Shared& shared)
    {
        uint32_t bits[kItems];
#pragma unroll
        for (int item = 0; item < kItems; ++item) {
            bits[item] = __ballot_sync(kAllLanes, flag[item]);
            if (lane() == 0) {
                shared.words[item * kWarps + warp()] = bits[item];
            }
        }
        __syncthreads();
        if (warp() == 0) {
            count_before(shared);
        }
        __syncthreads();
        const uint32_t lower = (1u << lane()) - 1u;
#pragma unroll
        for (int item = 0; item < kItems; ++item) {
            ranks[item] = static_cast<int>(shared.before[item * kWarps + warp()]) + __popc(bits[item] & lower);
        }
        return static_cast<int>(shared.before[kWords]);
    }

    // The token with the largest distance key, the lowest one of equals. Two turns of `partial` alternate, so one barrier
    // a call is enough: a warp can be one call ahead of another, never two.
    static BTP_DEVICE int farthest(const uint32_t (&distance)[kItems], int turn, Shared& shared)
    {
        uint32_t best = 0;
        uint32_t token = kNone;
#pragma unroll
        for (int item = 0; item < kItems; ++item) {
            if (distance[item] > best) {
                best = distance[item];
                token = static_cast<uint32_t>(element(item));
            }
        }
        uint32_t top = warp_max(best);
        uint32_t first = warp_min(best == top ? token : kNone);
        uint64_t* const partial = shared.partial[turn & 1];
        if (lane() == 0) {
            partial[warp()] = (static_cast<uint64_t>(top) << 32) | first;
        }
        __syncthreads();
        const uint64_t mine = lane() < kWarps ? partial[lane()] : static_cast<uint64_t>(kNone);
        const uint32_t key = static_cast<uint32_t>(mine >> 32);
        top = warp_max(key);
        first = warp_min(key == top ? static_cast<uint32_t>(mine) : kNone);
        return static_cast<int>(first);
    }

private:
    static BTP_DEVICE void merge(uint64_t& value, uint64_t other, int e, int size, int stride)
    {
        const bool want_larger = ((e & size) == 0) == ((e & stride) == 0);
        if ((other > value) == want_larger) {
            value = other;
        }
    }

    static BTP_DEVICE void merge_in_thread(uint64_t (&value)[kItems], int size, int items_apart)
    {
#pragma unroll
        for (int apart = kItems / 2; apart > 0; apart >>= 1) {
            if (apart != items_apart) {
                continue;  // register arrays want constant indices, hence the unrolled search for `apart`
            }
#pragma unroll
            for (int item = 0; item < kItems; ++item) {
                if ((item & apart) != 0) {
                    continue;
                }
                const uint64_t low = value[item];
                const uint64_t high = value[item + apart];
                const bool descending = (element(item) & size) == 0;
                if ((low < high) == descending) {
                    value[item] = high;
                    value[item + apart] = low;
                }
            }
        }
    }

    // Warp 0: exclusive prefix sums of the words' set bits.
    static BTP_DEVICE void count_before(Shared& shared)
    {
        uint32_t running = 0;
        for (int start = 0; start < kWords; start += 32) {
            const int word = start + lane();
            const uint32_t own = word < kWords ? static_cast<uint32_t>(__popc(shared.words[word])) : 0u;
            uint32_t sum = own;
            for (int offset = 1; offset < 32; offset <<= 1) {
                const uint32_t below = __shfl_up_sync(kAllLanes, sum, offset);
                sum += lane() >= offset ? below : 0u;
            }
            if (word < kWords) {
                shared.before[word] = running + sum - own;
            }
            running += __shfl_sync(kAllLanes, sum, 31);
        }
        if (lane() == 0) {
            shared.before[kWords] = running;
        }
    }
};

}  // namespace btp
