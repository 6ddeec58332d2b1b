// Up to 8 rows of x: bound by the bandwidth at which the codes are read, once, in 16 bytes a lane.
//
// The 8 columns of mma.m16n8k16 are the rows of x, so the arithmetic costs the same for 1 and for 8 of them: 19 instructions
// for 8 codes of a lane, whatever M. (With one product a code and row, 8 rows would be bound by arithmetic on Orin.)
// A block has 16 or 32 rows of w; its warps take steps of 128 k by turns, so that together they read rows from end to end.
#pragma once

#include "weights.cuh"

namespace btp {

constexpr int kFewRows = 8;
constexpr int kFewWarps = 8;

// Grid: blocks of 16 kTiles rows of w. Shared memory: few_rows_shared<kTiles>.
template <int kTiles>
constexpr size_t few_rows_shared = sizeof(float) * kFewWarps * 16 * kTiles * kFewRows;

// The x of one lane and step: row lane/4, k 32t to 32t+31; zeros where there is none.
BTP_DEVICE void load_x(const LinearCall& call, int step, uint4 (&x)[4])
{
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int row = lane / 4;
    const int k = step * kStep + lane % 4 * 32;
    const uint16_t* const from = call.x + static_cast<size_t>(row) * static_cast<size_t>(call.sizes.inputs) + k;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const bool there = row < call.sizes.rows && k + 8 * i < call.sizes.inputs;
        x[i] = there ? *reinterpret_cast<const uint4*>(from + 8 * i) : uint4{0, 0, 0, 0};
    }
}

template <typename F, int kTiles, bool kSixteen>
BTP_DEVICE void multiply_step(const Codes<F, kTiles, kSixteen>& codes, const uint4 (&x)[4], float (&sums)[kTiles][4])
{
    const auto pairs = codes.pairs();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            uint32_t upper[4], lower[4];
            codes.unpack(pairs, 2 * tile, i, upper);
            codes.unpack(pairs, 2 * tile + 1, i, lower);
            const uint32_t first[4] = {upper[0], lower[0], upper[1], lower[1]};
            const uint32_t second[4] = {upper[2], lower[2], upper[3], lower[3]};
            F::multiply_tiles(sums[tile], first, x[i].x, x[i].y);
            F::multiply_tiles(sums[tile], second, x[i].z, x[i].w);
        }
    }
}

template <typename F, int kTiles, bool kSixteen>
__global__ void __launch_bounds__(32 * kFewWarps, 2) multiply_few_rows(const LinearCall call)
{
    BTP_DYNAMIC_SHARED(memory);
    auto* const parts = reinterpret_cast<float*>(memory);  // [warp][row of w][row of x]
    constexpr int kAhead = kSixteen && kTiles == 2 ? 1 : 2;  // steps whose reads are issued together, as registers allow
    constexpr int kOwn = 16 * kTiles;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int first = static_cast<int>(blockIdx.x) * kOwn;
    const int steps = steps_of(call.sizes.inputs);
    float sums[kTiles][4] = {};
    for (int step = warp; step < steps; step += kAhead * kFewWarps) {
        Codes<F, kTiles, kSixteen> codes[kAhead];
        uint4 x[kAhead][4];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {  // behind the last step all is zero
            codes[i].load(call, first, step + i * kFewWarps);
            load_x(call, step + i * kFewWarps, x[i]);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            multiply_step<F, kTiles, kSixteen>(codes[i], x[i], sums);
        }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = 16 * tile + lane / 4 + i / 2 * 8;
            parts[(warp * kOwn + row) * kFewRows + lane % 4 * 2 + i % 2] = sums[tile][i];
        }
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kOwn * kFewRows; i += 32 * kFewWarps) {
        const int row = i % kOwn, column = i / kOwn, n = first + row;
        if (n < call.sizes.outputs && column < call.sizes.rows) {
            float sum = 0.0f;
#pragma unroll
            for (int from = 0; from < kFewWarps; ++from) {
                sum += parts[(from * kOwn + row) * kFewRows + column];
            }
            sum += call.bias != nullptr ? F::wide(call.bias[n]) : 0.0f;
            call.y[static_cast<size_t>(column) * static_cast<size_t>(call.sizes.outputs) + static_cast<size_t>(n)] = F::narrow(sum);
        }
    }
}

}  // namespace btp
