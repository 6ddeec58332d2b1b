// More than 8 rows of x: tiles of 128 rows of w by 16, 32 or 64 rows of x on the tensor cores.
//
// Each of the four warps owns 32 rows of w and all columns of the tile, so every code is unpacked once a tile, in registers, from
// global memory, one step ahead. x goes through shared memory by asynchronous copies, three steps deep, one barrier a
// step. A lane wants 16 neighbouring bytes of x for two products (weights.cuh), which is one 16-byte read of shared memory
// where ldmatrix would bring it words of four rows. For a step of 128 k and 64 columns a warp issues 128 products and unpacks
// 16 words of a lane with 17 instructions each.
//
// Where there are fewer tiles than the device has room for, K is split over blocks: the parts are float32 sums in the workspace,
// which a second launch adds in order.
#pragma once

#include "weights.cuh"

namespace btp {

constexpr int kTileRows = 128;  // of w
constexpr int kTileWarps = 4;
constexpr int kStages = 3;

template <int kColumns>
constexpr size_t tile_shared = size_t{kStages} * 8 * kColumns * kStep * sizeof(uint16_t);

// A part of a product: steps [begin, end) of K; `sums` [M,N] float32 of this part, or null where y itself is to be written.
struct Part {
    int begin, end;
    float* sums;
};

// Shared memory of one step: rows of x, 16 chunks of 8 k each. Chunk 4t+i of a row lies at place 4i+t, for odd rows with the
// halves of every 128 bytes exchanged: the 8 lanes that are served together find their chunks in different banks.
template <int kColumns>
struct Stage {
    static constexpr uint32_t kRowBytes = kStep * sizeof(uint16_t);
    static constexpr uint32_t kBytes = 8 * kColumns * kRowBytes;

    // The whole block copies x [first..,128 step..] of the tile.
    BTP_DEVICE static void fill(uint32_t address, const LinearCall& call, int first, int step)
    {
        const auto thread = static_cast<uint32_t>(threadIdx.x);
        const uint32_t place = thread % 16 ^ (thread / 16 & 1u) << 2;
        const int k = step * kStep + static_cast<int>(place % 4 * 4 + place / 4) * 8;
#pragma unroll
        for (uint32_t i = 0; i < kColumns; ++i) {
            const uint32_t own = thread / 16 + 8 * i;
            const int row = first + static_cast<int>(own);
            const bool there = row < call.sizes.rows && k < call.sizes.inputs;
            const size_t from = there ? static_cast<size_t>(row) * static_cast<size_t>(call.sizes.inputs) + static_cast<size_t>(k) : 0;
            copy_async(address + own * kRowBytes + thread % 16 * 16, call.x + from, there);
        }
    }

    // The x of this lane for word i and column tile j: row 8j + lane/4, k 32t+8i to 32t+8i+7.
    BTP_DEVICE static uint4 read(uint32_t address, uint32_t lane, uint32_t i, uint32_t j)
    {
        const uint32_t row = lane / 4;
        const uint32_t place = 4 * (i ^ (row & 1u)) + lane % 4;
        return load_shared_16(address + (8 * j + row) * kRowBytes + place * 16);
    }
};

template <typename F, int kColumns, bool kSixteen>
BTP_DEVICE void multiply_step(const Codes<F, 2, kSixteen>& codes, uint32_t stage, float (&sums)[2][kColumns][4])
{
    const auto lane = static_cast<uint32_t>(threadIdx.x) % 32;
    const auto pairs = codes.pairs();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32_t w[4][4];  // word i of the lane's four rows
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            codes.unpack(pairs, j, i, w[j]);
        }
#pragma unroll
        for (int column = 0; column < kColumns; ++column) {
            const uint4 x = Stage<kColumns>::read(stage, lane, static_cast<uint32_t>(i), static_cast<uint32_t>(column));
#pragma unroll
            for (int tile = 0; tile < 2; ++tile) {
                const uint32_t first[4] = {w[2 * tile][0], w[2 * tile + 1][0], w[2 * tile][1], w[2 * tile + 1][1]};
                F::multiply_tiles(sums[tile][column], first, x.x, x.y);
            }
#pragma unroll
            for (int tile = 0; tile < 2; ++tile) {
                const uint32_t second[4] = {w[2 * tile][2], w[2 * tile + 1][2], w[2 * tile][3], w[2 * tile + 1][3]};
                F::multiply_tiles(sums[tile][column], second, x.z, x.w);
            }
        }
    }
}

