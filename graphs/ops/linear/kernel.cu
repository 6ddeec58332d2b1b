// BtpLinear for CUDA devices: w is unpacked in registers, from the row-major codes as they are stored.
//
//   up to 8 rows of x     few_rows.cuh   bound by reading the codes: N K / 2 bytes / bandwidth
//   more                  tiles.cuh      bound by the tensor cores: 2 M N K / rate, from some 60 rows (Orin) on
//   float32               float32.cuh    plain
//
// docs/native.md carries the arithmetic for the sizes in use.
#include "kernel.h"

#include <type_traits>

#include "few_rows.cuh"
#include "float32.cuh"
#include "rules.h"
#include "tiles.cuh"

namespace btp {
namespace {

constexpr int kMostMultiprocessors = 192;  // for the size of the workspace, which must do on every device

int over(int size, int unit) { return (size + unit - 1) / unit; }

// How a product is laid out on a device: column tiles of a block (of 8 rows of x each), parts of K.
struct Layout {
    int columns;
    int parts;
    int steps_a_part;
};

// Rows of x a block: a step of 8c rows takes the tensor cores 128 c cycles and its unpacking about 400, beside each other.
int columns_of(int rows)
{
    int best = 8, least = INT32_MAX;
    for (int columns = 8; columns >= 2; columns /= 2) {
        const int cost = over(rows, 8 * columns) * (128 * columns > 400 ? 128 * columns : 400);
        if (cost < least) {
            best = columns;
            least = cost;
        }
    }
    return best;
}

// K is split where that gives each multiprocessor up to two blocks; a part has at least four steps.
Layout layout_of(const BtpLinear& linear, int multiprocessors)
{
    const int columns = columns_of(linear.rows);
    const int64_t tiles = int64_t{over(linear.rows, 8 * columns)} * over(linear.outputs, kTileRows);
    const int steps = steps_of(linear.inputs);
    const auto room = static_cast<int>(2 * multiprocessors / tiles);
    const int most = over(steps, 4);
    const int wanted = room < 1 ? 1 : room < most ? room : most;
    const int steps_a_part = over(steps, wanted);
    return {columns, over(steps, steps_a_part), steps_a_part};
}

int multiprocessors()
{
    int device = 0, count = 1;
    if (cudaGetDevice(&device) == cudaSuccess) {
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    }
    return count < kMostMultiprocessors ? count : kMostMultiprocessors;
}

size_t workspace_of(const BtpLinear& linear)
{
    if (linear.type == BTP_LINEAR_FLOAT32 || linear.rows <= kFewRows) {
        return 0;
    }
    const int parts = layout_of(linear, kMostMultiprocessors).parts;  // more of them never want fewer parts
    return parts == 1 ? 0 : sizeof(float) * static_cast<size_t>(parts) * static_cast<size_t>(linear.rows)
                                * static_cast<size_t>(linear.outputs);
}

int32_t launched()
{
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? static_cast<int32_t>(BTP_OK) : BTP_CUDA + static_cast<int32_t>(error);
}

template <typename F, bool kSixteen>
int32_t launch_few_rows(const LinearCall& call, cudaStream_t stream)
{
    const auto with = [&](auto tiles) {
        constexpr int kTiles = decltype(tiles)::value;
        const auto kernel = multiply_few_rows<F, kTiles, kSixteen>;
        const auto blocks = static_cast<unsigned>(over(call.sizes.outputs, 16 * kTiles));
        BTP_LAUNCH(kernel, blocks, 32 * kFewWarps, few_rows_shared<kTiles>, stream, call);
        return launched();
    };
    // A block reads all of x: with 5 to 8 rows that is more than its 16 rows of w, so it takes 32 where blocks are many.
    const bool large = call.sizes.rows > 4 && call.sizes.outputs >= 32 * multiprocessors();
    return large ? with(std::integral_constant<int, 2>{}) : with(std::integral_constant<int, 1>{});
}

template <typename F, bool kSixteen>
int32_t launch_tiles(const LinearCall& call, float* workspace, cudaStream_t stream)
{
    const Layout layout = layout_of(call.sizes, multiprocessors());
    float* const sums = layout.parts > 1 ? workspace : nullptr;
    const auto with = [&](auto columns) {
        constexpr int kColumns = decltype(columns)::value;
        const auto kernel = multiply_tiles<F, kColumns, kSixteen>;
        const dim3 grid(static_cast<unsigned>(over(call.sizes.rows, 8 * kColumns)),
                        static_cast<unsigned>(over(call.sizes.outputs, kTileRows)), static_cast<unsigned>(layout.parts));
        BTP_LAUNCH(kernel, grid, 32 * kTileWarps, tile_shared<kColumns>, stream, call, layout.steps_a_part, sums);
        return launched();
    };
    const int32_t status = layout.columns == 8   ? with(std::integral_constant<int, 8>{})
                           : layout.columns == 4 ? with(std::integral_constant<int, 4>{})
                                                 : with(std::integral_constant<int, 2>{});
    if (status != BTP_OK || layout.parts == 1) {
        return status;
    }
    const dim3 grid(static_cast<unsigned>(over(call.sizes.outputs, 256)), static_cast<unsigned>(call.sizes.rows));
    BTP_LAUNCH(add_parts<F>, grid, 256, 0, stream, call, sums, layout.parts);
    return launched();
}

template <typename F>
int32_t launch(const LinearCall& call, float* workspace, cudaStream_t stream)
{
    if (call.sizes.rows <= kFewRows) {
        return call.sizes.group == 16 ? launch_few_rows<F, true>(call, stream) : launch_few_rows<F, false>(call, stream);
    }
    return call.sizes.group == 16 ? launch_tiles<F, true>(call, workspace, stream)
                                  : launch_tiles<F, false>(call, workspace, stream);
}

int32_t launch(const PlainCall& call, cudaStream_t stream)
{
    const dim3 grid(static_cast<unsigned>(over(call.sizes.outputs, kPlainWarps)),
                    static_cast<unsigned>(over(call.sizes.rows, kPlainRows)));
    BTP_LAUNCH(multiply_float32, grid, 32 * kPlainWarps, 0, stream, call);
    return launched();
}

int log2_of(int32_t group)
{
    int shift = 0;
    while (1 << shift < group) {
        ++shift;
    }
    return shift;
}

}  // namespace
}  // namespace btp

