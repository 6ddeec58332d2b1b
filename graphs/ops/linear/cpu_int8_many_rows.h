// BtpLinear on a CPU with many rows of x rounded to int8 (AVX512-VNNI): 16 columns of w in the lanes of a register.
//
// Codes are laid out for the tiles while they are multiplied, 16 columns and 512 places at a time, and forgotten: nothing is
// packed when a session opens. A lane then has one column, so a sum of bytes is scaled once for each group of places; with
// places in the lanes (cpu_int8.h, which reads a row of w as it is stored) it is scaled for every 8 of them.
#pragma once

#include "../common/cpu_tiles.h"
#include "cpu_int8.h"

#ifdef BTP_X86
BTP_QUIET_INTRINSICS

namespace btp {

constexpr size_t kPlaces = 512;                   // of K: codes of 16 columns, a byte each, fill a quarter of the first cache
constexpr size_t kSpans = kPlaces / kLeastGroup;  // at most: places whose bytes have one scale, of x and of w
constexpr size_t kByteRows = 768;                 // at most: they and their sums stay in the second cache
constexpr size_t kByteColumns = 64;               // whose sums stay there

// kPlaces of a row of x. Of each 8 places the 4 even ones come first.
struct RowPart {
    int8_t bytes[kPlaces];
    float scales[kSpans];
    int32_t less[kSpans];  // less the sum of a span's bytes, times 8 where that is what codes are less
};

// kPlaces of 16 columns of w, a register of codes for every 4 places: as in a row, even ones and odd ones of each 8.
struct ColumnPart {
    uint8_t codes[kPlaces * kLanes];
    float scales[kSpans][kLanes];
    int32_t zeros[kSpans][kLanes];
};

constexpr size_t parts_of(size_t inputs) { return (inputs + kPlaces - 1) / kPlaces; }

// Row `row` of `rows`, rounded, into parts [parts_of(K), rows].
template <typename T>
BTP_VNNI inline void lay_out_row(const T* x, const Codes& w, RowPart* parts, size_t rows, size_t row)
{
    // Words of a block as they are multiplied: one of the even places, one of the odd ones.
    const __m512i lower = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
    const size_t span = span_of(w), lanes = span / 8;
    for (size_t block = 0; block < w.inputs; block += kBlock) {
        RowPart& part = parts[block / kPlaces * rows + row];
        const size_t place = block % kPlaces;
        alignas(64) float scales[kLanes];
        alignas(64) int32_t less[kLanes];
        const Halves halves = round_block(x + block, w, scales, less);
        _mm512_storeu_si512(part.bytes + place, _mm512_permutex2var_epi32(halves.even, lower, halves.odd));
        _mm512_storeu_si512(part.bytes + place + 64, _mm512_permutex2var_epi32(halves.even, upper, halves.odd));
        for (size_t lane = 0; lane < kLanes; lane += lanes) {
            const size_t own = (place + lane * 8) / span;
            part.scales[own] = scales[lane];
            part.less[own] = 0;
            for (size_t some = 0; some < lanes; ++some) {
                part.less[own] += less[lane + some];
            }
        }
    }
}

// `count` numbers of four bits, at most 16, from an even one on.
BTP_VNNI BTP_INLINE __m512i nibbles_at(const uint8_t* stored, size_t first, size_t count)
{
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const auto some = static_cast<__mmask16>((1u << (count + 1) / 2) - 1);
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, stored + first / 2));
    const __m512i own = _mm512_permutexvar_epi32(_mm512_srli_epi32(lanes, 1), bytes);
    const __m512i odd = _mm512_and_si512(lanes, _mm512_set1_epi32(1));
    return _mm512_and_si512(_mm512_srlv_epi32(own, _mm512_slli_epi32(odd, 2)), _mm512_set1_epi32(15));
}

// 16 words of each of `count` columns, `next` bytes apart, turned: row k of `to` has word k of every column, or 0.
BTP_VNNI BTP_INLINE void turn_columns(const void* words, size_t next, size_t count, float* to)
{
    if (count == kLanes) {
        return turn(static_cast<const float*>(words), next / sizeof(float), to, kLanes);
    }
    alignas(64) float all[kLanes * kLanes] = {};
    for (size_t n = 0; n < count; ++n) {
        std::memcpy(all + n * kLanes, static_cast<const uint8_t*>(words) + n * next, kLanes * sizeof(float));
    }
    turn(all, kLanes, to, kLanes);
}

