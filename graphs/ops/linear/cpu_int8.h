// BtpLinear on a CPU with few rows of x, rounded to int8: products of bytes, summed in 32 bits (AVX512-VNNI).
//
// Codes are read as they are stored, so nothing is packed when a session opens and all sessions share the file's pages.
// 64 bytes of a row of w are a block of 128 codes: their low nibbles are its even places, their high ones the odd ones,
// so x is stored with each block's even places before its odd ones. Sums of a block stay in 16 lanes, each of 8 places
// side by side: no group of 16 or more is split between lanes, and a lane is scaled by its group's scales.
#pragma once

#include "cpu_floats.h"

#ifdef BTP_X86
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

BTP_QUIET_INTRINSICS

namespace btp {

constexpr size_t kBlock = 128;  // places; K is a multiple of it
constexpr size_t kLanes = 16;
constexpr size_t kColumns = 4;  // N is a multiple of it
constexpr size_t kLeastGroup = 16;

// Rows of x in int8, with a scale for each group: (q - z) x s = q x s - z x s.
struct ByteRows {
    int8_t* bytes;    // [M,K], each block's even places first
    float* scales;    // [M,K/8]: by lane
    int32_t* less;    // [M,K/8]: less the sum of a lane's bytes, times 8 where that is what codes are less
};

struct Codes {
    const uint8_t* codes;  // [N,K/2]
    const void* scales;    // [N,K/group] float16 if halves, else float32
    bool halves;
    const uint8_t* zeros;  // [N,ceil(K/group/2)], null: 8
    size_t inputs, group;  // K
};

inline size_t byte_rows_size(size_t rows, size_t inputs) { return 2 * rows * inputs; }

inline ByteRows byte_rows(void* memory, size_t rows, size_t inputs)
{
    auto* const bytes = static_cast<int8_t*>(memory);
    auto* const scales = reinterpret_cast<float*>(bytes + rows * inputs);
    return {bytes, scales, reinterpret_cast<int32_t*>(scales + rows * inputs / 8)};
}

BTP_VNNI BTP_INLINE __m512i joined(__m256i a, __m256i b) { return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1); }

// Places whose bytes have one scale, in x and in w.
inline size_t span_of(const Codes& w) { return std::min(w.group, kBlock); }

// A block of x in bytes: its even places, then its odd ones.
struct Halves {
    __m512i even, odd;
};

// kBlock places of a row, with scales and less of each lane. The largest of a span becomes 127. T: float or uint16_t.
template <typename T>
BTP_VNNI BTP_INLINE Halves round_block(const T* x, const Codes& w, float* scales, int32_t* less)
{
    const size_t span = span_of(w);
    alignas(64) int8_t rounded[kBlock];
    for (size_t first = 0; first < kBlock; first += span) {
        __m512i most = _mm512_setzero_si512();  // as integers: floats without a sign have their order, NaN is the largest
        for (size_t place = first; place < first + span; place += kLanes) {
            const __m512 size = _mm512_abs_ps(floats_at(x + place));
            most = _mm512_max_epi32(most, _mm512_castps_si512(size));
        }
        const int32_t bits = _mm512_reduce_max_epi32(most);
        float largest;
        std::memcpy(&largest, &bits, sizeof largest);
        const __m512 by = _mm512_set1_ps(largest > 0.0f ? 127.0f / largest : 0.0f);
        for (size_t place = first; place < first + span; place += kLanes) {
            const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(floats_at(x + place), by));
            _mm_store_si128(reinterpret_cast<__m128i*>(rounded + place), _mm512_cvtsepi32_epi8(whole));
        }
        for (size_t lane = first / 8; lane < (first + span) / 8; ++lane) {
            scales[lane] = largest / 127.0f;
        }
    }
    const __m512i ones = _mm512_set1_epi8(1);
    const __m512i lower = _mm512_load_si512(rounded), upper = _mm512_load_si512(rounded + 64);
    const __m512i even = joined(_mm512_cvtepi16_epi8(lower), _mm512_cvtepi16_epi8(upper));
    const __m512i odd =
        joined(_mm512_cvtepi16_epi8(_mm512_srli_epi16(lower, 8)), _mm512_cvtepi16_epi8(_mm512_srli_epi16(upper, 8)));
    const __m512i total = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, even), ones, odd);
    const __m512i scaled = _mm512_slli_epi32(total, w.zeros == nullptr ? 3 : 0);
    _mm512_store_si512(less, _mm512_sub_epi32(_mm512_setzero_si512(), scaled));
    return {even, odd};
}

