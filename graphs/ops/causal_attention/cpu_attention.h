// Causal attention over a whole sequence in float32 (AVX-512): 32 queries at a time, keys up to the diagonal.
//
// Scores are computed with queries side by side, [keys, 32]: a query is a lane, so its largest score and its sum need no
// shuffles, and the weights lie as the tiles of the product with the values want their columns. Keys and values of a head are
// laid out once for all its queries. How a query's sums are ordered depends on its place alone.
#pragma once

#include "../common/cpu_exponential.h"
#include "../common/cpu_tiles.h"

#ifdef BTP_X86
BTP_QUIET_INTRINSICS

namespace btp {

constexpr size_t kKeys = 256;  // whose weights, of 32 queries, stay in the first cache

// One head. Rows of query and of context are `queries_apart`, those of key and value `keys_apart` numbers apart.
struct Head {
    const float *query, *key, *value;  // [S,D], D a multiple of 16
    float* context;                    // [S,D]
    size_t tokens, size, queries_apart, keys_apart;
    float scale;
};

// What attend() needs beside its tensors, in floats; 64 bytes aligned.
inline size_t attention_scratch(size_t tokens, size_t size)
{
    return 2 * kTileColumns * size + (kTileColumns + 2 * size) * tokens;
}

class Attention {
public:
    Attention(const Head& head, float* scratch)
        : h_(head), keys_(scratch), values_(keys_ + h_.tokens * h_.size), queries_(values_ + h_.tokens * h_.size),
          context_(queries_ + kTileColumns * h_.size), weights_(context_ + kTileColumns * h_.size), rows_(h_.tokens), parts_(h_.size)
    {
    }

    void run()
    {
        lay_out();
        for (size_t first = 0; first < h_.tokens; first += kTileColumns) {
            const size_t reach = std::min(first + kTileColumns, h_.tokens);
            lay_out_queries(first, reach - first);
            for (size_t panel = 0; panel < rows_.count && rows_.first(panel) < reach; ++panel) {
                const size_t key = rows_.first(panel);
                multiply_tile(rows_.height(panel), {keys_ + key * h_.size, queries_, h_.size, nullptr,
                                                    weights_ + key * kTileColumns, kTileColumns});
            }
            weigh(first, reach);
            sum_values(reach);
            give(first, reach - first);
        }
    }

private:
    // Keys in panels of rows, values in panels of their D numbers.
    BTP_AVX512 void lay_out()
    {
        for (size_t panel = 0; panel < rows_.count; ++panel) {
            const size_t key = rows_.first(panel);
            lay_out_rows(h_.key + key * h_.keys_apart, h_.keys_apart, rows_.height(panel), h_.size, keys_ + key * h_.size);
        }
        for (size_t part = 0; part < parts_.count; ++part) {
            const size_t place = parts_.first(part), height = parts_.height(part);
            const auto wanted = static_cast<__mmask16>((1u << height) - 1);
            float* const panel = values_ + place * h_.tokens;
            for (size_t key = 0; key < h_.tokens; ++key) {
                const __m512 some = _mm512_maskz_loadu_ps(wanted, h_.value + key * h_.keys_apart + place);
                _mm512_mask_storeu_ps(panel + key * height, wanted, some);
            }
        }
    }

    // Queries as columns, times the scale. Those behind the last one are zeros.
    BTP_AVX512 void lay_out_queries(size_t first, size_t count)
    {
        alignas(64) float some[kVector * kVector];
        const __m512 scale = _mm512_set1_ps(h_.scale);
        for (size_t half = 0; half < kTileColumns; half += kVector) {
            for (size_t place = 0; place < h_.size; place += kVector) {
                for (size_t row = 0; row < kVector; ++row) {
                    const float* const own = h_.query + (first + half + row) * h_.queries_apart + place;
                    const bool there = half + row < count;
                    const __m512 given = there ? _mm512_mul_ps(_mm512_loadu_ps(own), scale) : _mm512_setzero_ps();
                    _mm512_store_ps(some + row * kVector, given);
                }
                turn(some, kVector, queries_ + place * kTileColumns + half, kTileColumns);
            }
        }
    }

    // Scores of keys before `reach` become exp(score - the query's largest), zeros behind the diagonal.
    BTP_AVX512 void weigh(size_t first, size_t reach)
    {
        for (size_t half = 0; half < kTileColumns; half += kVector) {
            float* const own = weights_ + half;
            const auto seen = [first, half](size_t key) {
                const size_t behind = key > first + half ? std::min(key - first - half, kVector) : 0;
                return static_cast<__mmask16>(0xffffu << behind);
            };
            __m512 most = _mm512_loadu_ps(own), sum = _mm512_setzero_ps();
            for (size_t key = 0; key < reach; ++key) {  // a NaN is no maximum, and stays below
                most = _mm512_mask_max_ps(most, seen(key), _mm512_loadu_ps(own + key * kTileColumns), most);
            }
            for (size_t key = 0; key < reach; ++key) {
                float* const place = own + key * kTileColumns;
                const __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(place), most));
                const __m512 kept = _mm512_maskz_mov_ps(seen(key), weight);
                sum = _mm512_add_ps(sum, kept);
                _mm512_storeu_ps(place, kept);
            }
            _mm512_store_ps(sums_ + half, sum);
        }
    }

    // context [D, 32]: the values' sums, not yet divided.
    void sum_values(size_t reach)
    {
        for (size_t key = 0; key < reach; key += kKeys) {
            const size_t depth = std::min(kKeys, reach - key);
            for (size_t part = 0; part < parts_.count; ++part) {
                const size_t place = parts_.first(part), height = parts_.height(part);
                float* const own = context_ + place * kTileColumns;
                multiply_tile(height, {values_ + place * h_.tokens + key * height, weights_ + key * kTileColumns, depth,
                                       key == 0 ? nullptr : own, own, kTileColumns});
            }
        }
    }

    BTP_AVX512 void give(size_t first, size_t count)
    {
        alignas(64) float some[kVector * kVector], turned[kVector * kVector];
        for (size_t half = 0; half < count; half += kVector) {
            const __m512 sum = _mm512_load_ps(sums_ + half);
            for (size_t place = 0; place < h_.size; place += kVector) {
                for (size_t row = 0; row < kVector; ++row) {
                    const float* const own = context_ + (place + row) * kTileColumns + half;
                    _mm512_store_ps(some + row * kVector, _mm512_div_ps(_mm512_loadu_ps(own), sum));
                }
                turn(some, kVector, turned, kVector);
                for (size_t row = 0; row < std::min(kVector, count - half); ++row) {
                    float* const own = h_.context + (first + half + row) * h_.queries_apart + place;
                    _mm512_storeu_ps(own, _mm512_load_ps(turned + row * kVector));
                }
            }
        }
    }

    const Head h_;
    float* const keys_;     // [S,D] in panels
    float* const values_;   // [D,S] in panels
    float* const queries_;  // [D,32]
    float* const context_;  // [D,32]
    float* const weights_;  // [S,32]
    const RowPanels rows_, parts_;
    alignas(64) float sums_[kTileColumns];
};

}  // namespace btp

BTP_QUIET_END
#endif
