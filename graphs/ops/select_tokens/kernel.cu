// BtpSelectTokens for CUDA devices. The rule numbers are those of the operator's definition (schema.py).
//
// Two launches:
//   survey_tokens  one warp a token, spread over the whole device: how far its nearest other token is (start of rule 2)
//                  and how many tokens are before it in the order (rule 1). Reads the similarity once.
//   select_tokens  one block a batch row goes from pick to pick; what it knows of the tokens stays in registers (kItems a
//                  thread). Further blocks find meanwhile how near every token is to picks A and the seeds.
//
// Floor: a step cannot start before the one before it has named its token, so
//   steps x (read of one row + minimum + reductions of warp and block, with one barrier).
// docs/native.md carries the arithmetic for the sizes in use.
//
// Distances are float32, 1 - similarity, rounded once (__fsub_rn, never contracted), as unsigned keys in float order; so
// minimum, maximum and the tie rule are integer operations and the indices equal the reference's bit for bit. Gains are sums of
// integers, so their order does not matter.
#include "kernel.h"

#include "rules.h"
#include "selection.cuh"
#include "survey.cuh"

namespace btp {
namespace {

// Blocks take their work in the order in which they start: first the batch rows, which take longest, then the `parts` of
// each row's base. No block waits for one that has not started: see complete_base.
template <typename B, typename Rule>
__global__ void __launch_bounds__(B::kMaxThreads, 1)
select_tokens(const BtpSelect select, const int parts, const typename Rule::Element* __restrict__ matrices,
              const size_t stride, const float* __restrict__ scores, const int32_t* __restrict__ seeds,
              const Survey survey, int32_t* __restrict__ indices)
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
    const uint32_t rows = static_cast<uint32_t>(select.batch);
    if (work >= gridDim.x) {
        __trap();  // another call counts in the same workspace
    }
    const uint32_t batch = work < rows ? work : (work - rows) / static_cast<uint32_t>(parts);
    const Row<typename Rule::Element> row{select, matrices, stride, scores, seeds, survey, batch};
    if (work < rows) {
        Selection<B, Rule> selection{select, row, shared};
        selection.run(parts, indices + size_t{batch} * static_cast<size_t>(select.keep));
    } else {
        find_part<B, Rule>(select, row, parts, shared);
    }
}

int32_t cuda_status(cudaError_t error)
{
    return error == cudaSuccess ? static_cast<int32_t>(BTP_OK) : BTP_CUDA + static_cast<int32_t>(error);
}

// What a call is given.
template <typename T>
struct Call {
    const BtpSelect& select;
    const float* scores;
    const T* similarity;
    const int32_t* seeds;
    const Survey& survey;
    int32_t* indices;
    cudaStream_t stream;
};

template <bool kWide, bool kByGain, typename T>
int32_t launch_survey(const Call<T>& call)
{
    const size_t tokens = static_cast<size_t>(call.select.batch) * static_cast<size_t>(call.select.tokens);
    const auto blocks = static_cast<unsigned>((tokens + kSurveyWarps - 1) / kSurveyWarps);
    const auto kernel = survey_tokens<kWide, kByGain, T>;
    BTP_LAUNCH(kernel, blocks, 32 * kSurveyWarps, 0, call.stream, call.select, call.scores, call.similarity, call.seeds,
               call.survey);
    return cuda_status(cudaGetLastError());
}

// least_warps: more than V needs, where warps do more than to hold tokens.
template <typename B, typename Rule, typename T>
int32_t launch_selection(const Call<T>& call, const typename Rule::Element* matrices, size_t stride, unsigned least_warps)
{
    static_assert(sizeof(typename B::Shared) <= 48 * 1024, "more is given on request only");
    const auto kernel = select_tokens<B, Rule>;
    const int parts = base_parts(call.select);
    const auto blocks = static_cast<unsigned>(call.select.batch) * static_cast<unsigned>(parts + 1);
    constexpr unsigned kWarpTokens = 32 * B::kItems;
    const unsigned warps = (static_cast<unsigned>(call.select.tokens) + kWarpTokens - 1) / kWarpTokens;
    const unsigned threads = 32 * (warps < least_warps ? least_warps : warps);
    BTP_LAUNCH(kernel, blocks, threads, sizeof(typename B::Shared), call.stream, call.select, parts, matrices, stride,
               call.scores, call.seeds, call.survey, call.indices);
    return cuda_status(cudaGetLastError());
}

template <typename T>
int32_t launch_by_distance(const Call<T>& call, bool wide)
{
    const auto stride = static_cast<size_t>(call.select.tokens);
    const auto with = [&](auto block) {
        using B = decltype(block);
        const int32_t status = launch_survey<B::kWide, false>(call);
        return status != BTP_OK ? status
                                : launch_selection<B, ByDistance<B, T>>(call, call.similarity, stride, 1);
    };
    if (call.select.tokens <= Block<4, true>::kTokens) {
        return wide ? with(Block<4, true>{}) : with(Block<4, false>{});
    }
    return wide ? with(Block<8, true>{}) : with(Block<8, false>{});
}

template <typename T>
int32_t launch_by_gain(const Call<T>& call, bool wide)
{
    constexpr unsigned kTokens = 16;  // a warp, until there are 32 warps
    const unsigned most = (static_cast<unsigned>(call.select.tokens) + kTokens - 1) / kTokens;
    const int32_t status = wide ? launch_survey<true, true>(call) : launch_survey<false, true>(call);
    const auto with = [&](auto block) {
        using B = decltype(block);
        return launch_selection<B, ByGain<B>>(call, call.survey.levels, call.survey.stride, most < 32 ? most : 32);
    };
    if (status != BTP_OK) {
        return status;
    }
    return call.select.tokens <= Block<4, true>::kTokens ? with(Block<4, true>{}) : with(Block<8, true>{});
}

template <typename T>
int32_t launch(const Call<T>& call)
{
    const bool wide = call.select.tokens % 4 == 0
                      && reinterpret_cast<uintptr_t>(call.scores) % sizeof(Unit<float, 4>) == 0
                      && reinterpret_cast<uintptr_t>(call.similarity) % sizeof(Unit<T, 4>) == 0;
    return by_gain(call.select) ? launch_by_gain(call, wide) : launch_by_distance(call, wide);
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
    const bool aligned = reinterpret_cast<uintptr_t>(workspace) % 16 == 0;
    if (workspace == nullptr || !aligned || workspace_bytes < btp_select_tokens_workspace(select)) {
        return BTP_WORKSPACE;
    }
    const btp::Survey survey{*select, workspace};
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (select->similarity == BTP_FLOAT16) {
        const auto* const halves = static_cast<const __half*>(similarity);
        return btp::launch<__half>({*select, scores, halves, seeds, survey, indices, cuda_stream});
    }
    const auto* const floats = static_cast<const float*>(similarity);
    return btp::launch<float>({*select, scores, floats, seeds, survey, indices, cuda_stream});
}
