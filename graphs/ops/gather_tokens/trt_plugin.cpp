// BtpGatherTokens as TensorRT plugin (IPluginV3): float32, float16 or bfloat16 tokens, int32 indices.
#include "../common/trt_common.h"
#include "rules.h"

namespace btp {
namespace {

using nvinfer1::DataType;
using nvinfer1::PluginTensorDesc;

class GatherTokens : public Plugin<GatherTokens> {
public:
    static constexpr const char* kName = "BtpGatherTokens";

    static const std::vector<Attribute>& attributes_of()
    {
        static const std::vector<Attribute> all{{"start"}, {"count"}};
        return all;
    }

    explicit GatherTokens(std::vector<int32_t> values) : Plugin(std::move(values))
    {
        // The rows are not known yet: any number that start and count can fit in shows what is wrong with them alone.
        require_ok(gather_problem(BtpGather{1, INT32_MAX, start(), count(), 0, 1}));
    }

    int32_t getOutputDataTypes(DataType* output, int32_t, const DataType* input, int32_t) const noexcept override
    {
        output[0] = input[0];
        return 0;
    }

    int32_t getOutputShapes(const nvinfer1::DimsExprs* in, int32_t inputs, const nvinfer1::DimsExprs*, int32_t,
                            nvinfer1::DimsExprs* out, int32_t, nvinfer1::IExprBuilder& builder) noexcept override
    {
        return guarded<int32_t>(-1, [&] {
            require_ranks(inputs, in[0].nbDims, inputs > 1 ? in[1].nbDims : 0);
            BtpGather gather{constant_or(in[0].d[0], 1), constant_or(in[0].d[1], INT32_MAX), start(), count(),
                             constant_or(in[1].d[1], 0), 1};
            require_same(kName, "dimension 0 of indices", constant_or(in[1].d[0], gather.batch), gather.batch);
            require_ok(gather_problem(gather));
            using Operation = nvinfer1::DimensionOperation;
            out[0] = in[0];
            const auto* const others = builder.operation(Operation::kSUB, *in[0].d[1], *builder.constant(count()));
            out[0].d[1] = builder.operation(Operation::kSUM, *others, *in[1].d[1]);
            return 0;
        });
    }

    bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t,
                                   int32_t) noexcept override
    {
        const PluginTensorDesc& tensor = tensors[position].desc;
        if (!is_linear(tensor)) {
            return false;
        }
        switch (position) {
        case 0:
            return tensor.type == DataType::kFLOAT || tensor.type == DataType::kHALF || tensor.type == DataType::kBF16;
        case 1: return tensor.type == DataType::kINT32;
        default: return tensor.type == tensors[0].desc.type;
        }
    }

    int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs,
                    void* const* outputs, void*, cudaStream_t stream) noexcept override
    {
        return guarded<int32_t>(-1, [&] {
            const BtpGather gather = sizes(in, 2);
            const int32_t status = btp_gather_tokens(&gather, inputs[0], static_cast<const int32_t*>(inputs[1]),
                                                     outputs[0], stream);
            require_ok(status == BTP_OK ? "" : std::string(kName) + ": " + btp_error_string(status));
            return 0;
        });
    }

    // The gather for these tensors; throws where they break the rules.
    BtpGather sizes(const PluginTensorDesc* in, int32_t inputs) const
    {
        require_ranks(inputs, in[0].dims.nbDims, inputs > 1 ? in[1].dims.nbDims : 0);
        BtpGather gather{static_cast<int32_t>(in[0].dims.d[0]), static_cast<int32_t>(in[0].dims.d[1]), start(), count(),
                         static_cast<int32_t>(in[1].dims.d[1]), in[0].type == DataType::kFLOAT ? 4 : 2};
        for (int32_t axis = 2; axis < in[0].dims.nbDims; ++axis) {
            gather.row_bytes *= in[0].dims.d[axis];
        }
        require_same(kName, "dimension 0 of indices", in[1].dims.d[0], gather.batch);
        const char* const problem = btp_gather_tokens_problem(&gather);
        require_ok(problem != nullptr ? problem : "");
        return gather;
    }

private:
    int32_t start() const { return values()[0]; }
    int32_t count() const { return values()[1]; }

    static void require_ranks(int32_t inputs, int32_t tokens, int32_t indices)
    {
        if (inputs != 2) {
            throw std::invalid_argument(std::string(kName) + ": got " + std::to_string(inputs)
                                        + " inputs, wanted tokens and indices");
        }
        require_rank(kName, "tokens", tokens, 2, false);
        require_rank(kName, "indices", indices, 2);
    }
};

BTP_REGISTER_PLUGIN(GatherTokens);

}  // namespace
}  // namespace btp
