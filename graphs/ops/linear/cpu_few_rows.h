// Products of few rows with weights as they are stored, both float32 or float16, summed in float32 (AVX-512). A new token
// reads every weight once, so its time is that of reading: for float16 half of what the same weights take in float32. No
// copy of them is made.
#pragma once

#include "cpu_floats.h"

#ifdef BTP_X86
#include <algorithm>
#include <cstddef>
#include <cstdint>

BTP_QUIET_INTRINSICS

namespace btp {

// y [M, N columns], `next` apart. x [M,K], weights [N,K]. T: float or uint16_t, of x and y; W: of weights. A sum has 16
// chains, whatever M and N are.
template <int M, int N, typename T, typename W>
BTP_AVX512 BTP_INLINE void multiply_few(const T* x, size_t inputs, const W* weights, T* y, size_t next)
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

// M rows, N columns at a time.
template <int M, int N, typename T, typename W>
BTP_AVX512 inline void multiply_few_rows(const T* x, size_t inputs, const W* weights, size_t columns, T* y, size_t next)
{
    size_t column = 0;
    for (; column + N <= columns; column += N) {
        multiply_few<M, N>(x, inputs, weights + column * inputs, y + column, next);
    }
    for (; column < columns; ++column) {
        multiply_few<M, 1>(x, inputs, weights + column * inputs, y + column, next);
    }
}

// One row. Weights come fastest when they are read as they lie in memory, column after column, as long as x stays near.
template <typename T, typename W>
BTP_AVX512 inline void multiply_row(const T* x, size_t inputs, const W* weights, size_t columns, T* y, size_t next)
{
    constexpr int kSome = sizeof(W) == 2 ? 8 : 4;
    stays_near(inputs * sizeof(T)) ? multiply_few_rows<1, 1>(x, inputs, weights, columns, y, next)
                                   : multiply_few_rows<1, kSome>(x, inputs, weights, columns, y, next);
}

// All rows with columns that stay in the second cache, four at a time.
template <typename T, typename W>
void multiply_kept_columns(const T* x, size_t rows, size_t inputs, const W* weights, size_t columns, T* y, size_t next)
{
    for (; rows >= 4; rows -= 4, x += 4 * inputs, y += 4 * next) {
        multiply_few_rows<4, 4>(x, inputs, weights, columns, y, next);
    }
    switch (rows) {
    case 1: return multiply_row(x, inputs, weights, columns, y, next);
    case 2: return multiply_few_rows<2, 4>(x, inputs, weights, columns, y, next);
    case 3: return multiply_few_rows<3, 4>(x, inputs, weights, columns, y, next);
    default: return;
    }
}

// Columns of y [rows,N] from y on. weights [columns,K].
template <typename T, typename W>
void multiply_few_columns(const T* x, size_t rows, size_t inputs, const W* weights, size_t columns, T* y, size_t next)
{
    constexpr size_t kKept = 262144;  // bytes of weights
    const size_t some = rows <= 4 ? columns : std::max(kKept / (inputs * sizeof(W)) / 8 * 8, size_t{8});
    for (size_t column = 0; column < columns; column += some) {
        multiply_kept_columns(x, rows, inputs, weights + column * inputs, std::min(some, columns - column), y + column, next);
    }
}

}  // namespace btp

BTP_QUIET_END
#endif
