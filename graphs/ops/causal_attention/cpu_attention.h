// Causal attention over a whole sequence in float32 (AVX-512): 32 queries at a time, keys up to the diagonal.
//
// Scores are computed with queries side by side, [keys, 32]: a query is a lane, so its largest score and its sum need no
// shuffles, and the weights lie as the tiles of the product with the values want their columns. Keys and values of a head are
// laid out once for all its queries. How a query's sums are ordered depends on its place alone.
#pragma once

#include "../common/cpu_exponential.h"
#include "../common/cpu_tiles.h"

#ifdef BTP_X86
#include <cmath>

BTP_QUIET_INTRINSICS

namespace btp {

constexpr size_t kQueries = kTileColumns;  // that are computed together
constexpr size_t kKeys = 256;              // whose weights, of these queries, stay in the first cache

// Keys and values [S,D] of one head as tiles read them, D a multiple of 16: keys in panels of rows, values in panels of their
// D numbers. They are laid out in blocks of kQueries tokens, of which the last may have fewer.
class LaidOut {
public:
    static size_t floats(size_t tokens, size_t size) { return 2 * tokens * size; }

    LaidOut(float* memory, size_t tokens, size_t size)
        : keys_(memory), values_(memory + tokens * size), tokens_(tokens), size_(size), parts_(size)
    {
    }

    // The block of tokens from `first` on. key, value: its rows, so far apart.
    BTP_AVX512 void block(size_t first, const float* key, const float* value, size_t apart)
    {
        const RowPanels rows = panels(first);
        for (size_t panel = 0; panel < rows.count; ++panel) {
            const size_t row = rows.first(panel);
            lay_out_rows(key + row * apart, apart, rows.height(panel), size_, keys_ + (first + row) * size_);
        }
        const size_t count = std::min(kQueries, tokens_ - first);
        for (size_t part = 0; part < parts_.count; ++part) {
            const size_t place = parts_.first(part), height = parts_.height(part);
            const auto wanted = static_cast<__mmask16>((1u << height) - 1);
            float* const panel = values_ + place * tokens_ + first * height;
            for (size_t token = 0; token < count; ++token) {
                const __m512 some = _mm512_maskz_loadu_ps(wanted, value + token * apart + place);
                _mm512_mask_storeu_ps(panel + token * height, wanted, some);
            }
        }
    }

    // The panels of a block's keys.
    RowPanels panels(size_t first) const { return RowPanels(std::min(kQueries, tokens_ - first)); }

    // [D, height] of the key's panel; [S, height] from the key on, of a part of the values' numbers.
    const float* keys(size_t key) const { return keys_ + key * size_; }
    const float* values(size_t part, size_t key) const
    {
        return values_ + parts_.first(part) * tokens_ + key * parts_.height(part);
    }
    const RowPanels& parts() const { return parts_; }
    size_t tokens() const { return tokens_; }
    size_t size() const { return size_; }

private:
    float *keys_, *values_;
    size_t tokens_, size_;
    RowPanels parts_;
};

// A block of queries that attend. In `scratch`, 64 bytes aligned, is what is made on the way.
class Attention {
public:
    static size_t floats(size_t tokens, size_t size) { return kQueries * (2 * size + tokens); }

    Attention(float* scratch, size_t tokens, size_t size)
        : size_(size), scale_(static_cast<float>(1.0 / std::sqrt(static_cast<double>(size)))), queries_(scratch),
          context_(queries_ + kQueries * size), weights_(context_ + kQueries * size), tokens_(tokens)
    {
    }

