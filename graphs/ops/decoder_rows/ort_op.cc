// What lies between one attention and the next in a decoder with small weights, row by row, as an ONNX Runtime custom
// operator for the CPU (AVX-512). In no file: it is put in place of some twenty nodes when a session is prepared
// (engines/runners/on_cpu/decoder_rows.py). Some rows pass through all steps at once, so they and the weights stay in the
// cache, and the session's threads are woken once for all of it.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "../common/half.h"
#include "../common/ort_common.h"
#include "cpu_panels.h"
#include "cpu_steps.h"

namespace btp {
namespace {

#ifdef BTP_X86
constexpr size_t kTogether = 32;           // rows of a piece of work: fewer read the weights too often
constexpr size_t kWorthThreads = 2097152;  // products: below, a thread takes longer to wake than to multiply

constexpr const char* kName = "BtpDecoderRows";

// Places of inputs.
enum : size_t { kRows, kCos, kSin, kContext, kOut, kFeedNorm, kGate, kUp, kDown, kNorm, kQuery, kKey, kValue, kBias };
constexpr size_t kParts = 3;    // query, key, value
constexpr size_t kRotated = 2;  // of them

// A stored input of numbers.
struct Constant {
    const void* data;
    bool halves;
    std::vector<int64_t> shape;
};

Constant constant(const OrtKernelInfo* info, size_t index)
{
    int there = 0;
    const OrtValue* value = nullptr;
    check(ort()->KernelInfoGetConstantInput_tensor(info, index, &there, &value));
    if (there == 0 || value == nullptr) {
        throw std::invalid_argument(std::string(kName) + ": input " + std::to_string(index) + " is not stored, wanted weights");
    }
    const Input tensor = tensor_of(value);
    const ONNXTensorElementDataType type = element_type(tensor);
    if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT && type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) {
        throw std::invalid_argument(std::string(kName) + ": input " + std::to_string(index)
                                    + " is of another type, wanted float32 or float16");
    }
    return {tensor.data, type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, tensor.shape};
}

// A stored vector of `size` numbers.
std::vector<float> vector_of(const OrtKernelInfo* info, size_t index, size_t size)
{
    const Constant stored = constant(info, index);
    require_shape(kName, "a vector", stored.shape, {static_cast<int64_t>(size)});
    std::vector<float> numbers(size);
    for (size_t place = 0; place < size; ++place) {
        numbers[place] = stored.halves ? half_to_float(static_cast<const uint16_t*>(stored.data)[place])
                                       : static_cast<const float*>(stored.data)[place];
    }
    return numbers;
}

// A stored matrix [N,K] whose rows have `inputs` numbers, any if 0. narrow: what is stored in 16 bits is kept in them, for
// few rows, whose time is that of reading.
Panels panels_of(const OrtKernelInfo* info, size_t index, size_t inputs, bool narrow)
{
    const Constant stored = constant(info, index);
    const bool matrix = stored.shape.size() == 2 && stored.shape[0] > 0 && stored.shape[1] > 0;
    if (!matrix || (inputs != 0 && static_cast<size_t>(stored.shape[1]) != inputs)) {
        throw std::invalid_argument(std::string(kName) + ": input " + std::to_string(index) + " has shape " + text(stored.shape)
                                    + ", wanted weights [N," + (inputs == 0 ? "K" : std::to_string(inputs)) + "]");
    }
    return Panels(stored.data, static_cast<size_t>(stored.shape[0]), static_cast<size_t>(stored.shape[1]), stored.halves, narrow);
}

// Rows of `width` numbers in a tensor of any shape.
size_t rows_of(const Input& tensor, size_t width)
{
    int64_t numbers = 1;
    for (const int64_t size : tensor.shape) {
        numbers *= size;
    }
    if (numbers % static_cast<int64_t>(width) != 0) {
        throw std::invalid_argument(std::string(kName) + ": an input has shape " + text(tensor.shape) + ", wanted rows of "
                                    + std::to_string(width));
    }
    return static_cast<size_t>(numbers) / width;
}

// body(first row, rows) for all rows, on the session's threads where the work is worth it: an even number of pieces, of which
// none has more than kTogether rows, each of whole tiles but the last.
template <typename Body>
void for_rows(const OrtKernelContext* context, size_t rows, size_t weights, const Body& body)
{
    const size_t tiles = (rows + kTile - 1) / kTile, pieces = (rows + 2 * kTogether - 1) / (2 * kTogether) * 2;
    const auto piece = [&](int place) {
        const size_t number = static_cast<size_t>(place);
        const size_t first = number * tiles / pieces * kTile, last = std::min(rows, (number + 1) * tiles / pieces * kTile);
        if (first < last) {
            body(first, last - first);
        }
    };
    if (rows * weights < kWorthThreads) {
        for (size_t place = 0; place < pieces; ++place) {
            piece(static_cast<int>(place));
        }
        return;
    }
    parallel_for(context, static_cast<int>(pieces), piece);
}

// The product of attention's context, what it is added to, and the gated MLP behind a norm.
class Feed {
public:
    Feed(const OrtKernelInfo* info, float epsilon, bool narrow)
        : epsilon_(epsilon), out_(panels_of(info, kOut, 0, narrow)), gate_(panels_of(info, kGate, out_.outputs(), narrow)),
          up_(panels_of(info, kUp, out_.outputs(), narrow)), down_(panels_of(info, kDown, gate_.outputs(), narrow)),
          norm_(vector_of(info, kFeedNorm, out_.outputs()))
    {
        if (up_.outputs() != gate_.outputs() || down_.outputs() != out_.outputs()) {
            throw std::invalid_argument(std::string(kName) + ": up gives " + std::to_string(up_.outputs()) + " and down "
                                        + std::to_string(down_.outputs()) + " numbers, wanted "
                                        + std::to_string(gate_.outputs()) + " and " + std::to_string(out_.outputs()));
        }
    }

