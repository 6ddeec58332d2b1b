// What tokens weigh when one of them is drawn, in whole numbers: loops over logits for several instruction sets.
//
// A token weighs trunc(2^30 * 2^y) with y = (logit - largest) * scale, at least -31, where the power is a polynomial whose
// products and sums are each rounded once. So this must be compiled with -ffp-contract=off: then weights are the same on
// every processor, and the same as btp_export/running/sampling.py computes with numpy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../../graphs/ops/common/cpu_loops.h"

namespace btp {

constexpr size_t kChunk = 64;  // logits that are looked at together

template <size_t Bytes>
struct Vectors {
    typedef float Floats __attribute__((vector_size(Bytes)));
    typedef int32_t Ints __attribute__((vector_size(Bytes)));
    typedef uint64_t Longs __attribute__((vector_size(Bytes)));
    static constexpr size_t kLanes = Bytes / 4;

    static BTP_INLINE void read(const float* from, Floats& lanes) { std::memcpy(&lanes, from, Bytes); }
};

// maxima [chunks] of logits [chunks, kChunk], and whether a logit is NaN, which maxima need not show.
template <size_t Bytes>
BTP_INLINE bool find_maxima_body(const float* logits, size_t chunks, float* maxima)
{
    using V = Vectors<Bytes>;
    typename V::Ints nan = {};
    for (size_t chunk = 0; chunk < chunks; ++chunk, logits += kChunk) {
        typename V::Floats most, next;
        V::read(logits, most);
        nan |= most != most;
        for (size_t i = V::kLanes; i < kChunk; i += V::kLanes) {
            V::read(logits + i, next);
            nan |= next != next;
            most = most > next ? most : next;
        }
        float lanes[V::kLanes];
        std::memcpy(lanes, &most, Bytes);
        for (size_t half = V::kLanes / 2; half > 0; half /= 2) {
            for (size_t i = 0; i < half; ++i) {
                lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
            }
        }
        maxima[chunk] = lanes[0];
    }
    int32_t lanes[V::kLanes], any = 0;
    std::memcpy(lanes, &nan, Bytes);
    for (const int32_t lane : lanes) {
        any |= lane;
    }
    return any != 0;
}

// Vectors are given by reference: of their values in registers GCC says that libraries differ, which have none of these.
// weights: from 0 to 2^30. The polynomial is 2^30 * 2^f for f from -1/2 to 1/2, within 2e-7 of it.
template <size_t Bytes>
BTP_INLINE void weigh_lanes(const float* logits, float largest, float scale, typename Vectors<Bytes>::Ints& weights)
{
    using Floats = typename Vectors<Bytes>::Floats;
    using Ints = typename Vectors<Bytes>::Ints;
    Floats y;
    const Floats lowest = Floats{} - 31.0f;
    Vectors<Bytes>::read(logits, y);
    y = (y - largest) * scale;
    y = y > lowest ? y : lowest;
    const Floats shifted = y + 12582912.0f;  // 1.5 * 2^23: its last bits are y rounded to a whole number, halves to even
    const Floats f = y - (shifted - 12582912.0f);
    Floats power = f * 0x1.5bba14p+20f + 0x1.3cea88p+23f;
    power = power * f + 0x1.c6b752p+25f;
    power = power * f + 0x1.ebf9bcp+27f;
    power = power * f + 0x1.62e42ap+29f;
    power = power * f + 0x1p+30f;
    const Ints bits = reinterpret_cast<Ints>(power) + (reinterpret_cast<Ints>(shifted) << 23);  // the exponent's are added
    weights = __builtin_convertvector(reinterpret_cast<Floats>(bits), Ints);
}

// weights [kChunk] of logits [kChunk].
template <size_t Bytes>
BTP_INLINE void weigh_chunk_body(const float* logits, float largest, float scale, uint32_t* weights)
{
    for (size_t i = 0; i < kChunk; i += Vectors<Bytes>::kLanes) {
        typename Vectors<Bytes>::Ints lanes;
        weigh_lanes<Bytes>(logits + i, largest, scale, lanes);
        std::memcpy(weights + i, &lanes, Bytes);
    }
}

// sums [chunks] of the weights of logits [chunks, kChunk], for those chunks whose sum is 0 so far and whose heaviest token
// may weigh `least`.
template <size_t Bytes>
BTP_INLINE void sum_chunks_body(const float* logits, size_t chunks, float largest, float scale, const uint32_t* heaviest,
                                uint32_t least, uint64_t* sums)
{
    using V = Vectors<Bytes>;
    for (size_t chunk = 0; chunk < chunks; ++chunk, logits += kChunk) {
        if (heaviest[chunk] < least || sums[chunk] != 0) {
            continue;
        }
        typename V::Ints weights, next;
        typename V::Longs pairs = {};
        for (size_t i = 0; i < kChunk; i += 2 * V::kLanes) {
            weigh_lanes<Bytes>(logits + i, largest, scale, weights);
            weigh_lanes<Bytes>(logits + i + V::kLanes, largest, scale, next);
            const typename V::Longs two = reinterpret_cast<typename V::Longs>(weights + next);
            pairs += (two & 0xFFFFFFFFu) + (two >> 32);
        }
        uint64_t lanes[V::kLanes / 2], sum = 0;
        std::memcpy(lanes, &pairs, Bytes);
        for (const uint64_t lane : lanes) {
            sum += lane;
        }
        sums[chunk] = sum;
    }
}

// GCC 12 compares vectors of 512 bits for NaN number by number, so maxima are found in halves.
#ifdef BTP_X86
#define BTP_FOR_VECTORS(result, name, wide, parameters, arguments)                              \
    BTP_AVX512 inline result name##_avx512 parameters { return name##_body<wide> arguments; }   \
    BTP_AVX2 inline result name##_avx2 parameters { return name##_body<32> arguments; }         \
    inline result name parameters                                                               \
    {                                                                                           \
        return kInstructions == Instructions::avx512 ? name##_avx512 arguments                  \
               : kInstructions == Instructions::avx2 ? name##_avx2 arguments                    \
                                                     : name##_body<16> arguments;               \
    }
#else
#define BTP_FOR_VECTORS(result, name, wide, parameters, arguments) \
    inline result name parameters { return name##_body<16> arguments; }
#endif

BTP_FOR_VECTORS(bool, find_maxima, 32, (const float* logits, size_t chunks, float* maxima), (logits, chunks, maxima))
BTP_FOR_VECTORS(void, weigh_chunk, 64, (const float* logits, float largest, float scale, uint32_t* weights),
                (logits, largest, scale, weights))
BTP_FOR_VECTORS(void, sum_chunks, 64,
                (const float* logits, size_t chunks, float largest, float scale, const uint32_t* heaviest, uint32_t least,
                 uint64_t* sums),
                (logits, chunks, largest, scale, heaviest, least, sums))

// Which of weights [kChunk] are at least `least`: bits.
BTP_INLINE uint64_t at_least_body(const uint32_t* weights, uint32_t least)
{
    uint8_t reached[kChunk];
    for (size_t i = 0; i < kChunk; ++i) {
        reached[i] = static_cast<int32_t>(weights[i]) >= static_cast<int32_t>(least) ? 1 : 0;
    }
    uint64_t bits = 0;
    for (size_t i = 0; i < kChunk; i += 8) {  // eight bytes of 0 or 1 become the eight highest bits of a product
        uint64_t eight;
        std::memcpy(&eight, reached + i, 8);
        bits |= (eight * 0x0102040810204080u >> 56) << i;
    }
    return bits;
}
BTP_FOR_PROCESSORS(uint64_t, at_least, (const uint32_t* weights, uint32_t least), (weights, least))

// The sum of those of weights [count] that are at least `least`.
BTP_INLINE uint64_t sum_from_body(const uint32_t* weights, size_t count, uint32_t least)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < count; ++i) {
        sum += static_cast<int32_t>(weights[i]) >= static_cast<int32_t>(least) ? weights[i] : 0;
    }
    return sum;
}
BTP_FOR_PROCESSORS(uint64_t, sum_from, (const uint32_t* weights, size_t count, uint32_t least), (weights, count, least))

}  // namespace btp
