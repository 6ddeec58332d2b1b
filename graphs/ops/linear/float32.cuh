// float32: plain products, for checks and small models. A warp owns one row of w, its lanes words of 8 codes by turns.
#pragma once

#include "weights.cuh"

namespace btp {

constexpr int kPlainWarps = 8;
constexpr int kPlainRows = 8;  // of x, at once

// The sum of all lanes, in the same order every time.
BTP_DEVICE float warp_total(float value)
{
    for (int offset = 16; offset > 0; offset >>= 1) {
        value += __uint_as_float(__shfl_xor_sync(kAllLanes, __float_as_uint(value), offset));
    }
    return value;
}

struct PlainCall {
    BtpLinear sizes;
    int shift;
    const float* x;
    const unsigned char* qweight;
    const float* scales;
    const unsigned char* zeros;
    const float* bias;
    float* y;
};

// Adds the products of one word's 8 codes with each of the rows of x.
BTP_DEVICE void multiply_word(const PlainCall& call, size_t n, int m0, int word, float (&sums)[kPlainRows])
{
    const auto inputs = static_cast<size_t>(call.sizes.inputs);
    const size_t groups = inputs >> call.shift, group = static_cast<size_t>(8 * word >> call.shift);
    const uint32_t codes = reinterpret_cast<const uint32_t*>(call.qweight)[n * (inputs / 8) + static_cast<size_t>(word)];
    const float scale = call.scales[n * groups + group];
    const unsigned zero = call.zeros == nullptr ? 8u : call.zeros[n * ((groups + 1) / 2) + group / 2] >> (4 * (group & 1)) & 15u;
    float w[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        w[i] = __fmul_rn(__int2float_rn(static_cast<int>(codes >> (4 * i) & 15u) - static_cast<int>(zero)), scale);
    }
#pragma unroll
    for (int m = 0; m < kPlainRows; ++m) {
        if (m0 + m < call.sizes.rows) {
            const float* const x = call.x + static_cast<size_t>(m0 + m) * inputs + 8 * word;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                sums[m] = __fmaf_rn(x[i], w[i], sums[m]);
            }
        }
    }
}

// Grid (N / 8, M / 8).
__global__ void __launch_bounds__(32 * kPlainWarps) multiply_float32(const PlainCall call)
{
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int n = static_cast<int>(blockIdx.x) * kPlainWarps + static_cast<int>(threadIdx.x) / 32;
    const int m0 = static_cast<int>(blockIdx.y) * kPlainRows;
    if (n >= call.sizes.outputs) {
        return;
    }
    float sums[kPlainRows] = {};
    for (int word = lane; word < call.sizes.inputs / 8; word += 32) {
        multiply_word(call, static_cast<size_t>(n), m0, word, sums);
    }
#pragma unroll
    for (int m = 0; m < kPlainRows; ++m) {
        const float total = warp_total(sums[m]);
        if (lane == m && m0 + m < call.sizes.rows) {
            call.y[static_cast<size_t>(m0 + m) * static_cast<size_t>(call.sizes.outputs) + static_cast<size_t>(n)] =
                total + (call.bias != nullptr ? call.bias[n] : 0.0f);
        }
    }
}

}  // namespace btp