    size_t context() const { return out_.inputs(); }
    size_t width() const { return out_.outputs(); }
    size_t weights() const { return (context() + 3 * gate_.outputs()) * width(); }

    // to [rows,C] from context [rows,K] and x [rows,C].
    void run(const float* context, const float* x, size_t rows, float* to) const
    {
        const size_t wide = whole_panels(width()), inner = whole_panels(gate_.outputs());
        Scratch scratch(rows * (2 * wide + inner + kPanel));
        float *const sums = scratch.take(rows * wide), *const normed = scratch.take(rows * wide);
        float *const gates = scratch.take(rows * inner);
        multiply(context, out_.inputs(), rows, out_, sums, wide);
        for (size_t row = 0; row < rows; ++row) {
            float* const sum = sums + row * wide;
            add_rows(sum, x + row * width(), sum, width());
            normalise_row(normed + row * wide, sum, norm_.data(), width(), epsilon_);
        }
        float* const ups = scratch.take(rows * kPanel);
        for (size_t panel = 0; panel < gate_.panels(); ++panel) {
            float* const gate = gates + panel * kPanel;
            multiply(normed, wide, rows, gate_, panel, gate, inner);
            multiply(normed, wide, rows, up_, panel, ups, kPanel);
            gate_panel(gate, inner, ups, rows);
        }
        multiply(gates, inner, rows, down_, normed, wide);
        for (size_t row = 0; row < rows; ++row) {
            add_rows(to + row * width(), sums + row * wide, normed + row * wide, width());
        }
    }

private:
    const float epsilon_;
    Panels out_, gate_, up_, down_;
    std::vector<float> norm_;
};

// Where query, key and value go, [B,S,N] and [B,N/D,S,D]: null where nobody wants them. tokens: S.
struct Projected {
    float* by_token[kParts];
    float* by_head[kParts];
    size_t tokens;

