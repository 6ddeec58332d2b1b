// Products of few rows of float32 or float16 with float16 weights as they are stored, summed in float32 (AVX-512). A new token
// reads every weight once, so its time is that of reading: half of what the same weights take in float32, and no copy of
// them is made.
#pragma once

#include "cpu_floats.h"

#ifdef BTP_X86
#include <cstddef>
#include <cstdint>

BTP_QUIET_INTRINSICS

namespace btp {

// y [M, N columns], `next` apart. x [M,K], weights [N,K]. T: float or uint16_t, of x and y. A sum has 16 chains, whatever M
// and N are.
template <int M, int N, typename T>
BTP_AVX512 BTP_INLINE void multiply_halves(const T* x, size_t inputs, const uint16_t* weights, T* y, size_t next)
{
    constexpr size_t kTogether = 16;
    __m512 sums[M][N];
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) {
            sums[m][n] = _mm512_setzero_ps();
        }
    }
    for (size_t place = 0; place < inputs; place += kTogether) {
        const bool whole = place + kTogether <= inputs;
        const auto some = static_cast<__mmask16>(whole ? 0xffff : (1u << (inputs - place)) - 1);
        __m512 w[N];
        for (int n = 0; n < N; ++n) {
            w[n] = floats_at(weights + static_cast<size_t>(n) * inputs + place, some);
        }
        for (int m = 0; m < M; ++m) {
            const __m512 given = floats_at(x + static_cast<size_t>(m) * inputs + place, some);
            for (int n = 0; n < N; ++n) {
                sums[m][n] = _mm512_fmadd_ps(given, w[n], sums[m][n]);
            }
        }
    }
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) {
            put_float(y + static_cast<size_t>(m) * next + static_cast<size_t>(n), _mm512_reduce_add_ps(sums[m][n]));
        }
    }
}

template <int M, typename T>
BTP_AVX512 inline void multiply_half_rows(const T* x, size_t inputs, const uint16_t* weights, size_t columns, T* y,
                                          size_t next)
{
    size_t column = 0;
    for (; column + 4 <= columns; column += 4) {
        multiply_halves<M, 4>(x, inputs, weights + column * inputs, y + column, next);
    }
    for (; column < columns; ++column) {
        multiply_halves<M, 1>(x, inputs, weights + column * inputs, y + column, next);
    }
}

// Columns of y [rows,N] from y on. weights [columns,K].
template <typename T>
void multiply_half_columns(const T* x, size_t rows, size_t inputs, const uint16_t* weights, size_t columns, T* y,
                           size_t next)
{
    size_t row = 0;
    for (; row + 4 <= rows; row += 4) {
        multiply_half_rows<4>(x + row * inputs, inputs, weights, columns, y + row * next, next);
    }
    for (; row < rows; ++row) {
        multiply_half_rows<1>(x + row * inputs, inputs, weights, columns, y + row * next, next);
    }
}

}  // namespace btp

BTP_QUIET_END
#endif
