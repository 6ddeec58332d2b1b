// The products of all pairs of rows on the CPU, as the integers of the coverage rule. The matrix is symmetric: what lies
// below its diagonal is copied. A product is summed along the row in one chain, with products and sums joined where the
// processor can; like any matrix product it is not the same to the last bit on every machine.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../common/cpu_tiles.h"
#include "cpu_levels.h"

#if defined(__clang__)
#define BTP_JOINED _Pragma("clang fp contract(fast)")
#else
#define BTP_JOINED
#endif

namespace btp {

constexpr size_t kStripe = 32;  // columns that are multiplied together
constexpr size_t kTile = 8;     // rows that are; there are rows up to a multiple of it
static_assert(kStripe % kTile == 0, "a thread's unit rows (cpu_rows.h) end where the next one's begin");

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")
#endif

// products [R, kStripe] of rows [R,width] with columns [width, kStripe]: vectors of Bytes, two side by side.
template <size_t Bytes, size_t R>
BTP_INLINE void multiply_rows(const float* __restrict rows, size_t width, const float* __restrict columns,
                              float* __restrict products)
{
    BTP_JOINED
    typedef float Lanes __attribute__((vector_size(Bytes), aligned(4), may_alias));
    constexpr size_t kLanes = Bytes / 4;
    for (size_t first = 0; first < kStripe; first += 2 * kLanes) {
        Lanes sums[R][2] = {};
        for (size_t place = 0; place < width; ++place) {
            const float* const right = columns + place * kStripe + first;
            for (size_t row = 0; row < R; ++row) {
                const float left = rows[row * width + place];
                sums[row][0] += left * *reinterpret_cast<const Lanes*>(right);
                sums[row][1] += left * *reinterpret_cast<const Lanes*>(right + kLanes);
            }
        }
        for (size_t row = 0; row < R; ++row) {
            float* const result = products + row * kStripe + first;
            *reinterpret_cast<Lanes*>(result) = sums[row][0];
            *reinterpret_cast<Lanes*>(result + kLanes) = sums[row][1];
        }
    }
}

// levels [kTile, kStripe], `next` apart. As many rows at once as the processor has registers for.
template <size_t Bytes, size_t R>
BTP_INLINE void multiply_tile_body(int16_t* levels, size_t next, const float* rows, size_t width, const float* columns)
{
    float products[kTile * kStripe];
    for (size_t row = 0; row < kTile; row += R) {
        multiply_rows<Bytes, R>(rows + row * width, width, columns, products + row * kStripe);
    }
    for (size_t row = 0; row < kTile; ++row) {
        levels_of_body(levels + row * next, products + row * kStripe, static_cast<int>(kStripe));
    }
}

#ifdef BTP_X86
BTP_AVX512 inline void multiply_tile_avx512(int16_t* levels, size_t next, const float* rows, size_t width, const float* columns)
{
    multiply_tile_body<64, 8>(levels, next, rows, width, columns);
}
BTP_AVX2 inline void multiply_tile_avx2(int16_t* levels, size_t next, const float* rows, size_t width, const float* columns)
{
    multiply_tile_body<32, 4>(levels, next, rows, width, columns);
}
#endif
inline void multiply_tile_plain(int16_t* levels, size_t next, const float* rows, size_t width, const float* columns)
{
    multiply_tile_body<16, 4>(levels, next, rows, width, columns);
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

inline void multiply_tile(int16_t* levels, size_t next, const float* rows, size_t width, const float* columns)
{
#ifdef BTP_X86
    if (kInstructions == Instructions::avx512) {
        return multiply_tile_avx512(levels, next, rows, width, columns);
    }
    if (kInstructions == Instructions::avx2) {
        return multiply_tile_avx2(levels, next, rows, width, columns);
    }
#endif
    multiply_tile_plain(levels, next, rows, width, columns);
}

// The 4 x 4 levels at a row and a column -> the same at the mirrored place.
inline void mirror_block(int16_t* levels, size_t tokens, size_t row, size_t column)
{
    constexpr uint64_t kEven = 0x0000FFFF0000FFFF, kLow = 0xFFFFFFFF;
    uint64_t given[4], turned[4];
    for (size_t line = 0; line < 4; ++line) {
        std::memcpy(&given[line], levels + (row + line) * tokens + column, 8);
    }
    uint64_t even[2], odd[2];  // blocks of two by two are turned, then the blocks change places
    for (size_t pair = 0; pair < 2; ++pair) {
        const uint64_t above = given[2 * pair], below = given[2 * pair + 1];
        even[pair] = (above & kEven) | (below & kEven) << 16;
        odd[pair] = (above >> 16 & kEven) | (below & ~kEven);
    }
    turned[0] = (even[0] & kLow) | even[1] << 32;
    turned[1] = (odd[0] & kLow) | odd[1] << 32;
    turned[2] = even[0] >> 32 | (even[1] & ~kLow);
    turned[3] = odd[0] >> 32 | (odd[1] & ~kLow);
    for (size_t line = 0; line < 4; ++line) {
        std::memcpy(levels + (column + line) * tokens + row, &turned[line], 8);
    }
}

#ifdef BTP_X86
BTP_QUIET_INTRINSICS
// The same for 16 rows of 8 levels.
BTP_AVX512 inline void mirror_rows(int16_t* levels, size_t tokens, size_t row, size_t column)
{
    constexpr size_t kSide = 8;
    __m256i given[kSide], turned[kSide];
    for (size_t line = 0; line < kSide; ++line) {
        const int16_t* const from = levels + (row + line) * tokens + column;
        const __m128i upper = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        const __m128i lower = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + kSide * tokens));
        given[line] = _mm256_inserti128_si256(_mm256_castsi128_si256(upper), lower, 1);
    }
    for (size_t distance = 1; distance < kSide; distance *= 2) {  // line by line with the line half of them behind
        for (size_t line = 0; line < kSide / 2; ++line) {
            turned[2 * line] = _mm256_unpacklo_epi16(given[line], given[line + kSide / 2]);
            turned[2 * line + 1] = _mm256_unpackhi_epi16(given[line], given[line + kSide / 2]);
        }
        for (size_t line = 0; line < kSide; ++line) {
            given[line] = turned[line];
        }
    }
    for (size_t line = 0; line < kSide; ++line) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(levels + (column + line) * tokens + row), given[line]);
    }
}

