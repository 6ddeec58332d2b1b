// BtpSelectTokens as TensorRT plugin (IPluginV3): float32 scores, float32 or float16 similarity, int32 seeds and indices.
#include "../common/trt_common.h"
#include "rules.h"

namespace btp {
namespace {

using nvinfer1::DataType;
using nvinfer1::PluginTensorDesc;

class SelectTokens : public Plugin<SelectTokens> {
public:
    static constexpr const char* kName = "BtpSelectTokens";

    static const std::vector<Attribute>& attributes_of()
    {
        static const std::vector<Attribute> all{{"keep"},
                                                {"attention_quota"},
                                                {"diversity_quota"},
                                                {"pool"},
                                                {"boundary"},
                                                {"diversity_rule", kDiversityRules, true},
                                                {"weighted", nullptr, true},
                                                {"inputs", nullptr, true, true}};
        return all;
    }

    // enqueue() is not told how many inputs there are. Known since the engine was built, and in the engine.
    void note_inputs(int32_t inputs) noexcept { set_value(kInputs, inputs); }

    explicit SelectTokens(std::vector<int32_t> values) : Plugin(std::move(values))
    {
        require_ok(select_problem(attributes(kUnknown, kUnknown, 3, BTP_FLOAT32)));
    }

    int32_t getOutputDataTypes(DataType* output, int32_t, const DataType*, int32_t) const noexcept override
    {
        output[0] = DataType::kINT32;
        return 0;
    }

    int32_t getOutputShapes(const nvinfer1::DimsExprs* in, int32_t inputs, const nvinfer1::DimsExprs*, int32_t,
                            nvinfer1::DimsExprs* out, int32_t, nvinfer1::IExprBuilder& builder) noexcept override
    {
        return guarded<int32_t>(-1, [&] {
            require_inputs(inputs);
            require_rank(kName, "scores", in[0].nbDims, 2);
            const int32_t tokens = constant_or(in[0].d[1], kUnknown);
            BtpSelect select = attributes(constant_or(in[0].d[0], kUnknown), tokens, inputs, BTP_FLOAT32);
            if (inputs > 1) {
                require_rank(kName, "similarity", in[1].nbDims, 3);
                for (int axis = 0; axis < 3; ++axis) {
                    const int32_t wanted = axis == 0 ? select.batch : tokens;
                    const int32_t got = constant_or(in[1].d[axis], wanted);
                    if (wanted != kUnknown) {
                        require_same(kName, "a dimension of similarity", got, wanted);
                    }
                }
            }
            if (inputs > 2) {
                require_rank(kName, "seeds", in[2].nbDims, 1);
                select.seeds = constant_or(in[2].d[0], 0);
            }
            require_ok(select_problem(select));
            out[0].nbDims = 2;
            out[0].d[0] = in[0].d[0];
            out[0].d[1] = builder.constant(select.keep);
            return 0;
        });
    }

    bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t inputs,
                                   int32_t) noexcept override
    {
        const PluginTensorDesc& tensor = tensors[position].desc;
        if (!is_linear(tensor)) {
            return false;
        }
        if (position == 0) {
            return tensor.type == DataType::kFLOAT;
        }
        if (position == 1 && inputs > 1) {
            return tensor.type == DataType::kFLOAT || tensor.type == DataType::kHALF;
        }
        return tensor.type == DataType::kINT32;
    }

    size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
                            const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept override
    {
        const BtpSelect select =
            attributes(static_cast<int32_t>(in[0].max.d[0]), static_cast<int32_t>(in[0].max.d[1]), inputs,
                       inputs > 1 && in[1].desc.type == DataType::kHALF ? BTP_FLOAT16 : BTP_FLOAT32);
        return btp_select_tokens_workspace(&select);
    }

    int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override
    {
        return guarded<int32_t>(-1, [&] {
            const BtpSelect select = sizes(in, values()[kInputs]);
            const size_t bytes = btp_select_tokens_workspace(&select);
            const int32_t status = btp_select_tokens(
                &select, static_cast<const float*>(inputs[0]), select.similarity != BTP_NO_SIMILARITY ? inputs[1] : nullptr,
                select.seeds > 0 ? static_cast<const int32_t*>(inputs[2]) : nullptr, static_cast<int32_t*>(outputs[0]),
                workspace, bytes, stream);
            require_ok(status == BTP_OK ? "" : std::string(kName) + ": " + btp_error_string(status));
            return 0;
        });
    }

    // The selection for these tensors; throws where they break the rules.
    BtpSelect sizes(const PluginTensorDesc* in, int32_t inputs) const
    {
        require_inputs(inputs);
        require_rank(kName, "scores", in[0].dims.nbDims, 2);
        const auto batch = static_cast<int32_t>(in[0].dims.d[0]);
        const auto tokens = static_cast<int32_t>(in[0].dims.d[1]);
        BtpSelect select = attributes(batch, tokens, inputs,
                                      inputs > 1 && in[1].type == DataType::kHALF ? BTP_FLOAT16 : BTP_FLOAT32);
        if (inputs > 1) {
            require_rank(kName, "similarity", in[1].dims.nbDims, 3);
            require_same(kName, "dimension 0 of similarity", in[1].dims.d[0], batch);
            require_same(kName, "dimension 1 of similarity", in[1].dims.d[1], tokens);
            require_same(kName, "dimension 2 of similarity", in[1].dims.d[2], tokens);
        }
        if (inputs > 2) {
            require_rank(kName, "seeds", in[2].dims.nbDims, 1);
            select.seeds = static_cast<int32_t>(in[2].dims.d[0]);
        }
        const char* const problem = btp_select_tokens_problem(&select);
        require_ok(problem != nullptr ? problem : "");
        return select;
    }

private:
    static constexpr size_t kInputs = 7;  // the place of "inputs"

    static void require_inputs(int32_t inputs)
    {
        if (inputs < 1 || inputs > 3) {
            throw std::invalid_argument(std::string(kName) + ": got " + std::to_string(inputs)
                                        + " inputs, wanted scores, similarity (optional), seeds (optional)");
        }
    }

    BtpSelect attributes(int32_t batch, int32_t tokens, int32_t inputs, int32_t similarity) const
    {
        const std::vector<int32_t>& v = values();
        const int32_t type = inputs > 1 ? similarity : BTP_NO_SIMILARITY;
        return BtpSelect{batch, tokens, v[0], v[1], v[2], v[3], v[4], 0, type, v[5], v[6]};
    }
};

BTP_REGISTER_PLUGIN(SelectTokens);

}  // namespace
}  // namespace btp