    void write(size_t part, size_t token, const float* numbers, size_t count, size_t head) const
    {
        if (by_token[part] != nullptr) {
            std::memcpy(by_token[part] + token * count, numbers, count * sizeof(float));
        }
        if (by_head[part] != nullptr) {
            float* const sample = by_head[part] + token / tokens * tokens * count + token % tokens * head;
            for (size_t place = 0; place < count; place += head) {
                std::memcpy(sample + place * tokens, numbers + place, head * sizeof(float));
            }
        }
    }
};

// A norm, the products that give query, key and value, their biases, and the rotation of query and key.
class Project {
public:
    Project(const OrtKernelInfo* info, size_t head, float epsilon, bool narrow)
        : head_(head), epsilon_(epsilon), biased_(int_attribute(info, kName, "biased") != 0)
    {
        for (size_t part = 0; part < kParts; ++part) {
            weights_[part] = panels_of(info, kQuery + part, part == 0 ? 0 : weights_[0].inputs(), narrow);
            if (weights_[part].outputs() % head_ != 0) {
                throw std::invalid_argument(std::string(kName) + ": head is " + std::to_string(head_)
                                            + ", wanted a divisor of " + std::to_string(weights_[part].outputs()));
            }
            biases_[part] = biased_ ? vector_of(info, kBias + part, weights_[part].outputs()) : std::vector<float>();
            widest_ = std::max(widest_, whole_panels(weights_[part].outputs()));
        }
        norm_ = vector_of(info, kNorm, width());
    }

    size_t width() const { return weights_[0].inputs(); }
    size_t weights() const
    {
        return (weights_[0].outputs() + weights_[1].outputs() + weights_[2].outputs()) * width();
    }

    Projected outputs(OrtKernelContext* context, int64_t samples, int64_t tokens) const
    {
        Projected to{{}, {}, static_cast<size_t>(tokens)};
        for (size_t part = 0; part < kParts; ++part) {
            const auto count = static_cast<int64_t>(weights_[part].outputs()), head = static_cast<int64_t>(head_);
            to.by_token[part] = static_cast<float*>(wanted_output(context, 1 + part, {samples, tokens, count}));
            const std::vector<int64_t> shape{samples, count / head, tokens, head};
            to.by_head[part] = static_cast<float*>(wanted_output(context, 1 + kParts + part, shape));
        }
        return to;
    }

    // From rows x [rows,C], which are tokens from `first` on; cos, sin [B S, D/2].
    void run(const float* x, size_t first, size_t rows, const float* cos, const float* sin, const Projected& to) const
    {
        const size_t half = head_ / 2;
        const size_t wide = whole_panels(width());
        Scratch scratch(rows * (wide + widest_));
        float *const normed = scratch.take(rows * wide), *const made = scratch.take(rows * widest_);
        for (size_t row = 0; row < rows; ++row) {
            normalise_row(normed + row * wide, x + row * width(), norm_.data(), width(), epsilon_);
        }
        for (size_t part = 0; part < kParts; ++part) {
            const size_t count = weights_[part].outputs();
            multiply(normed, wide, rows, weights_[part], made, widest_);
            for (size_t row = 0; row < rows; ++row) {
                float* const numbers = made + row * widest_;
                const size_t token = first + row;
                if (biased_) {
                    add_rows(numbers, numbers, biases_[part].data(), count);
                }
                if (part < kRotated) {
                    rotate_row(numbers, count / head_, half, cos + token * half, sin + token * half);
                }
                to.write(part, token, numbers, count, head_);
            }
        }
    }

private:
    const size_t head_;
    const float epsilon_;
    const bool biased_;
    size_t widest_ = 0;
    Panels weights_[kParts];
    std::vector<float> biases_[kParts], norm_;
};

// rows [M,C], cos, sin [B,S,D/2] with M = B S, and the inputs of what it does; weights are stored, in float32 or float16:
//   feeds:    context [M,K] in any shape, out [C,K], norm [C], gate [I,C], up [I,C], down [C,I]
//   projects: norm [C], query, key, value [N,C], their biases [N] if `biased`
//   -> rows [M,C] where it feeds; where it projects query, key, value [B,S,N] and the same [B,N/D,S,D], those that are wanted
class DecoderRows : public Operands<kBias + kParts, 1, 1 + 2 * kParts> {
public:
    static ONNXTensorElementDataType input_type(ONNXTensorElementDataType floats, size_t index)
    {
        return index <= kContext ? floats : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    }