extern "C" const char* btp_linear_problem(const BtpLinear* linear)
{
    static thread_local std::string problem;
    problem = btp::linear_problem(*linear);
    if (problem.empty() && (linear->rows > 65535 || linear->outputs > 128 * 65535)) {
        problem = "BtpLinear: the CUDA kernel takes at most 65535 rows of x and 8388480 of qweight";
    }
    return problem.empty() ? nullptr : problem.c_str();
}

extern "C" size_t btp_linear_workspace(const BtpLinear* linear)
{
    return btp_linear_problem(linear) != nullptr ? 0 : btp::workspace_of(*linear);
}

extern "C" int32_t btp_linear(const BtpLinear* linear, const void* x, const void* qweight, const void* scales,
                              const void* zeros, const void* bias, void* y, void* workspace, size_t workspace_bytes,
                              void* stream)
{
    if (linear == nullptr || btp_linear_problem(linear) != nullptr || (linear->zeros != 0) != (zeros != nullptr)
        || (linear->bias != 0) != (bias != nullptr)) {
        return BTP_BAD_ARGUMENT;
    }
    if (linear->rows == 0) {
        return BTP_OK;
    }
    const bool there = x != nullptr && qweight != nullptr && scales != nullptr && y != nullptr;
    if (!there || (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(qweight)) % 16 != 0) {
        return BTP_BAD_ARGUMENT;
    }
    const size_t wanted = btp_linear_workspace(linear);
    const bool aligned = reinterpret_cast<uintptr_t>(workspace) % 16 == 0;
    if (wanted > 0 && (workspace == nullptr || !aligned || workspace_bytes < wanted)) {
        return BTP_WORKSPACE;
    }
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    const auto* const codes = static_cast<const unsigned char*>(qweight);
    const auto* const points = static_cast<const unsigned char*>(zeros);
    const int shift = btp::log2_of(linear->group);
    if (linear->type == BTP_LINEAR_FLOAT32) {
        return btp::launch(btp::PlainCall{*linear, shift, static_cast<const float*>(x), codes, static_cast<const float*>(scales),
                                          points, static_cast<const float*>(bias), static_cast<float*>(y)},
                           cuda_stream);
    }
    const btp::LinearCall call{*linear, shift, static_cast<const uint16_t*>(x), codes, static_cast<const uint16_t*>(scales),
                               points, static_cast<const uint16_t*>(bias), static_cast<uint16_t*>(y)};
    auto* const sums = static_cast<float*>(workspace);
    return linear->type == BTP_LINEAR_FLOAT16 ? btp::launch<btp::Float16>(call, sums, cuda_stream)
                                              : btp::launch<btp::Bfloat16>(call, sums, cuda_stream);
}
