// BtpGatherTokens for CUDA devices: rows of bytes, copied in the widest units that their size and addresses allow.
//
// Floor: (B * (S-count+k) * row bytes) * 2 / memory bandwidth; every byte is read once and written once. A thread copies
// kUnroll units of up to 16 bytes with all reads issued before the first write.
#include "kernel.h"

#include "../common/device.h"
#include "rules.h"

namespace btp {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

// Grid (output rows / rows a block, B); block (threads a row, rows a block).
template <typename Unit>
__global__ void __launch_bounds__(kThreads)
gather_tokens(const BtpGather gather, int units, const Unit* __restrict__ tokens, const int32_t* __restrict__ indices,
              Unit* __restrict__ output)
{
    const int rows_out = gather.rows - gather.count + gather.kept;
    const int row = static_cast<int>(blockIdx.x * blockDim.y + threadIdx.y);
    if (row >= rows_out) {
        return;
    }
    const size_t batch = blockIdx.y;
    int source = row;
    if (row >= gather.start + gather.kept) {
        source = row - gather.kept + gather.count;
    } else if (row >= gather.start) {
        int index = indices[batch * static_cast<size_t>(gather.kept) + static_cast<size_t>(row - gather.start)];
        index = index < 0 ? 0 : index >= gather.count ? gather.count - 1 : index;
        source = gather.start + index;
    }
    const size_t width = static_cast<size_t>(units);
    const Unit* const from = tokens + (batch * static_cast<size_t>(gather.rows) + static_cast<size_t>(source)) * width;
    Unit* const to = output + (batch * static_cast<size_t>(rows_out) + static_cast<size_t>(row)) * width;
    const int step = static_cast<int>(blockDim.x);
    for (int first = static_cast<int>(threadIdx.x); first < units; first += step * kUnroll) {
        Unit value[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            if (first + i * step < units) {
                value[i] = from[first + i * step];
            }
        }
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            if (first + i * step < units) {
                to[first + i * step] = value[i];
            }
        }
    }
}

template <typename Unit>
int32_t launch(const BtpGather& gather, const void* tokens, const int32_t* indices, void* output, cudaStream_t stream)
{
    const int units = static_cast<int>(gather.row_bytes / static_cast<int64_t>(sizeof(Unit)));
    const int rows_out = gather.rows - gather.count + gather.kept;
    unsigned across = 1;
    while (across < kThreads && static_cast<int>(across) * kUnroll < units) {
        across *= 2;
    }
    const unsigned down = kThreads / across;
    const dim3 grid((static_cast<unsigned>(rows_out) + down - 1) / down, static_cast<unsigned>(gather.batch));
    BTP_LAUNCH(gather_tokens<Unit>, grid, dim3(across, down), 0, stream, gather, units,
               static_cast<const Unit*>(tokens), indices, static_cast<Unit*>(output));
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? static_cast<int32_t>(BTP_OK) : BTP_CUDA + static_cast<int32_t>(error);
}

}  // namespace
}  // namespace btp

extern "C" const char* btp_gather_tokens_problem(const BtpGather* gather)
{
    static thread_local std::string problem;
    problem = btp::gather_problem(*gather);
    if (problem.empty() && (gather->batch > 65535 || gather->row_bytes > INT32_MAX)) {
        problem = "BtpGatherTokens: batch or row size is too large for the CUDA kernel (at most 65535, 2 GiB)";
    }
    return problem.empty() ? nullptr : problem.c_str();
}

extern "C" int32_t btp_gather_tokens(const BtpGather* gather, const void* tokens, const int32_t* indices, void* output,
                                     void* stream)
{
    if (gather == nullptr || btp_gather_tokens_problem(gather) != nullptr) {
        return BTP_BAD_ARGUMENT;
    }
    if (gather->rows - gather->count + gather->kept == 0) {
        return BTP_OK;
    }
    if (tokens == nullptr || output == nullptr || (gather->kept > 0 && indices == nullptr)) {
        return BTP_BAD_ARGUMENT;
    }
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    const uintptr_t alignment = reinterpret_cast<uintptr_t>(tokens) | reinterpret_cast<uintptr_t>(output)
                                | static_cast<uintptr_t>(gather->row_bytes);
    if (alignment % 16 == 0) {
        return btp::launch<uint4>(*gather, tokens, indices, output, cuda_stream);
    }
    if (alignment % 4 == 0) {
        return btp::launch<uint32_t>(*gather, tokens, indices, output, cuda_stream);
    }
    if (alignment % 2 == 0) {
        return btp::launch<uint16_t>(*gather, tokens, indices, output, cuda_stream);
    }
    return btp::launch<uint8_t>(*gather, tokens, indices, output, cuda_stream);
}
