// How much a query looks at each of some tokens: attention's weights on the CPU, the mean over heads.
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "../common/cpu_loops.h"

namespace btp {

// products [count] of rows `size` long with one of them, in as many chains as the widest registers have lanes.
BTP_INLINE void multiply_keys_body(float* __restrict products, const float* __restrict query, const float* __restrict keys, size_t count,
                                   size_t size)
{
    constexpr size_t kChains = 16;
    for (size_t key = 0; key < count; ++key) {
        const float* const row = keys + key * size;
        float chains[kChains] = {};
        size_t place = 0;
        for (; place + kChains <= size; place += kChains) {
            for (size_t chain = 0; chain < kChains; ++chain) {
                chains[chain] += query[place + chain] * row[place + chain];
            }
        }
        for (; place < size; ++place) {
            chains[place % kChains] += query[place] * row[place];
        }
        float sum = 0.0f;
        for (const float chain : chains) {
            sum += chain;
        }
        products[key] = sum;
    }
}
BTP_FOR_PROCESSORS(void, multiply_keys, (float* products, const float* query, const float* keys, size_t count, size_t size),
                   (products, query, keys, count, size))

// scores += softmax(query keys^T) of the tokens from `start` on; keys [visible,size].
inline void add_weights(float* scores, size_t start, size_t count, const float* query, const float* keys, size_t visible, size_t size)
{
    std::vector<float> weights(visible);
    multiply_keys(weights.data(), query, keys, visible, size);
    float largest = -std::numeric_limits<float>::infinity(), sum = 0.0f;
    for (const float product : weights) {
        largest = product > largest ? product : largest;
    }
    for (float& weight : weights) {
        weight = std::exp(weight - largest);
        sum += weight;
    }
    for (size_t token = 0; token < count; ++token) {  // those behind the query are not looked at
        scores[token] += start + token < visible ? weights[start + token] / sum : 0.0f;
    }
}

}  // namespace btp
