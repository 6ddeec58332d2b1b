// What a decoder layer does with a row between its products, on the CPU (AVX-512).
#pragma once

#include "../common/cpu_exponential.h"

#ifdef BTP_X86
#include <cmath>
#include <cstddef>

BTP_QUIET_INTRINSICS

namespace btp {

// to = row / sqrt(mean of its squares + epsilon) x weights.
BTP_AVX512 inline void normalise_row(float* to, const float* row, const float* weights, size_t width, float epsilon)
{
    __m512 chain = _mm512_setzero_ps();
    for (size_t place = 0; place < width; place += 16) {
        const auto some = static_cast<__mmask16>(place + 16 <= width ? 0xffff : (1u << (width - place)) - 1);
        const __m512 values = _mm512_maskz_loadu_ps(some, row + place);
        chain = _mm512_fmadd_ps(values, values, chain);
    }
    const float factor = 1.0f / std::sqrt(_mm512_reduce_add_ps(chain) / static_cast<float>(width) + epsilon);
    for (size_t place = 0; place < width; ++place) {
        to[place] = row[place] * factor * weights[place];
    }
}

// to = one + other, which may be the same memory.
BTP_AVX512 inline void add_rows(float* to, const float* one, const float* other, size_t width)
{
    for (size_t place = 0; place < width; ++place) {
        to[place] = one[place] + other[place];
    }
}

// gate = gate / (1 + e^-gate) x up, for rows of 32 numbers so far apart.
BTP_AVX512 inline void gate_panel(float* gate, size_t next, const float* up, size_t rows)
{
    const __m512 one = _mm512_set1_ps(1.0f), two = _mm512_set1_ps(2.0f);
    for (size_t row = 0; row < rows; ++row, gate += next, up += 32) {
        for (size_t place = 0; place < 32; place += 16) {
            const __m512 value = _mm512_load_ps(gate + place);
            const __m512 below = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), value)));
            // A division takes as long as all the rest: half of its bits from a table, the others by one step of Newton's.
            const __m512 about = _mm512_rcp14_ps(below);
            const __m512 inverse = _mm512_mul_ps(about, _mm512_fnmadd_ps(below, about, two));
            _mm512_store_ps(gate + place, _mm512_mul_ps(_mm512_mul_ps(value, inverse), _mm512_load_ps(up + place)));
        }
    }
}

// The two halves of each head are the coordinates that are rotated. cos, sin: half a head.
BTP_AVX512 inline void rotate_row(float* row, size_t heads, size_t half, const float* cos, const float* sin)
{
    for (size_t head = 0; head < heads; ++head, row += 2 * half) {
        for (size_t place = 0; place < half; ++place) {
            const float first = row[place], second = row[place + half];
            row[place] = first * cos[place] - second * sin[place];
            row[place + half] = second * cos[place] + first * sin[place];
        }
    }
}

}  // namespace btp

BTP_QUIET_END
#endif