// Codes [depth/8, even and odd, 16 columns, 4] of `count` columns from `codes` on, which are `next` bytes apart.
BTP_VNNI inline void lay_out_codes(const uint8_t* codes, size_t next, size_t count, size_t depth, uint8_t* to)
{
    const __m512i low = _mm512_set1_epi8(15);
    alignas(64) float turned[kLanes * kLanes];
    for (size_t place = 0; place < depth; place += kBlock) {
        turn_columns(codes + place / 2, next, count, turned);
        for (size_t word = 0; word < kLanes; ++word, to += 128) {
            const __m512i both = _mm512_load_si512(turned + word * kLanes);
            _mm512_store_si512(to, _mm512_and_si512(both, low));
            _mm512_store_si512(to + 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
        }
    }
}

// kPlaces of K from `place` on of `count` columns from `column` on; the other lanes are zeros. S: of scales.
template <bool Zeros, typename S>
BTP_VNNI inline void lay_out_columns(const Codes& w, size_t column, size_t count, size_t place, ColumnPart& to)
{
    const size_t depth = std::min(kPlaces, w.inputs - place), span = span_of(w), groups = w.inputs / w.group;
    lay_out_codes(w.codes + column * w.inputs / 2 + place / 2, w.inputs / 2, count, depth, to.codes);
    alignas(64) int32_t own[kLanes];  // the group of each span, of 16 at a time
    for (size_t lane = 0; lane < kLanes; ++lane) {
        own[lane] = static_cast<int32_t>(lane * span / w.group);
    }
    const __m512i group_of = _mm512_load_si512(own);
    for (size_t first = 0; first < depth / span; first += kLanes) {
        const size_t group = (place + first * span) / w.group, wanted = std::min(kLanes, groups - group);
        const auto some = static_cast<__mmask16>((1u << wanted) - 1);
        alignas(64) float found[kLanes * kLanes] = {};
        for (size_t n = 0; n < count; ++n) {
            const S* const scales = static_cast<const S*>(w.scales) + (column + n) * groups + group;
            _mm512_store_ps(found + n * kLanes, _mm512_permutexvar_ps(group_of, floats_at(scales, some)));
        }
        turn(found, kLanes, to.scales[first], kLanes);
        if (Zeros) {
            for (size_t n = 0; n < count; ++n) {
                const uint8_t* const zeros = w.zeros + (column + n) * ((groups + 1) / 2);
                _mm512_store_si512(found + n * kLanes,
                                   _mm512_permutexvar_epi32(group_of, nibbles_at(zeros, group, wanted)));
            }
            turn(found, kLanes, reinterpret_cast<float*>(to.zeros[first]), kLanes);
        }
    }
}

// What lay_out_columns reads of 16 columns, fetched some at a time while tiles before it are multiplied.
template <typename S>
class ComingColumns {
public:
    ComingColumns(const Codes& w, size_t column, size_t place)
        : codes_(w.codes + column * w.inputs / 2 + place / 2),
          scales_(static_cast<const S*>(w.scales) + (column * w.inputs + place) / w.group), w_(w)
    {
    }

    // One of `shares` of it.
    BTP_INLINE void ask(size_t share, size_t shares) const
    {
        for (size_t line = kLines * share / shares; line < kLines * (share + 1) / shares; ++line) {
            const size_t column = line / kEach, own = line % kEach;
            own == kCodes ? ask_for(scales_ + column * (w_.inputs / w_.group))
                          : ask_for(codes_ + column * w_.inputs / 2 + own * 64);
        }
    }

private:
    static constexpr size_t kCodes = kPlaces / 2 / 64, kEach = kCodes + 1, kLines = kEach * kLanes;  // lines of the cache

    const uint8_t* codes_;
    const S* scales_;
    const Codes& w_;
};

// sum += products of codes with the 4 bytes at `bytes` in every lane. Compilers load them in an instruction of its own, and
// copy sums from register to register.
BTP_VNNI BTP_INLINE void add_products(__m512i& sum, __m512i codes, const int8_t* bytes)
{
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*reinterpret_cast<const int8_t(*)[4]>(bytes)));
}

