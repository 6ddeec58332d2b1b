// Products of float32 matrices in tiles of at most 12 rows and 32 columns (AVX-512), and laying matrices out for them.
//
// A tile's 24 sums stay in registers; its rows are read one number at a time from a panel [depth, rows], its columns as
// vectors from a panel [depth, 32]. So a step of the depth is 24 fused products for 14 reads, of which two come from the
// first cache if the panel of columns fits it. A sum is one chain over the depth, whatever tile it is in: it does not depend
// on how many rows there are or which thread computes it.
#pragma once

#include "cpu_loops.h"

#ifdef BTP_X86
#include <algorithm>
#include <cstddef>

// Early enough for sums to become registers.
#if defined(__clang__)
#define BTP_UNROLLED _Pragma("clang loop unroll(full)")
#else
#define BTP_UNROLLED _Pragma("GCC unroll 16")
#endif
BTP_QUIET_INTRINSICS

namespace btp {

constexpr size_t kTileRows = 12;
constexpr size_t kTileColumns = 32;
constexpr size_t kVector = 16;
constexpr size_t kAhead = 32;  // steps of the depth that rows are fetched before they are read

// Rows of a stored matrix, `apart` numbers apart, that come near a few at a time while a tile is computed: 16 numbers of each
// for 16 steps of the depth. All of them at once would fill the places for lines that are on their way, and the tile would wait.
struct Coming {
    const float* first = nullptr;
    size_t apart = 0;
    size_t count = 0;
};

// What a tile is computed from, and where it goes.
struct Tile {
    const float* rows;     // [depth, M]
    const float* columns;  // [depth, 32], 64 bytes aligned
    size_t depth;          // at least 1
    const float* before;   // [M, 32], what is added; null: nothing
    float* to;             // [M, 32], rows `next` apart
    size_t next;
    Coming coming = {};
};

template <int M>
BTP_AVX512 inline void multiply_tile(const Tile& t)
{
    __m512 sums[M][2];
    float* const to = t.to;
    const float *rows = t.rows, *columns = t.columns;
    const size_t next = t.next;
    BTP_UNROLLED for (int m = 0; m < M; ++m) {
        sums[m][0] = sums[m][1] = _mm512_setzero_ps();
        _mm_prefetch(reinterpret_cast<const char*>(to + static_cast<size_t>(m) * next), _MM_HINT_T0);
    }
    Coming coming = t.coming;
    size_t left = t.depth;
    do {
        if (coming.count != 0 && left % kVector == 0) {
            for (size_t row = 0; row < coming.count; ++row) {
                _mm_prefetch(reinterpret_cast<const char*>(coming.first + row * coming.apart), _MM_HINT_T0);
            }
            coming.first += kVector;
        }
        const __m512 lower = _mm512_load_ps(columns), upper = _mm512_load_ps(columns + kVector);
        _mm_prefetch(reinterpret_cast<const char*>(rows + kAhead * M), _MM_HINT_T0);
        BTP_UNROLLED for (int m = 0; m < M; ++m) {
            const __m512 row = _mm512_set1_ps(rows[m]);
            sums[m][0] = _mm512_fmadd_ps(row, lower, sums[m][0]);
            sums[m][1] = _mm512_fmadd_ps(row, upper, sums[m][1]);
        }
        rows += M;
        columns += kTileColumns;
    } while (--left != 0);
    if (t.before != nullptr) {
        const float* const before = t.before;
        BTP_UNROLLED for (int m = 0; m < M; ++m) {
            const float* const own = before + static_cast<size_t>(m) * kTileColumns;
            sums[m][0] = _mm512_add_ps(_mm512_loadu_ps(own), sums[m][0]);
            sums[m][1] = _mm512_add_ps(_mm512_loadu_ps(own + kVector), sums[m][1]);
        }
    }
    BTP_UNROLLED for (int m = 0; m < M; ++m) {
        float* const own = to + static_cast<size_t>(m) * next;
        _mm512_storeu_ps(own, sums[m][0]);
        _mm512_storeu_ps(own + kVector, sums[m][1]);
    }
}

using TileFunction = void (*)(const Tile&);
inline constexpr TileFunction kTiles[kTileRows] = {
    multiply_tile<1>, multiply_tile<2>, multiply_tile<3>, multiply_tile<4>,  multiply_tile<5>,  multiply_tile<6>,
    multiply_tile<7>, multiply_tile<8>, multiply_tile<9>, multiply_tile<10>, multiply_tile<11>, multiply_tile<12>};

inline void multiply_tile(size_t rows, const Tile& tile) { kTiles[rows - 1](tile); }

// Rows in as few panels of at most 12 as hold them, all of nearly the same height: a last panel of few rows takes
// longer for each.
struct RowPanels {
    explicit RowPanels(size_t rows)
        : count((rows + kTileRows - 1) / kTileRows), least(count == 0 ? 0 : rows / count), more(count == 0 ? 0 : rows % count)
    {
    }
    size_t first(size_t panel) const { return panel * least + std::min(panel, more); }
    size_t height(size_t panel) const { return least + (panel < more ? 1 : 0); }

    size_t count, least, more;
};

// 16 rows of 16 numbers, `next` apart, turned: row k of the result has number k of every row. Its rows are `apart` apart.
BTP_AVX512 BTP_INLINE void turn(const float* from, size_t next, float* to, size_t apart)
{
    for (size_t part = 0; part < kVector; part += 4) {
        __m512 mixed[4];
        for (size_t i = 0; i < 4; ++i) {
            const float* const row = from + i * next + part;
            __m512 four = _mm512_castps128_ps512(_mm_loadu_ps(row));
            four = _mm512_insertf32x4(four, _mm_loadu_ps(row + 4 * next), 1);
            four = _mm512_insertf32x4(four, _mm_loadu_ps(row + 8 * next), 2);
            mixed[i] = _mm512_insertf32x4(four, _mm_loadu_ps(row + 12 * next), 3);
        }
        const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(mixed[0], mixed[1]));
        const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(mixed[0], mixed[1]));
        const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(mixed[2], mixed[3]));
        const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(mixed[2], mixed[3]));
        float* const own = to + part * apart;
        _mm512_storeu_ps(own, _mm512_castpd_ps(_mm512_unpacklo_pd(a, c)));
        _mm512_storeu_ps(own + apart, _mm512_castpd_ps(_mm512_unpackhi_pd(a, c)));
        _mm512_storeu_ps(own + 2 * apart, _mm512_castpd_ps(_mm512_unpacklo_pd(b, d)));
        _mm512_storeu_ps(own + 3 * apart, _mm512_castpd_ps(_mm512_unpackhi_pd(b, d)));
    }
}

// A panel [depth, height] of rows [height, depth] that are `next` apart. depth: a multiple of 16; height: at most 16.
BTP_AVX512 inline void lay_out_rows(const float* rows, size_t next, size_t height, size_t depth, float* panel)
{
    alignas(64) float some[kVector * kVector] = {}, turned[kVector * kVector];
    const auto wanted = static_cast<__mmask16>((1u << height) - 1);
    for (size_t place = 0; place < depth; place += kVector) {
        for (size_t row = 0; row < height; ++row) {
            _mm512_store_ps(some + row * kVector, _mm512_loadu_ps(rows + row * next + place));
        }
        turn(some, kVector, turned, kVector);
        for (size_t step = 0; step < kVector; ++step) {
            _mm512_mask_storeu_ps(panel + (place + step) * height, wanted, _mm512_load_ps(turned + step * kVector));
        }
    }
}

}  // namespace btp

BTP_QUIET_END
#endif
