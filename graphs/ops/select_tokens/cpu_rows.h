// Rows of tokens brought to length 1, for their products (cpu_product.h).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstring>
#include <vector>

#include "cpu.h"
#include "../common/cpu_loops.h"
#include "cpu_product.h"

namespace btp {

constexpr float kShortest = 1e-12f;  // norms below count as this: NORM_EPSILON of graphs/pruning/spatial_set.py

inline size_t levels_bytes(int tokens)
{
    const size_t count = static_cast<size_t>(tokens);
    return (count * count * sizeof(int16_t) + 63) / 64 * 64;
}

inline size_t units_bytes(int tokens, int width)
{
    return (static_cast<size_t>(tokens) + kTile) * static_cast<size_t>(width) * sizeof(float);
}

// sums [width] of rows [count,width], one after another: so many columns at a time that the sums stay in registers.
BTP_INLINE void sum_rows_body(float* __restrict sums, const float* __restrict rows, size_t count, size_t width)
{
    constexpr size_t kTogether = 64;
    size_t place = 0;
    for (; place + kTogether <= width; place += kTogether) {
        float some[kTogether] = {};
        for (size_t row = 0; row < count; ++row) {
            for (size_t column = 0; column < kTogether; ++column) {
                some[column] += rows[row * width + place + column];
            }
        }
        std::memcpy(sums + place, some, sizeof some);
    }
    for (; place < width; ++place) {
        float sum = 0.0f;
        for (size_t row = 0; row < count; ++row) {
            sum += rows[row * width + place];
        }
        sums[place] = sum;
    }
}
BTP_FOR_PROCESSORS(void, sum_rows, (float* sums, const float* rows, size_t count, size_t width), (sums, rows, count, width))

// unit = (row - mean) / its norm, which is returned. Squares are summed in as many chains as the widest registers have lanes.
BTP_INLINE float unit_row_body(float* __restrict unit, const float* __restrict row, const float* __restrict mean, int width)
{
    constexpr int kChains = 16;
    float chains[kChains] = {};
    int place = 0;
    for (; place + kChains <= width; place += kChains) {
        for (int chain = 0; chain < kChains; ++chain) {
            const float value = row[place + chain] - mean[place + chain];
            unit[place + chain] = value;
            chains[chain] += value * value;
        }
    }
    for (; place < width; ++place) {
        unit[place] = row[place] - mean[place];
        chains[place % kChains] += unit[place] * unit[place];
    }
    float squares = 0.0f;
    for (const float chain : chains) {
        squares += chain;
    }
    const float norm = std::sqrt(squares);
    const float divisor = norm > kShortest ? norm : kShortest;
    for (place = 0; place < width; ++place) {
        unit[place] /= divisor;
    }
    return norm;
}
BTP_FOR_PROCESSORS(float, unit_row, (float* unit, const float* row, const float* mean, int width),
                   (unit, row, mean, width))

// The rows' mean [width], or zeros.
inline std::vector<float> mean_row(const TokenRows& rows, int tokens)
{
    std::vector<float> mean(static_cast<size_t>(rows.width), 0.0f);
    if (rows.centred) {
        sum_rows(mean.data(), rows.data, static_cast<size_t>(tokens), mean.size());
        for (float& value : mean) {
            value /= static_cast<float>(tokens);
        }
    }
    return mean;
}

// units [V,width], padded with zeros to a multiple of kTile rows, and norms [V], of the rows less their mean: those from `first`
// to `stop`.
inline void unit_rows(float* units, float* norms, const TokenRows& rows, const std::vector<float>& mean, size_t first, size_t stop)
{
    const size_t width = mean.size();
    for (size_t token = first; token < stop; ++token) {
        norms[token] = unit_row(units + token * width, rows.data + token * width, mean.data(), rows.width);
    }
    std::fill(units + stop * width, units + (stop + kTile - 1) / kTile * kTile * width, 0.0f);
}

}  // namespace btp
