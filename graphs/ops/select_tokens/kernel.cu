// BtpSelectTokens for CUDA devices. The rule numbers are those of the operator's definition (schema.py).
//
// Two launches at most:
//   nearest_other  one warp a token: its smallest distance to any other token (start of rule 2); reads the similarity
//                  once, spread over the whole device. Left out when no farthest-point selection starts from nothing.
//   select_tokens  one block a batch row does all the rest: order, picks, base, fill, ascending output. The distances of
//                  all tokens stay in registers (kItems a thread); one step of the farthest-point loop is one row read,
//                  a minimum, two levels of warp redux and one barrier.
//
// Floor of the loop: a step cannot start before the one before it has named its token, so
//   steps x (read of one row from L2 + minimum + redux pair + shared write, barrier, read + redux pair).
// docs/native.md carries the arithmetic for the sizes in use.
//
// Distances are float32, 1 - similarity, rounded once (__fsub_rn, never contracted), as unsigned keys in float order; so
// minimum, maximum and the tie rule are integer operations and the indices equal the reference's bit for bit.
#include "kernel.h"

#include "rules.h"
#include "selection.cuh"

namespace btp {
namespace {

constexpr int kRowWarps = 8;  // warps a block of nearest_other

// nearest[b,i] = key of the smallest distance from token i to another token; similarity [B,V,V], rows = B * V.
template <typename T>
__global__ void nearest_other(const T* __restrict__ similarity, int tokens, int rows, uint32_t* __restrict__ nearest)
{
    const int lane = static_cast<int>(threadIdx.x) & 31;
    const int row = static_cast<int>(blockIdx.x) * kRowWarps + (static_cast<int>(threadIdx.x) >> 5);
    if (row >= rows) {
        return;  // whole warps leave, and the block has no barrier
    }
    const T* const values = similarity + static_cast<size_t>(row) * tokens;
    const int self = row % tokens;
    uint32_t best = kNone;
#pragma unroll 8
    for (int other = lane; other < tokens; other += 32) {
        const uint32_t key = distance_key(values[other]);
        best = other == self ? best : lower(best, key);
    }
    best = warp_min(best);
    if (lane == 0) {
        nearest[row] = best;
    }
}

template <typename B, typename T>
__global__ void __launch_bounds__(B::kThreads, 1)
select_tokens(const BtpSelect select, const float* __restrict__ scores, const T* __restrict__ similarity,
              const int32_t* __restrict__ seeds, const uint32_t* __restrict__ nearest, int32_t* __restrict__ indices)
{
    BTP_DYNAMIC_SHARED(memory);
    const size_t row = blockIdx.x;
    const size_t tokens = static_cast<size_t>(select.tokens);
    Selection<B, T> selection{select,
                              scores + row * tokens,
                              similarity == nullptr ? nullptr : similarity + row * tokens * tokens,
                              seeds,
                              nearest == nullptr ? nullptr : nearest + row * tokens,
                              *reinterpret_cast<typename B::Shared*>(memory)};
    selection.run(indices + row * static_cast<size_t>(select.keep));
}

bool starts_from_nothing(const BtpSelect& s)
{
    return s.similarity != BTP_NO_SIMILARITY
           && (s.diversity_quota > 0 || (s.attention_quota == 0 && s.seeds == 0));
}

int32_t cuda_status(cudaError_t error)
{
    return error == cudaSuccess ? static_cast<int32_t>(BTP_OK) : BTP_CUDA + static_cast<int32_t>(error);
}

template <typename B, typename T>
int32_t launch_block(const BtpSelect& select, const float* scores, const T* similarity, const int32_t* seeds,
                     const uint32_t* nearest, int32_t* indices, cudaStream_t stream)
{
    const auto kernel = select_tokens<B, T>;
    constexpr size_t shared = sizeof(typename B::Shared);
    if (shared > 48 * 1024) {
        // More than 48 KiB of shared memory is given on request only; devices that have less refuse here.
        const cudaError_t raised = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
        if (raised != cudaSuccess) {
            (void)cudaGetLastError();
            return BTP_TOO_LARGE;
        }
    }
    BTP_LAUNCH(kernel, static_cast<unsigned>(select.batch), B::kThreads, shared, stream, select, scores, similarity,
               seeds, nearest, indices);
    return cuda_status(cudaGetLastError());
}

template <typename T>
int32_t launch(const BtpSelect& select, const float* scores, const T* similarity, const int32_t* seeds,
               uint32_t* nearest, int32_t* indices, cudaStream_t stream)
{
    if (nearest != nullptr) {
        const int rows = select.batch * select.tokens;
        const unsigned blocks = static_cast<unsigned>((rows + kRowWarps - 1) / kRowWarps);
        BTP_LAUNCH(nearest_other<T>, blocks, 32 * kRowWarps, 0, stream, similarity, select.tokens, rows, nearest);
        const int32_t status = cuda_status(cudaGetLastError());
        if (status != BTP_OK) {
            return status;
        }
    }
    const auto with = [&](auto block) {
        return launch_block<decltype(block), T>(select, scores, similarity, seeds, nearest, indices, stream);
    };
    if (select.tokens <= Block<128, 4>::kTokens) {
        return with(Block<128, 4>{});
    }
    if (select.tokens <= Block<256, 4>::kTokens) {
        return with(Block<256, 4>{});
    }
    if (select.tokens <= Block<512, 4>::kTokens) {
        return with(Block<512, 4>{});
    }
    if (select.tokens <= Block<1024, 4>::kTokens) {
        return with(Block<1024, 4>{});
    }
    return with(Block<1024, 8>{});
}

}  // namespace
}  // namespace btp

