// BtpSelectTokens for CUDA devices. The rule numbers are those of the operator's definition (schema.py).
//
// Two launches:
//   survey_tokens  one warp a token, spread over the whole device: how far its nearest other token is (start of rule 2)
//                  and how many tokens are before it in the order (rule 1). Reads the similarity once.
//   select_tokens  one block a batch row goes from pick to pick; the distances of all tokens stay in registers (kItems a
//                  thread). Further blocks find meanwhile how far every token is from picks A and the seeds.
//
// Floor: a step cannot start before the one before it has named its token, so
//   steps x (read of one row + minimum + reductions of warp and block, with one barrier).
// docs/native.md carries the arithmetic for the sizes in use.
//
// Distances are float32, 1 - similarity, rounded once (__fsub_rn, never contracted), as unsigned keys in float order; so
// minimum, maximum and the tie rule are integer operations and the indices equal the reference's bit for bit.
#include "kernel.h"

#include "rules.h"
#include "selection.cuh"
#include "survey.cuh"

namespace btp {
namespace {

// Blocks take their work in the order in which they start: first the `parts` of approach_base for each batch row, then the
// rows themselves. So a block only ever waits for blocks that are running or done, whatever the order of their numbers.
template <typename B, typename T>
__global__ void __launch_bounds__(B::kMaxThreads, 1)
select_tokens(const BtpSelect select, const int parts, const T* __restrict__ similarity,
              const int32_t* __restrict__ seeds, const Survey survey, int32_t* __restrict__ indices)
{
    BTP_DYNAMIC_SHARED(memory);
    auto& shared = *reinterpret_cast<typename B::Shared*>(memory);
    uint32_t work = blockIdx.x;
    if (parts > 0) {
        if (threadIdx.x == 0) {
            shared.word = atomicAdd(survey.ticket, 1u);
        }
        __syncthreads();
        work = shared.word;
        __syncthreads();
    }
    const uint32_t before = static_cast<uint32_t>(parts) * static_cast<uint32_t>(select.batch);
    if (work < before) {
        const uint32_t batch = work / static_cast<uint32_t>(parts);
        const Row<T> row{select, similarity, seeds, survey, batch};
        approach_base<B>(select, row, static_cast<int>(work % static_cast<uint32_t>(parts)), shared);
    } else {
        const size_t batch = work - before;
        const Row<T> row{select, similarity, seeds, survey, batch};
        Selection<B, T> selection{select, row, shared};
        selection.run(parts, indices + batch * static_cast<size_t>(select.keep));
    }
}

int32_t cuda_status(cudaError_t error)
{
    return error == cudaSuccess ? static_cast<int32_t>(BTP_OK) : BTP_CUDA + static_cast<int32_t>(error);
}

template <typename B, typename T>
int32_t launch(const BtpSelect& select, const float* scores, const T* similarity, const int32_t* seeds,
               const Survey& survey, int32_t* indices, cudaStream_t stream)
{
    const size_t tokens = static_cast<size_t>(select.batch) * static_cast<size_t>(select.tokens);
    const auto surveys = static_cast<unsigned>((tokens + kSurveyWarps - 1) / kSurveyWarps);
    const auto survey_kernel = survey_tokens<B::kWide, T>;
    BTP_LAUNCH(survey_kernel, surveys, 32 * kSurveyWarps, 0, stream, select, scores, similarity, survey);
    const int32_t status = cuda_status(cudaGetLastError());
    if (status != BTP_OK) {
        return status;
    }
    const auto kernel = select_tokens<B, T>;
    const int parts = base_parts(select);
    const auto blocks = static_cast<unsigned>(select.batch) * static_cast<unsigned>(parts + 1);
    constexpr unsigned kWarpTokens = 32 * B::kItems;
    const unsigned threads = (static_cast<unsigned>(select.tokens) + kWarpTokens - 1) / kWarpTokens * 32;
    BTP_LAUNCH(kernel, blocks, threads, sizeof(typename B::Shared), stream, select, parts, similarity, seeds, survey,
               indices);
    return cuda_status(cudaGetLastError());
}

template <typename T>
int32_t launch(const BtpSelect& select, const float* scores, const T* similarity, const int32_t* seeds,
               const Survey& survey, int32_t* indices, cudaStream_t stream)
{
    const auto with = [&](auto block) {
        static_assert(sizeof(typename decltype(block)::Shared) <= 48 * 1024, "more is given on request only");
        return launch<decltype(block), T>(select, scores, similarity, seeds, survey, indices, stream);
    };
    const bool wide = select.tokens % 4 == 0 && reinterpret_cast<uintptr_t>(scores) % sizeof(Unit<float, 4>) == 0
                      && reinterpret_cast<uintptr_t>(similarity) % sizeof(Unit<T, 4>) == 0;
    if (select.tokens <= Block<4, true>::kTokens) {
        return wide ? with(Block<4, true>{}) : with(Block<4, false>{});
    }
    return wide ? with(Block<8, true>{}) : with(Block<8, false>{});
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
    return btp_select_tokens_problem(select) != nullptr ? 0 : btp::Survey::bytes(*select);
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
    if (workspace == nullptr || workspace_bytes < btp_select_tokens_workspace(select)) {
        return BTP_WORKSPACE;
    }
    const btp::Survey survey{*select, workspace};
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (select->similarity == BTP_FLOAT16) {
        return btp::launch(*select, scores, static_cast<const __half*>(similarity), seeds, survey, indices, cuda_stream);
    }
    return btp::launch(*select, scores, static_cast<const float*>(similarity), seeds, survey, indices, cuda_stream);
}