    DecoderRows(const OrtOp&, const OrtKernelInfo* info) : head_(static_cast<size_t>(int_attribute(info, kName, "head")))
    {
        const bool narrow = int_attribute(info, kName, "few") != 0;
        const float epsilon = float_attribute(info, kName, "epsilon");
        if (head_ < 2 || head_ % 2 != 0) {
            throw std::invalid_argument(std::string(kName) + ": head is " + std::to_string(head_) + ", wanted an even size");
        }
        if (int_attribute(info, kName, "feeds") != 0) {
            feed_ = std::make_unique<Feed>(info, epsilon, narrow);
        }
        if (int_attribute(info, kName, "projects") != 0) {
            project_ = std::make_unique<Project>(info, head_, epsilon, narrow);
        }
        if ((!feed_ && !project_) || (feed_ && project_ && feed_->width() != project_->width())) {
            throw std::invalid_argument(std::string(kName) + ": it feeds and projects rows of different sizes, or does neither");
        }
    }

    void run(OrtKernelContext* context) const
    {
        const Input given = input(context, kRows);
        const size_t width = feed_ ? feed_->width() : project_->width(), rows = rows_of(given, width);
        const auto* const x = static_cast<const float*>(given.data);
        const float *cos = nullptr, *sin = nullptr, *attended = nullptr;
        float* fed = nullptr;
        Projected to{{}, {}, 1};
        if (feed_) {
            attended = rows_like(input(context, kContext), feed_->context(), rows);
            fed = static_cast<float*>(output(context, 0, given.shape));
        }
        if (project_) {
            const Input cosines = input(context, kCos);
            cos = rows_like(cosines, head_ / 2, rows);
            sin = rows_like(input(context, kSin), head_ / 2, rows);
            if (cosines.shape.size() != 3) {
                throw std::invalid_argument(std::string(kName) + ": cos has shape " + text(cosines.shape) + ", wanted [B,S,D/2]");
            }
            to = project_->outputs(context, cosines.shape[0], cosines.shape[1]);
        }
        for_rows(context, rows, (feed_ ? feed_->weights() : 0) + (project_ ? project_->weights() : 0), [&](size_t first, size_t some) {
            const float* now = x + first * width;
            if (feed_) {
                float* const result = fed + first * width;
                feed_->run(attended + first * feed_->context(), now, some, result);
                now = result;
            }
            if (project_) {
                project_->run(now, first, some, cos, sin, to);
            }
        });
    }

private:
    const float* rows_like(const Input& tensor, size_t width, size_t rows) const
    {
        if (tensor.value == nullptr || rows_of(tensor, width) != rows) {
            throw std::invalid_argument(std::string(kName) + ": an input has shape " + text(tensor.shape) + ", wanted "
                                        + std::to_string(rows) + " rows of " + std::to_string(width));
        }
        return static_cast<const float*>(tensor.data);
    }

    const size_t head_;
    std::unique_ptr<const Feed> feed_;
    std::unique_ptr<const Project> project_;
};
#endif

std::vector<OrtOp> ops_of(bool)
{
    std::vector<OrtOp> ops;
#ifdef BTP_X86
    if (has_byte_products()) {
        OrtOp op = ort_op<DecoderRows>(kName, nullptr, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
        op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_OPTIONAL; };
        ops.push_back(op);
    }
#endif
    return ops;
}

const OrtRegistration registration(ops_of);

}  // namespace
}  // namespace btp