// sums [M,16], 64 bytes aligned, of M rows and 16 columns for `spans` spans, added to those before unless these are the first.
template <int M, bool Zeros>
BTP_VNNI inline void multiply_byte_tile(const RowPart* rows, const ColumnPart& columns, size_t span, size_t spans, bool first,
                                        float* sums)
{
    __m512 total[M];
    BTP_UNROLLED for (int m = 0; m < M; ++m) {
        total[m] = first ? _mm512_setzero_ps() : _mm512_load_ps(sums + m * 16);
    }
    const uint8_t* codes = columns.codes;
    const int8_t* bytes = rows->bytes;
    for (size_t own = 0; own < spans; ++own) {
        __m512i sum[M];
        BTP_UNROLLED for (int m = 0; m < M; ++m) {
            const __m512i less = _mm512_set1_epi32(rows[m].less[own]);
            sum[m] = Zeros ? times_zeros(_mm512_load_si512(columns.zeros[own]), less) : less;
        }
        const uint8_t* const end = codes + span * kLanes;
        do {
            const __m512i even = _mm512_load_si512(codes), odd = _mm512_load_si512(codes + 64);
            BTP_UNROLLED for (int m = 0; m < M; ++m) {
                add_products(sum[m], even, bytes + static_cast<size_t>(m) * sizeof(RowPart));
            }
            BTP_UNROLLED for (int m = 0; m < M; ++m) {
                add_products(sum[m], odd, bytes + static_cast<size_t>(m) * sizeof(RowPart) + 4);
            }
            codes += 128;
            bytes += 8;
        } while (codes != end);
        const __m512 scales = _mm512_load_ps(columns.scales[own]);
        BTP_UNROLLED for (int m = 0; m < M; ++m) {
            const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(rows[m].scales[own]));
            total[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m]), scale, total[m]);
        }
    }
    BTP_UNROLLED for (int m = 0; m < M; ++m) {
        _mm512_store_ps(sums + m * 16, total[m]);
    }
}

using ByteTileFunction = void (*)(const RowPart*, const ColumnPart&, size_t, size_t, bool, float*);
template <bool Zeros>
inline constexpr ByteTileFunction kByteTiles[kTileRows] = {
    multiply_byte_tile<1, Zeros>, multiply_byte_tile<2, Zeros>,  multiply_byte_tile<3, Zeros>,  multiply_byte_tile<4, Zeros>,
    multiply_byte_tile<5, Zeros>, multiply_byte_tile<6, Zeros>,  multiply_byte_tile<7, Zeros>,  multiply_byte_tile<8, Zeros>,
    multiply_byte_tile<9, Zeros>, multiply_byte_tile<10, Zeros>, multiply_byte_tile<11, Zeros>, multiply_byte_tile<12, Zeros>};

// y [rows, count] of the sums [rows,16] of a tile. T: of bias and y.
template <typename T>
BTP_VNNI inline void put_tile(const float* sums, size_t rows, size_t count, const T* bias, T* y, size_t next)
{
    const auto some = static_cast<__mmask16>((1u << count) - 1);
    const __m512 added = bias != nullptr ? floats_at(bias, some) : _mm512_setzero_ps();
    for (size_t row = 0; row < rows; ++row) {
        const __m512 sum = _mm512_load_ps(sums + row * kLanes);
        put_floats(y + row * next, some, bias != nullptr ? _mm512_add_ps(sum, added) : sum);
    }
}

// What one thread needs: a part of 16 columns, and sums [kByteColumns/16, rows, 16].
struct ByteScratch {
    ColumnPart columns;
    float* sums() { return reinterpret_cast<float*>(this + 1); }
    static size_t size(size_t rows) { return sizeof(ByteScratch) + rows * kByteColumns * sizeof(float); }
};

// Columns [first, last) of y [rows,N], at most kByteColumns, from parts [parts_of(K), rows] of x. T: of bias and y, S: of scales.
template <bool Zeros, typename S, typename T>
BTP_VNNI inline void multiply_parts(const RowPart* x, size_t rows, const Codes& w, const T* bias, T* y, size_t next,
                                    size_t first, size_t last, ByteScratch& scratch)
{
    const RowPanels panels(rows);
    const size_t parts = parts_of(w.inputs), span = span_of(w);
    for (size_t part = 0; part < parts; ++part) {
        const size_t place = part * kPlaces, spans = std::min(kPlaces, w.inputs - place) / span;
        for (size_t column = first; column < last; column += kLanes) {
            const size_t count = std::min(kLanes, last - column);
            lay_out_columns<Zeros, S>(w, column, count, place, scratch.columns);
            float* const sums = scratch.sums() + (column - first) * rows;
            const bool end = column + kLanes >= last;
            const ComingColumns<S> coming(w, end ? first : column + kLanes, place + (end ? kPlaces : 0));
            for (size_t panel = 0; panel < panels.count; ++panel) {
                const size_t row = panels.first(panel), height = panels.height(panel);
                float* const own = sums + row * kLanes;
                coming.ask(panel, panels.count);
                kByteTiles<Zeros>[height - 1](x + part * rows + row, scratch.columns, span, spans, part == 0, own);
                if (part + 1 == parts) {
                    put_tile(own, height, count, bias != nullptr ? bias + column : nullptr, y + row * next + column, next);
                }
            }
        }
    }
}

}  // namespace btp

BTP_QUIET_END
#endif