    // The queries of the block from `first` on, rows `apart` apart like those of the context.
    void run(const LaidOut& seen, size_t first, const float* query, size_t apart, float* context)
    {
        const size_t reach = std::min(first + kQueries, tokens_);
        lay_out_queries(query, apart, reach - first);
        for (size_t block = 0; block < reach; block += kQueries) {
            const RowPanels rows = seen.panels(block);
            for (size_t panel = 0; panel < rows.count; ++panel) {
                const size_t key = block + rows.first(panel);
                multiply_tile(rows.height(panel),
                              {seen.keys(key), queries_, size_, nullptr, weights_ + key * kQueries, kQueries});
            }
        }
        weigh(first, reach);
        sum_values(seen, reach);
        give(context, apart, reach - first);
    }

private:
    // Queries as columns, times the scale. Those behind the last one are zeros.
    BTP_AVX512 void lay_out_queries(const float* query, size_t apart, size_t count)
    {
        alignas(64) float some[kVector * kVector];
        const __m512 scale = _mm512_set1_ps(scale_);
        for (size_t half = 0; half < kQueries; half += kVector) {
            for (size_t place = 0; place < size_; place += kVector) {
                for (size_t row = 0; row < kVector; ++row) {
                    const float* const own = query + (half + row) * apart + place;
                    const bool there = half + row < count;
                    const __m512 given = there ? _mm512_mul_ps(_mm512_loadu_ps(own), scale) : _mm512_setzero_ps();
                    _mm512_store_ps(some + row * kVector, given);
                }
                turn(some, kVector, queries_ + place * kQueries + half, kQueries);
            }
        }
    }

    // Scores of keys before `reach` become exp(score - the query's largest), zeros behind the diagonal.
    BTP_AVX512 void weigh(size_t first, size_t reach)
    {
        for (size_t half = 0; half < kQueries; half += kVector) {
            float* const own = weights_ + half;
            const auto seen = [first, half](size_t key) {
                const size_t behind = key > first + half ? std::min(key - first - half, kVector) : 0;
                return static_cast<__mmask16>(0xffffu << behind);
            };
            __m512 most = _mm512_loadu_ps(own), sum = _mm512_setzero_ps();
            for (size_t key = 0; key < reach; ++key) {  // a NaN is no maximum, and stays below
                most = _mm512_mask_max_ps(most, seen(key), _mm512_loadu_ps(own + key * kQueries), most);
            }
            for (size_t key = 0; key < reach; ++key) {
                float* const place = own + key * kQueries;
                const __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(place), most));
                const __m512 kept = _mm512_maskz_mov_ps(seen(key), weight);
                sum = _mm512_add_ps(sum, kept);
                _mm512_storeu_ps(place, kept);
            }
            _mm512_store_ps(sums_ + half, sum);
        }
    }

    // context [D, 32]: the values' sums, not yet divided.
    void sum_values(const LaidOut& seen, size_t reach)
    {
        const RowPanels& parts = seen.parts();
        for (size_t key = 0; key < reach; key += kKeys) {
            const size_t depth = std::min(kKeys, reach - key);
            for (size_t part = 0; part < parts.count; ++part) {
                float* const own = context_ + parts.first(part) * kQueries;
                multiply_tile(parts.height(part), {seen.values(part, key), weights_ + key * kQueries, depth,
                                                   key == 0 ? nullptr : own, own, kQueries});
            }
        }
    }

    BTP_AVX512 void give(float* context, size_t apart, size_t count)
    {
        alignas(64) float some[kVector * kVector], turned[kVector * kVector];
        for (size_t half = 0; half < count; half += kVector) {
            const __m512 sum = _mm512_load_ps(sums_ + half);
            for (size_t place = 0; place < size_; place += kVector) {
                for (size_t row = 0; row < kVector; ++row) {
                    const float* const own = context_ + (place + row) * kQueries + half;
                    _mm512_store_ps(some + row * kVector, _mm512_div_ps(_mm512_loadu_ps(own), sum));
                }
                turn(some, kVector, turned, kVector);
                for (size_t row = 0; row < std::min(kVector, count - half); ++row) {
                    float* const own = context + (half + row) * apart + place;
                    _mm512_storeu_ps(own, _mm512_load_ps(turned + row * kVector));
                }
            }
        }
    }

    const size_t size_;
    const float scale_;
    float* const queries_;  // [D,32]
    float* const context_;  // [D,32]
    float* const weights_;  // [S,32]
    const size_t tokens_;
    alignas(64) float sums_[kQueries];
};

}  // namespace btp

BTP_QUIET_END
#endif
