// BtpLinear as TensorRT plugin (IPluginV3). The packed weights are inputs, so that one copy on the device serves all engines
// that multiply with them: qweight int32 [N,K/8], scales [N,K/group], zeros int32 (all rows in one, see graphs/packing.py).
//
// Inputs: x, qweight, scales, then zeros and bias, whichever are there. A fourth input alone is zeros if it is int32, else
// the bias: TensorRT has no missing inputs in between.
#include "../common/trt_common.h"
#include "rules.h"

namespace btp {
namespace {

using nvinfer1::DataType;
using nvinfer1::PluginTensorDesc;

class Linear : public Plugin<Linear> {
public:
    static constexpr const char* kName = "BtpLinear";

    static const std::vector<Attribute>& attributes_of()
    {
        static const std::vector<Attribute> all{{"bits"}, {"group"}, {"inputs", nullptr, true, true}};
        return all;
    }

    // enqueue() is not told how many inputs there are. Known since the engine was built, and in the engine.
    void note_inputs(int32_t inputs) noexcept { set_value(kInputs, inputs); }

    explicit Linear(std::vector<int32_t> values) : Plugin(std::move(values))
    {
        require_ok(linear_problem(attributes(1, 1, group() > 0 ? group() : 1)));
    }

    int32_t getOutputDataTypes(DataType* output, int32_t, const DataType* input, int32_t) const noexcept override
    {
        output[0] = input[0];
        return 0;
    }

    int32_t getOutputShapes(const nvinfer1::DimsExprs* in, int32_t inputs, const nvinfer1::DimsExprs*, int32_t,
                            nvinfer1::DimsExprs* out, int32_t, nvinfer1::IExprBuilder&) noexcept override
    {
        return guarded<int32_t>(-1, [&] {
            require_inputs(inputs);
            const auto rank = [&](int32_t i) { return i < inputs ? in[i].nbDims : 1; };
            require_ranks({rank(0), rank(1), rank(2), rank(3), rank(4)});
            const auto size = [&](int32_t i, int32_t axis, int32_t otherwise) { return constant_or(in[i].d[axis], otherwise); };
            const BtpLinear linear = attributes(size(0, 0, 1), size(1, 0, 1), size(0, 1, group()));
            require_ok(linear_problem(linear));
            require_same(kName, "dimension 1 of qweight", size(1, 1, linear.inputs / 8), linear.inputs / 8);
            require_same(kName, "dimension 0 of scales", size(2, 0, linear.outputs), linear.outputs);
            require_same(kName, "dimension 1 of scales", size(2, 1, linear.inputs / group()), linear.inputs / group());
            out[0].nbDims = 2;
            out[0].d[0] = in[0].d[0];
            out[0].d[1] = in[1].d[0];
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
        const DataType floats = tensors[0].desc.type;
        if (position == 0) {
            return tensor.type == DataType::kFLOAT || tensor.type == DataType::kHALF || tensor.type == DataType::kBF16;
        }
        if (position == 3 && inputs == 4) {
            return tensor.type == DataType::kINT32 || tensor.type == floats;
        }
        const bool packed = position == 1 || (position == 3 && inputs == 5);
        return tensor.type == (packed ? DataType::kINT32 : floats);
    }

    size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* in, int32_t,
                            const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept override
    {
        BtpLinear linear = attributes(static_cast<int32_t>(in[0].max.d[0]), static_cast<int32_t>(in[1].max.d[0]),
                                      static_cast<int32_t>(in[0].max.d[1]));
        linear.type = type_of(in[0].desc.type);
        return btp_linear_workspace(&linear);
    }

    int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override
    {
        return guarded<int32_t>(-1, [&] {
            const int32_t count = values()[kInputs];
            const BtpLinear linear = sizes(in, count);
            const void* const zeros = linear.zeros != 0 ? inputs[3] : nullptr;
            const void* const bias = linear.bias != 0 ? inputs[count - 1] : nullptr;
            const int32_t status = btp_linear(&linear, inputs[0], inputs[1], inputs[2], zeros, bias, outputs[0], workspace,
                                              btp_linear_workspace(&linear), stream);
            require_ok(status == BTP_OK ? "" : std::string(kName) + ": " + btp_error_string(status));
            return 0;
        });
    }

    // The product of these tensors; throws where they break the rules.
    BtpLinear sizes(const PluginTensorDesc* in, int32_t inputs) const
    {
        require_inputs(inputs);
        const auto rank = [&](int32_t i) { return i < inputs ? in[i].dims.nbDims : 1; };
        require_ranks({rank(0), rank(1), rank(2), rank(3), rank(4)});
        const auto size = [&](int32_t i, int32_t axis) { return static_cast<int32_t>(in[i].dims.d[axis]); };
        BtpLinear linear = attributes(size(0, 0), size(1, 0), size(0, 1));
        linear.type = type_of(in[0].type);
        linear.zeros = inputs > 3 && in[3].type == DataType::kINT32;
        linear.bias = inputs > 3 + linear.zeros;
        const char* const problem = btp_linear_problem(&linear);
        require_ok(problem != nullptr ? problem : "");
        const int64_t groups = linear.inputs / linear.group;
        require_same(kName, "dimension 1 of qweight", size(1, 1), linear.inputs / 8);
        require_same(kName, "dimension 0 of scales", size(2, 0), linear.outputs);
        require_same(kName, "dimension 1 of scales", size(2, 1), groups);
        if (linear.zeros != 0) {
            require_same(kName, "the number of words of zeros", size(3, 0), (linear.outputs * ((groups + 1) / 2) + 3) / 4);
        }
        if (linear.bias != 0) {
            require_same(kName, "dimension 0 of bias", size(inputs - 1, 0), linear.outputs);
        }
        return linear;
    }

private:
    static constexpr size_t kInputs = 2;  // the place of "inputs"

    int32_t group() const { return values()[1]; }

    static int32_t type_of(DataType type)
    {
        return type == DataType::kFLOAT  ? BTP_LINEAR_FLOAT32
               : type == DataType::kHALF ? BTP_LINEAR_FLOAT16
                                         : BTP_LINEAR_BFLOAT16;
    }

    static void require_inputs(int32_t inputs)
    {
        if (inputs < 3 || inputs > 5) {
            throw std::invalid_argument(std::string(kName) + ": got " + std::to_string(inputs)
                                        + " inputs, wanted x, qweight, scales, zeros (optional), bias (optional)");
        }
    }

    // Of x, qweight, scales and up to two more.
    static void require_ranks(const std::vector<int32_t>& got)
    {
        require_rank(kName, "x", got[0], 2);
        require_rank(kName, "qweight", got[1], 2);
        require_rank(kName, "scales", got[2], 2);
        require_rank(kName, "zeros or bias", got[3], 1);
        require_rank(kName, "bias", got[4], 1);
    }

    BtpLinear attributes(int32_t rows, int32_t outputs, int32_t inputs) const
    {
        return BtpLinear{rows, outputs, inputs, values()[0], values()[1], BTP_LINEAR_FLOAT32, 0, 0};
    }
};

BTP_REGISTER_PLUGIN(Linear);

}  // namespace
}  // namespace btp