// columns [16, kStripe] of 16 numbers of as many rows.
BTP_AVX512 inline void turn_vectors(const float* rows, size_t width, float* columns)
{
    for (size_t column = 0; column < kStripe; column += kVector) {
        turn(rows + column * width, width, columns + column, kStripe);
    }
}
BTP_QUIET_END
#endif

// columns [width, kStripe] of as many rows [count,width].
inline void turn_rows(const float* rows, size_t count, size_t width, float* columns)
{
    size_t place = 0;
#ifdef BTP_X86
    if (kInstructions == Instructions::avx512 && count == kStripe) {
        for (; place + kVector <= width; place += kVector) {
            turn_vectors(rows + place, width, columns + place * kStripe);
        }
    }
#endif
    for (; place < width; ++place) {
        for (size_t column = 0; column < count; ++column) {
            columns[place * kStripe + column] = rows[column * width + place];
        }
    }
}

// levels [V,V] at the columns from `start` on, a multiple of kStripe, down to the diagonal, and at what mirrors them.
// rows [V,width], padded to a multiple of kTile.
inline void multiply_stripe(int16_t* levels, const float* rows, int tokens, int width, size_t start)
{
    const size_t size = static_cast<size_t>(tokens), length = static_cast<size_t>(width);
    const size_t count = std::min(kStripe, size - start);
    std::vector<float> columns(length * kStripe);
    turn_rows(rows + start * length, count, length, columns.data());
    int16_t tile[kTile * kStripe];
    for (size_t row = 0; row < start + count; row += kTile) {
        if (count == kStripe && row + kTile <= size) {
            multiply_tile(levels + row * size + start, size, rows + row * length, length, columns.data());
            continue;
        }
        multiply_tile(tile, kStripe, rows + row * length, length, columns.data());
        for (size_t line = 0; line < std::min(kTile, size - row); ++line) {
            std::memcpy(levels + (row + line) * size + start, tile + line * kStripe, count * sizeof(int16_t));
        }
    }
    size_t column = 0;
#ifdef BTP_X86
    for (; kInstructions == Instructions::avx512 && column + 8 <= count; column += 8) {
        for (size_t row = 0; row < start; row += 16) {
            mirror_rows(levels, size, row, start + column);
        }
    }
#endif
    for (; column + 4 <= count; column += 4) {
        for (size_t row = 0; row < start; row += 4) {
            mirror_block(levels, size, row, start + column);
        }
    }
    for (; column < count; ++column) {
        for (size_t row = 0; row < start; ++row) {
            levels[(start + column) * size + row] = levels[row * size + start + column];
        }
    }
}

}  // namespace btp
