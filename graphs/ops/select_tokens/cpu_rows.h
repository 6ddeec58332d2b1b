// Rows of tokens brought to length 1, for their products (cpu_product.h).
#pragma once

#include <cmath>
#include <cstddef>
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

BTP_INLINE void add_row_body(float* __restrict sums, const float* __restrict row, int width)
{
    for (int place = 0; place < width; ++place) {
        sums[place] += row[place];
    }
}
BTP_FOR_PROCESSORS(void, add_row, (float* sums, const float* row, int width), (sums, row, width))

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

// units [V,width], padded with zeros to a multiple of kTile rows, and norms [V], of the rows less their mean or as they are.
inline void unit_rows(float* units, float* norms, const TokenRows& rows, int tokens)
{
    const size_t width = static_cast<size_t>(rows.width), count = static_cast<size_t>(tokens);
    std::vector<float> mean(width, 0.0f);
    if (rows.centred) {
        for (size_t token = 0; token < count; ++token) {
            add_row(mean.data(), rows.data + token * width, rows.width);
        }
        for (float& value : mean) {
            value /= static_cast<float>(tokens);
        }
    }
    for (size_t token = 0; token < count; ++token) {
        norms[token] = unit_row(units + token * width, rows.data + token * width, mean.data(), rows.width);
    }
    std::fill(units + count * width, units + (count + kTile - 1) / kTile * kTile * width, 0.0f);
}

}  // namespace btp