extern "C" const char* btp_select_tokens_problem(const BtpSelect* select)
{
    static thread_local std::string problem;
    problem = btp::select_problem(*select);
    if (problem.empty() && select->tokens > BTP_SELECT_MAX_TOKENS) {
        problem = "BtpSelectTokens: the number of tokens is " + std::to_string(select->tokens)
                  + ", the CUDA kernel takes at most " + std::to_string(static_cast<int>(BTP_SELECT_MAX_TOKENS));
    }
    return problem.empty() ? nullptr : problem.c_str();
}

extern "C" size_t btp_select_tokens_workspace(const BtpSelect* select)
{
    if (btp_select_tokens_problem(select) != nullptr || !btp::starts_from_nothing(*select)) {
        return 0;
    }
    return sizeof(uint32_t) * static_cast<size_t>(select->batch) * static_cast<size_t>(select->tokens);
}

extern "C" int32_t btp_select_tokens(const BtpSelect* select, const float* scores, const void* similarity,
                                     const int32_t* seeds, int32_t* indices, void* workspace, size_t workspace_bytes,
                                     void* stream)
{
    const bool typed = select != nullptr && (select->similarity != BTP_NO_SIMILARITY) == (similarity != nullptr)
                       && (select->seeds > 0) == (seeds != nullptr);
    if (!typed || scores == nullptr || indices == nullptr || btp_select_tokens_problem(select) != nullptr) {
        return BTP_BAD_ARGUMENT;
    }
    const size_t wanted = btp_select_tokens_workspace(select);
    if (workspace_bytes < wanted || (wanted > 0 && workspace == nullptr)) {
        return BTP_WORKSPACE;
    }
    uint32_t* const nearest = wanted > 0 ? static_cast<uint32_t*>(workspace) : nullptr;
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (select->similarity == BTP_FLOAT16) {
        return btp::launch(*select, scores, static_cast<const __half*>(similarity), seeds, nearest, indices, cuda_stream);
    }
    return btp::launch(*select, scores, static_cast<const float*>(similarity), seeds, nearest, indices, cuda_stream);
}
