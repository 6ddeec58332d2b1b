// All layers of a decoder with small weights over whole sequences, as an ONNX Runtime custom operator for the CPU (AVX-512).
// In no file: it is put in place of BtpDecoderRows and BtpCausalAttention in turns when a session is prepared
// (engines/runners/on_cpu/layers_at_once.py). cpu_layers.h says how.
#include <algorithm>
#include <chrono>
#include <vector>

#include "cpu_layers.h"

#ifdef BTP_X86
namespace btp {
namespace {

constexpr const char* kName = "BtpDecoderLayers";

enum : size_t { kRows, kCos, kSin, kRoom, kWeights };    // places of inputs
enum : size_t { kFed, kByToken, kByHead, kTimes, kKeysValues };  // and of outputs
constexpr size_t kFeeds = 5;                                     // weights

int64_t now()
{
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// rows [M,C], cos, sin [B,S,D/2] with M = B S; room [2 L] int32, how many rows there are for a head's keys and values where
// they go (optional: S); for each of L layers, stored in float32 or float16, norm [C], query, key, value [N,C], their biases [N]
// if `biased`, out [C,K], norm [C], gate [I,C], up [I,C], down [C,I]
//   -> rows [M,C]; the last layer's query [B,S,N] and the same [B,N/D,S,D], if wanted; when it began and ended, [2] int64
//      nanoseconds of a steady clock, if wanted; each layer's key and value [B,N/D,room,D], of which the first S rows are written
class DecoderLayers : public Operands<kWeights + 1, kWeights + 1, kKeysValues + 1> {
public:
    static ONNXTensorElementDataType input_type(ONNXTensorElementDataType floats, size_t index)
    {
        return index < kRoom    ? floats
               : index == kRoom ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32
                                : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    }

    static ONNXTensorElementDataType output_type(ONNXTensorElementDataType floats, size_t index)
    {
        return index == kTimes ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : floats;
    }

    DecoderLayers(const OrtOp&, const OrtKernelInfo* info) : head_(head_size(info, kName))
    {
        const Stored stored(info, kName, false);
        const float epsilon = float_attribute(info, kName, "epsilon");
        const bool biased = int_attribute(info, kName, "biased") != 0;
        const size_t projects = biased ? 1 + 2 * kParts : 1 + kParts;
        const auto count = static_cast<size_t>(std::max(0, int_attribute(info, kName, "layers")));
        for (size_t first = kWeights; layers_.size() < count; first += projects + kFeeds) {
            layers_.push_back({Project(stored, first, head_, epsilon, biased), Feed(stored, first + projects, epsilon)});
        }
        require_fitting(layers_, head_, kName);
    }

    void run(OrtKernelContext* context) const
    {
        auto* const times = static_cast<int64_t*>(wanted_output(context, kTimes, {2}));
        if (times != nullptr) {
            times[0] = now();
        }
        pass_layers(context);
        if (times != nullptr) {
            times[1] = now();
        }
    }

private:
    void pass_layers(OrtKernelContext* context) const
    {
        const Input given = input(context, kRows), cos = input(context, kCos), sin = input(context, kSin);
        const size_t width = layers_[0].project.width(), rows = rows_of(kName, given, width), half = head_ / 2;
        if (cos.shape.size() != 3 || sin.shape != cos.shape) {
            throw std::invalid_argument(std::string(kName) + ": cos has shape " + text(cos.shape) + " and sin " + text(sin.shape)
                                        + ", wanted [B,S,D/2] both");
        }
        const float* const cosines = rows_like(kName, cos, half, rows);
        const auto samples = static_cast<size_t>(cos.shape[0]), tokens = static_cast<size_t>(cos.shape[1]);
        auto* const fed = static_cast<float*>(output(context, kFed, given.shape));
        const std::vector<Projected> to = outputs(context, cos.shape[0], cos.shape[1]);
        const StreamBuffer queries(context, given.value, tokens * layers_[0].project.outputs(0) * sizeof(float));
        std::vector<Sample> all;
        for (size_t sample = 0; sample < samples; ++sample) {
            const size_t first = sample * tokens;
            all.push_back({static_cast<const float*>(given.data) + first * width, cosines + first * half,
                           static_cast<const float*>(sin.data) + first * half, fed + first * width,
                           of_sample(to, sample, static_cast<float*>(queries.data()))});
        }
        if (rows > 0) {
            LayersOnThreads(layers_, head_, all, tokens).run(context, given.value);
        }
    }

    std::vector<Projected> outputs(OrtKernelContext* context, int64_t samples, int64_t tokens) const
    {
        const auto head = static_cast<int64_t>(head_);
        const auto numbers = [this](size_t part) { return static_cast<int64_t>(layers_[0].project.outputs(part)); };
        std::vector<Projected> to(layers_.size(), Projected(static_cast<size_t>(tokens)));
        to.back().by_token[0] = static_cast<float*>(wanted_output(context, kByToken, {samples, tokens, numbers(0)}));
        to.back().by_head[0] =
            static_cast<float*>(wanted_output(context, kByHead, {samples, numbers(0) / head, tokens, head}));
        const Input given = input(context, kRoom);
        if (given.value != nullptr) {
            require_shape(kName, "room", given.shape, {2 * static_cast<int64_t>(to.size())});
        }
        for (size_t place = 0; place < 2 * to.size(); ++place) {
            Projected& layer = to[place / 2];
            const size_t part = 1 + place % 2;
            const int64_t room = given.value == nullptr ? tokens : static_cast<const int32_t*>(given.data)[place];
            if (room < tokens) {
                throw std::invalid_argument(std::string(kName) + ": there is room for " + std::to_string(room)
                                            + " keys or values, wanted " + std::to_string(tokens) + " or more");
            }
            layer.room[part] = static_cast<size_t>(room);
            const std::vector<int64_t> shape{samples, numbers(part) / head, room, head};
            layer.by_head[part] = static_cast<float*>(output(context, kKeysValues + place, shape));
        }
        return to;
    }

    // The same for one sample alone. queries: where those by token go that nobody wants beside attention.
    std::vector<Projected> of_sample(std::vector<Projected> to, size_t sample, float* queries) const
    {
        for (Projected& layer : to) {
            for (size_t part = 0; part < kParts; ++part) {
                const size_t before = sample * layers_[0].project.outputs(part);
                layer.by_token[part] += layer.by_token[part] == nullptr ? 0 : before * layer.tokens;
                layer.by_head[part] += layer.by_head[part] == nullptr ? 0 : before * layer.room[part];
            }
            layer.by_token[0] = layer.by_token[0] == nullptr ? queries : layer.by_token[0];
        }
        return to;
    }

    const size_t head_;
    std::vector<Layer> layers_;
};

const OrtRegistration registration([](bool) {
    std::vector<OrtOp> ops;
    if (has_byte_products()) {
        OrtOp op = ort_op<DecoderLayers>(kName, nullptr, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
        op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
            return index == kWeights ? INPUT_OUTPUT_VARIADIC : index == kRoom ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
        };
        op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t index) {
            return index == kKeysValues ? INPUT_OUTPUT_VARIADIC : index == kFed ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
        };
        op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
        op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
        op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
        op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
        ops.push_back(op);
    }
    return ops;
});

}  // namespace
}  // namespace btp
#endif