// One row of x.
template <typename T>
BTP_VNNI inline void round_row(const T* x, const Codes& w, int8_t* bytes, float* scales, int32_t* less)
{
    for (size_t block = 0; block < w.inputs; block += kBlock) {
        const Halves halves = round_block(x + block, w, scales + block / 8, less + block / 8);
        _mm512_store_si512(bytes + block, halves.even);
        _mm512_store_si512(bytes + block + 64, halves.odd);
    }
}

// A zero's upper 16 bits are 0, and 16 bits are enough for a sum of 128 bytes.
BTP_VNNI BTP_INLINE __m512i times_zeros(__m512i zeros, __m512i less)
{
    return _mm512_dpwssd_epi32(_mm512_setzero_si512(), zeros, less);
}

// What scales and zeros of a block are for each lane. some: which of 16 neighbouring groups are the block's.
BTP_VNNI BTP_INLINE __m512i places_of(size_t group)
{
    alignas(64) int32_t places[kLanes];
    for (size_t lane = 0; lane < kLanes; ++lane) {
        places[lane] = group < kBlock ? static_cast<int32_t>(8 * lane / group) : 0;
    }
    return _mm512_load_si512(places);
}

template <typename S>
BTP_VNNI BTP_INLINE __m512 block_scales(const Codes& w, size_t first, __m512i places, uint16_t some)
{
    return _mm512_permutexvar_ps(places, floats_at(static_cast<const S*>(w.scales) + first, some));
}

// shifts: 4 times a lane's place among the block's groups. count: of them, 1, 2, 4 or 8.
BTP_VNNI BTP_INLINE __m512i block_zeros(const uint8_t* row, size_t group, size_t count, __m512i shifts)
{
    const uint8_t* const stored = row + group / 2;
    uint32_t bits = *stored;
    if (count == 8) {
        std::memcpy(&bits, stored, 4);
    } else if (count == 4) {
        bits |= static_cast<uint32_t>(stored[1]) << 8;
    } else if (count == 1) {
        bits >>= 4 * (group % 2);
    }
    const __m512i own = _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int32_t>(bits)), shifts);
    return _mm512_and_si512(own, _mm512_set1_epi32(15));
}

// Begins to fetch what is read one tile later: 2 KiB and more, which the processor would not foresee at the end of a column.
BTP_INLINE void ask_for(const void* stored) { _mm_prefetch(static_cast<const char*>(stored), _MM_HINT_T0); }

