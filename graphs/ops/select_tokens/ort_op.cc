// BtpSelectTokens as ONNX Runtime custom operator: CPU for all builds, CUDA where the kernels were compiled.
#include "../common/ort_common.h"
#include "cpu.h"
#include "rules.h"

namespace btp {
namespace {

constexpr const char* kName = "BtpSelectTokens";
constexpr const char* kByRows = "BtpSelectTokensByRows";

// Attributes that selections have in common; the rest is what the inputs say.
BtpSelect read_attributes(const OrtKernelInfo* info, const char* name)
{
    BtpSelect select{};
    select.keep = int_attribute(info, name, "keep");
    select.attention_quota = int_attribute(info, name, "attention_quota");
    select.diversity_quota = int_attribute(info, name, "diversity_quota");
    select.pool = int_attribute(info, name, "pool");
    select.boundary = int_attribute(info, name, "boundary");
    select.diversity_rule = choice_attribute(info, name, "diversity_rule", kDiversityRules);
    const int32_t not_weighted = 0;
    select.weighted = int_attribute(info, name, "weighted", &not_weighted);
    return select;
}

void require_seeds(const char* name, const int32_t* seeds, const BtpSelect& select)
{
    for (int32_t seed = 0; seed < select.seeds; ++seed) {
        if (seeds[seed] < 0 || seeds[seed] >= select.tokens) {
            throw std::invalid_argument(std::string(name) + ": seed " + std::to_string(seeds[seed])
                                        + " is outside 0 to " + std::to_string(select.tokens - 1));
        }
    }
}

int32_t number_of_seeds(const char* name, const Input& seeds)
{
    if (seeds.value != nullptr && seeds.shape.size() != 1) {
        throw std::invalid_argument(std::string(name) + ": seeds has shape " + text(seeds.shape) + ", wanted [m]");
    }
    return seeds.value != nullptr ? small(seeds.shape[0]) : 0;
}

class SelectTokens : public Operands<3, 1> {
public:
    static ONNXTensorElementDataType input_type(ONNXTensorElementDataType similarity, size_t index)
    {
        return index == 0   ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
               : index == 1 ? similarity
                            : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    }

    static ONNXTensorElementDataType output_type(ONNXTensorElementDataType, size_t)
    {
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    }

    SelectTokens(const OrtOp& op, const OrtKernelInfo* info)
        : attributes_(read_attributes(info, kName)), gpu_(op.on_gpu())
    {
        attributes_.similarity = op.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? BTP_FLOAT16 : BTP_FLOAT32;
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
        select.seeds = number_of_seeds(kName, seeds);
        require_ok(select_problem(select));
        auto* const indices = static_cast<int32_t*>(output(context, 0, {batch, select.keep}));
        const auto* const score_data = static_cast<const float*>(scores.data);
        const auto* const seed_data = select.seeds > 0 ? static_cast<const int32_t*>(seeds.data) : nullptr;
        if (gpu_) {
            run_gpu(context, select, scores.value, score_data, similarity.data, seed_data, indices);
        } else {
            run_cpu(context, select, scores.value, score_data, similarity.data, seed_data, indices);
        }
    }

private:
    static void run_cpu(const OrtKernelContext* context, const BtpSelect& select, const OrtValue* beside,
                        const float* scores, const void* similarity, const int32_t* seeds, int32_t* indices)
    {
        require_seeds(kName, seeds, select);
        const size_t tokens = static_cast<size_t>(select.tokens);
        const size_t matrix = tokens * tokens * (select.similarity == BTP_FLOAT16 ? 2 : 4);
        const StreamBuffer scratch(context, beside, select_tokens_cpu_scratch(select));
        for (size_t row = 0; row < static_cast<size_t>(select.batch); ++row) {
            const void* const own =
                similarity == nullptr ? nullptr : static_cast<const char*>(similarity) + row * matrix;
            select_tokens_cpu(select, scores + row * tokens, own, seeds, scratch.data(),
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

    BtpSelect attributes_;
    const bool gpu_;
};

// Coverage without a similarity: from the rows whose cosines it would be. On the CPU only, and in no file: it is put in
// place of the nodes that compute the similarity when a session is prepared (engines/runners/on_cpu/selection.py).
//   rows [B,S,C] float32, scores [B,V] (optional), seeds [m] int32 (optional) -> indices [B,keep] int32, norms [B,V]
// The V tokens begin at row `start`; from their rows the mean is taken if `centred` is 1. Without scores the norms are.
class SelectTokensByRows : public Operands<3, 1, 2> {
public:
    static ONNXTensorElementDataType input_type(ONNXTensorElementDataType, size_t index)
    {
        return index < 2 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    }

    static ONNXTensorElementDataType output_type(ONNXTensorElementDataType, size_t index)
    {
        return index == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }

    SelectTokensByRows(const OrtOp&, const OrtKernelInfo* info)
        : attributes_(read_attributes(info, kByRows)), start_(int_attribute(info, kByRows, "start")),
          centred_(int_attribute(info, kByRows, "centred") != 0)
    {
        attributes_.tokens = int_attribute(info, kByRows, "count");
        attributes_.similarity = BTP_FLOAT32;
        if (attributes_.diversity_rule != BTP_COVERAGE) {
            throw std::invalid_argument(std::string(kByRows) + ": diversity_rule is \"farthest\", wanted \"coverage\"");
        }
    }

    void run(OrtKernelContext* context) const
    {
        const Input rows = input(context, 0);
        const Input scores = input(context, 1);
        const Input seeds = input(context, 2);
        BtpSelect select = attributes_;
        const bool whole = rows.shape.size() == 3 && start_ >= 0 && rows.shape[1] >= int64_t{start_} + select.tokens;
        if (!whole) {
            throw std::invalid_argument(std::string(kByRows) + ": rows has shape " + text(rows.shape) + ", wanted [B,S,C], S "
                                        + std::to_string(int64_t{start_} + select.tokens) + " or more");
        }
        select.batch = small(rows.shape[0]);
        select.seeds = number_of_seeds(kByRows, seeds);
        const int64_t batch = rows.shape[0], tokens = select.tokens;
        if (scores.value != nullptr) {
            require_shape(kByRows, "scores", scores.shape, {batch, tokens});
        }
        require_ok(select_problem(select));
        const auto* const seed_data = select.seeds > 0 ? static_cast<const int32_t*>(seeds.data) : nullptr;
        require_seeds(kByRows, seed_data, select);
        auto* indices = static_cast<int32_t*>(output(context, 0, {batch, select.keep}));
        auto* norms = static_cast<float*>(output(context, 1, {batch, tokens}));
        const int width = small(rows.shape[2]);
        const StreamBuffer scratch(context, rows.value, select_rows_cpu_scratch(select, width));
        const Parallel parallel = [context](int count, const std::function<void(int)>& task) {
            parallel_for(context, count, task);
        };
        const auto* const score_data = static_cast<const float*>(scores.data);
        for (int64_t sample = 0; sample < batch; ++sample) {
            const auto* const first =
                static_cast<const float*>(rows.data) + (sample * rows.shape[1] + start_) * rows.shape[2];
            select_rows_cpu(select, {first, width, centred_}, score_data == nullptr ? nullptr : score_data + sample * tokens,
                            seed_data, parallel, scratch.data(), indices + sample * select.keep,
                            norms + sample * tokens);
        }
    }

private:
    BtpSelect attributes_;
    const int32_t start_;
    const bool centred_;
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
    ops.push_back(ort_op<SelectTokensByRows>(kByRows, nullptr, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT));
    return ops;
}

const OrtRegistration registration(ops_of);

}  // namespace
}  // namespace btp
