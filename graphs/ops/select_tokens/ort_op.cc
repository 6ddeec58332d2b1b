// BtpSelectTokens as ONNX Runtime custom operator: CPU for all builds, CUDA where the kernels were compiled.
#include "../common/ort_common.h"
#include "cpu.h"
#include "rules.h"

namespace btp {
namespace {

constexpr const char* kName = "BtpSelectTokens";

class SelectTokens {
public:
    static constexpr size_t kInputs = 3;
    static constexpr size_t kRequired = 1;

    static ONNXTensorElementDataType input_type(ONNXTensorElementDataType similarity, size_t index)
    {
        return index == 0   ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
               : index == 1 ? similarity
                            : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    }

    static ONNXTensorElementDataType output_type(ONNXTensorElementDataType)
    {
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    }

    SelectTokens(const OrtOp& op, const OrtKernelInfo* info) : gpu_(op.on_gpu())
    {
        attributes_.similarity = op.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? BTP_FLOAT16 : BTP_FLOAT32;
        attributes_.keep = int_attribute(info, kName, "keep");
        attributes_.attention_quota = int_attribute(info, kName, "attention_quota");
        attributes_.diversity_quota = int_attribute(info, kName, "diversity_quota");
        attributes_.pool = int_attribute(info, kName, "pool");
        attributes_.boundary = int_attribute(info, kName, "boundary");
        attributes_.diversity_rule = choice_attribute(info, kName, "diversity_rule", kDiversityRules);
        const int32_t not_weighted = 0;
        attributes_.weighted = int_attribute(info, kName, "weighted", &not_weighted);
    }

    void run(OrtKernelContext* context) const
    {
        const Input scores = input(context, 0);
        const Input similarity = input(context, 1);
        const Input seeds = input(context, 2);
        if (scores.shape.size() != 2) {
            throw std::invalid_argument(std::string(kName) + ": scores has shape " + text(scores.shape)
                                        + ", wanted [B,V]");
        }
        const int64_t batch = scores.shape[0];
        const int64_t tokens = scores.shape[1];
        BtpSelect select = attributes_;
        select.batch = small(batch);
        select.tokens = small(tokens);
        if (similarity.value == nullptr) {
            select.similarity = BTP_NO_SIMILARITY;
        } else {
            require_shape(kName, "similarity", similarity.shape, {batch, tokens, tokens});
        }
        if (seeds.value != nullptr && similarity.value == nullptr) {
            throw std::invalid_argument(std::string(kName) + ": there are seeds, wanted none, because there is no similarity");
        }
        if (seeds.value != nullptr && seeds.shape.size() != 1) {
            throw std::invalid_argument(std::string(kName) + ": seeds has shape " + text(seeds.shape) + ", wanted [m]");
        }
        select.seeds = seeds.value != nullptr ? small(seeds.shape[0]) : 0;
        require_ok(select_problem(select));
        auto* const indices = static_cast<int32_t*>(output(context, 0, {batch, select.keep}));
        const auto* const score_data = static_cast<const float*>(scores.data);
        const auto* const seed_data = select.seeds > 0 ? static_cast<const int32_t*>(seeds.data) : nullptr;
        if (gpu_) {
            run_gpu(context, select, scores.value, score_data, similarity.data, seed_data, indices);
        } else {
            run_cpu(select, score_data, similarity.data, seed_data, indices);
        }
    }

private:
    static void run_cpu(const BtpSelect& select, const float* scores, const void* similarity, const int32_t* seeds,
                        int32_t* indices)
    {
        const size_t tokens = static_cast<size_t>(select.tokens);
        const size_t matrix = tokens * tokens * (select.similarity == BTP_FLOAT16 ? 2 : 4);
        for (int32_t seed = 0; seed < select.seeds; ++seed) {
            if (seeds[seed] < 0 || seeds[seed] >= select.tokens) {
                throw std::invalid_argument(std::string(kName) + ": seed " + std::to_string(seeds[seed])
                                            + " is outside 0 to " + std::to_string(select.tokens - 1));
            }
        }
        for (size_t row = 0; row < static_cast<size_t>(select.batch); ++row) {
            const void* const own =
                similarity == nullptr ? nullptr : static_cast<const char*>(similarity) + row * matrix;
            select_tokens_cpu(select, scores + row * tokens, own, seeds,
                              indices + row * static_cast<size_t>(select.keep));
        }
    }

#ifdef BTP_WITH_CUDA
    static void run_gpu(OrtKernelContext* context, const BtpSelect& select, const OrtValue* on_device,
                        const float* scores, const void* similarity, const int32_t* seeds, int32_t* indices)
    {
        void* stream = nullptr;
        check(ort()->KernelContext_GetGPUComputeStream(context, &stream));
        const char* const problem = btp_select_tokens_problem(&select);
        require_ok(problem != nullptr ? problem : "");
        const size_t bytes = btp_select_tokens_workspace(&select);
        const StreamBuffer workspace(context, on_device, bytes);
        const int32_t status =
            btp_select_tokens(&select, scores, similarity, seeds, indices, workspace.data(), bytes, stream);
        if (status != BTP_OK) {
            throw std::runtime_error(std::string(kName) + ": " + btp_error_string(status));
        }
    }
#else
    static void run_gpu(OrtKernelContext*, const BtpSelect&, const OrtValue*, const float*, const void*, const int32_t*,
                        int32_t*)
    {
        throw std::logic_error("BtpSelectTokens: this library was built without CUDA kernels");
    }
#endif

    BtpSelect attributes_{};
    const bool gpu_;
};

std::vector<OrtOp> ops_of(bool with_gpu)
{
    std::vector<OrtOp> ops;
    for (const auto type : {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16}) {
        ops.push_back(ort_op<SelectTokens>(kName, nullptr, type));
        if (with_gpu) {
            ops.push_back(ort_op<SelectTokens>(kName, "CUDAExecutionProvider", type));
        }
    }
    return ops;
}

const OrtRegistration registration(ops_of);

}  // namespace
}  // namespace btp