template <typename F, int kColumns>
BTP_DEVICE void write_tile(const LinearCall& call, const Part& part, int n0, int m0, const float (&sums)[2][kColumns][4])
{
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int n = n0 + 16 * tile + lane / 4 + i / 2 * 8;
            if (n >= call.sizes.outputs) {
                continue;
            }
            const float bias = part.sums == nullptr && call.bias != nullptr ? F::wide(call.bias[n]) : 0.0f;
#pragma unroll
            for (int column = 0; column < kColumns; ++column) {
                const int m = m0 + 8 * column + lane % 4 * 2 + i % 2;
                const size_t to = static_cast<size_t>(m) * static_cast<size_t>(call.sizes.outputs) + static_cast<size_t>(n);
                if (m >= call.sizes.rows) {
                    continue;
                }
                if (part.sums != nullptr) {
                    part.sums[to] = sums[tile][column][i];
                } else {
                    call.y[to] = F::narrow(sums[tile][column][i] + bias);
                }
            }
        }
    }
}

// Grid (tiles of x, tiles of w, parts of K): neighbouring blocks read the same rows of w.
template <typename F, int kColumns, bool kSixteen>
__global__ void __launch_bounds__(32 * kTileWarps, 2)
multiply_tiles(const LinearCall call, const int steps_a_part, float* const sums_of_parts)
{
    BTP_DYNAMIC_SHARED(memory);
    using X = Stage<kColumns>;
    const uint32_t stages = shared_address(memory);
    const int m0 = static_cast<int>(blockIdx.x) * 8 * kColumns;
    const int n0 = static_cast<int>(blockIdx.y) * kTileRows + static_cast<int>(threadIdx.x) / 32 * 32;
    const int steps = steps_of(call.sizes.inputs), begin = static_cast<int>(blockIdx.z) * steps_a_part;
    const size_t area = static_cast<size_t>(call.sizes.rows) * static_cast<size_t>(call.sizes.outputs);
    const Part part{begin, begin + steps_a_part < steps ? begin + steps_a_part : steps,
                    sums_of_parts == nullptr ? nullptr : sums_of_parts + area * blockIdx.z};
    float sums[2][kColumns][4] = {};
    for (int step = part.begin; step < part.begin + kStages - 1; ++step) {
        if (step < part.end) {
            X::fill(stages + static_cast<uint32_t>(step - part.begin) * X::kBytes, call, m0, step);
        }
        commit_copies();
    }
    Codes<F, 2, kSixteen> codes;
    codes.load(call, n0, part.begin);
    uint32_t now = 0;  // the stage that is read
    for (int step = part.begin; step < part.end; ++step) {
        wait_for_copies<kStages - 2>();
        __syncthreads();  // this step's x is there for all, and nobody reads the one before any more
        const int later = step + kStages - 1;
        if (later < part.end) {
            X::fill(stages + (now + kStages - 1) % kStages * X::kBytes, call, m0, later);
        }
        commit_copies();
        Codes<F, 2, kSixteen> next;
        next.load(call, n0, step + 1 < part.end ? step + 1 : steps);  // behind the last step all is zero
        multiply_step<F, kColumns, kSixteen>(codes, stages + now * X::kBytes, sums);
        codes = next;
        now = (now + 1) % kStages;
    }
    write_tile<F, kColumns>(call, part, n0, m0, sums);
}

// y = the sum of the parts, in their order, + bias. Grid (N / 256, M).
template <typename F>
__global__ void __launch_bounds__(256) add_parts(const LinearCall call, const float* const sums_of_parts, const int parts)
{
    const size_t n = size_t{blockIdx.x} * 256 + threadIdx.x;
    const size_t outputs = static_cast<size_t>(call.sizes.outputs);
    if (n >= outputs) {
        return;
    }
    const size_t place = blockIdx.y * outputs + n;
    float sum = 0.0f;
    for (int part = 0; part < parts; ++part) {
        sum += sums_of_parts[static_cast<size_t>(part) * static_cast<size_t>(call.sizes.rows) * outputs + place];
    }
    call.y[place] = F::narrow(sum + (call.bias != nullptr ? F::wide(call.bias[n]) : 0.0f));
}

}  // namespace btp