// y [M rows, N columns], `next` apart, of rows from `row` on and columns from `column` on. T: of bias and y, S: of scales.
template <int M, int N, bool Zeros, typename S, typename T>
BTP_VNNI BTP_INLINE void multiply_bytes(const ByteRows& x, size_t row, const Codes& w, size_t column, const T* bias, T* y,
                                        size_t next)
{
    const size_t inputs = w.inputs, groups = inputs / w.group, step = w.group < kBlock ? kBlock / w.group : 1;
    const int twice = w.group > kBlock ? 1 : 0;  // 256: two blocks have one group
    const int8_t* const bytes = x.bytes + row * inputs;
    const float* const row_scales = x.scales + row * inputs / 8;
    const int32_t* const less = x.less + row * inputs / 8;
    const uint8_t* const codes = w.codes + column * inputs / 2;
    const __m512i low = _mm512_set1_epi8(15), places = places_of(w.group), shifts = _mm512_slli_epi32(places, 2);
    const auto some = static_cast<uint16_t>((1u << step) - 1);
    __m512 sums[N][M];
    for (int n = 0; n < N; ++n) {
        for (int m = 0; m < M; ++m) {
            sums[n][m] = _mm512_setzero_ps();
        }
    }
    for (size_t block = 0; block < inputs / kBlock; ++block) {
        const size_t group = (block >> twice) * step;
        for (int n = 0; n < N; ++n) {
            const size_t own = column + static_cast<size_t>(n);
            const uint8_t* const stored = codes + static_cast<size_t>(n) * inputs / 2 + block * kBlock / 2;
            const __m512i both = _mm512_loadu_si512(stored);
            ask_for(stored + N * inputs / 2);
            ask_for(static_cast<const S*>(w.scales) + (own + N) * groups + group);
            const __m512i even = _mm512_and_si512(both, low);
            const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
            const __m512 scales = block_scales<S>(w, own * groups + group, places, some);
            const __m512i zeros =
                Zeros ? block_zeros(w.zeros + own * ((groups + 1) / 2), group, step, shifts) : _mm512_setzero_si512();
            for (int m = 0; m < M; ++m) {
                const size_t place = static_cast<size_t>(m) * inputs + block * kBlock;
                __m512i total = _mm512_load_si512(less + place / 8);
                total = Zeros ? times_zeros(zeros, total) : total;
                total = _mm512_dpbusd_epi32(total, even, _mm512_load_si512(bytes + place));
                total = _mm512_dpbusd_epi32(total, odd, _mm512_load_si512(bytes + place + 64));
                const __m512 scale = _mm512_mul_ps(scales, _mm512_load_ps(row_scales + place / 8));
                sums[n][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scale, sums[n][m]);
            }
        }
    }
    for (int n = 0; n < N; ++n) {
        for (int m = 0; m < M; ++m) {
            const size_t own = column + static_cast<size_t>(n);
            const float sum = _mm512_reduce_add_ps(sums[n][m]);
            T* const to = y + (row + static_cast<size_t>(m)) * next + own;
            put_float(to, bias != nullptr ? sum + float_at(bias + own) : sum);
        }
    }
}

// One row: columns are read as they lie in memory, one after the other, as long as x stays near.
template <bool Zeros, typename S, typename T>
BTP_VNNI inline void multiply_row_of_bytes(const ByteRows& x, size_t row, const Codes& w, const T* bias, T* y, size_t next,
                                           size_t first, size_t last)
{
    if (stays_near(byte_rows_size(1, w.inputs))) {
        for (size_t column = first; column < last; ++column) {
            multiply_bytes<1, 1, Zeros, S>(x, row, w, column, bias, y, next);
        }
        return;
    }
    for (size_t column = first; column < last; column += 4) {
        multiply_bytes<1, 4, Zeros, S>(x, row, w, column, bias, y, next);
    }
}

// M rows.
template <int M, bool Zeros, typename S, typename T>
BTP_VNNI inline void multiply_rows_of_bytes(const ByteRows& x, size_t row, const Codes& w, const T* bias, T* y, size_t next,
                                            size_t first, size_t last)
{
    for (size_t column = first; column < last; column += 4) {
        multiply_bytes<M, 4, Zeros, S>(x, row, w, column, bias, y, next);
    }
}

// Columns [first, last) of y [M,N], multiples of kColumns. The order of a sum is the same however many rows there are.
template <bool Zeros, typename S, typename T>
BTP_VNNI inline void multiply_columns(const ByteRows& x, size_t rows, const Codes& w, const T* bias, T* y, size_t next,
                                      size_t first, size_t last)
{
    size_t row = 0;
    for (; row + 4 <= rows; row += 4) {
        multiply_rows_of_bytes<4, Zeros, S>(x, row, w, bias, y, next, first, last);
    }
    switch (rows - row) {
    case 1: return multiply_row_of_bytes<Zeros, S>(x, row, w, bias, y, next, first, last);
    case 2: return multiply_rows_of_bytes<2, Zeros, S>(x, row, w, bias, y, next, first, last);
    case 3: return multiply_rows_of_bytes<3, Zeros, S>(x, row, w, bias, y, next, first, last);
    default: return;
    }
}

}  // namespace btp

BTP_QUIET_END
#endif
