// The two parts of a decoder layer with small weights that go row by row, from weights that a node has stored (AVX-512).
#pragma once

#include "../common/half.h"
#include "../common/ort_common.h"
#include "cpu_panels.h"
#include "cpu_steps.h"

#ifdef BTP_X86
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

namespace btp {

constexpr size_t kParts = 3;               // query, key, value
constexpr size_t kRotated = 2;             // of them
constexpr size_t kWorthThreads = 2097152;  // products: below, a thread takes longer to wake than to multiply

// The stored inputs of a node. narrow: what is stored in 16 bits is kept in them, for few rows, whose time is that of
// reading.
class Stored {
public:
    Stored(const OrtKernelInfo* info, const char* op, bool narrow) : info_(info), op_(op), narrow_(narrow) {}

    const char* op() const { return op_; }

    // A vector of `size` numbers.
    std::vector<float> vector(size_t index, size_t size) const
    {
        const Constant stored = constant(index);
        require_shape(op_, "a vector", stored.shape, {static_cast<int64_t>(size)});
        std::vector<float> numbers(size);
        for (size_t place = 0; place < size; ++place) {
            numbers[place] = stored.halves ? half_to_float(static_cast<const uint16_t*>(stored.data)[place])
                                           : static_cast<const float*>(stored.data)[place];
        }
        return numbers;
    }

    // A matrix [N,K] whose rows have `inputs` numbers, any if 0.
    Panels panels(size_t index, size_t inputs) const
    {
        const Constant stored = constant(index);
        const bool matrix = stored.shape.size() == 2 && stored.shape[0] > 0 && stored.shape[1] > 0;
        if (!matrix || (inputs != 0 && static_cast<size_t>(stored.shape[1]) != inputs)) {
            throw std::invalid_argument(named(index) + " has shape " + text(stored.shape) + ", wanted weights [N,"
                                        + (inputs == 0 ? "K" : std::to_string(inputs)) + "]");
        }
        return Panels(stored.data, static_cast<size_t>(stored.shape[0]), static_cast<size_t>(stored.shape[1]), stored.halves,
                      narrow_);
    }

private:
    struct Constant {
        const void* data;
        bool halves;
        std::vector<int64_t> shape;
    };

    std::string named(size_t index) const { return std::string(op_) + ": input " + std::to_string(index); }

    Constant constant(size_t index) const
    {
        int there = 0;
        const OrtValue* value = nullptr;
        check(ort()->KernelInfoGetConstantInput_tensor(info_, index, &there, &value));
        if (there == 0 || value == nullptr) {
            throw std::invalid_argument(named(index) + " is not stored, wanted weights");
        }
        const Input tensor = tensor_of(value);
        const ONNXTensorElementDataType type = element_type(tensor);
        if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT && type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) {
            throw std::invalid_argument(named(index) + " is of another type, wanted float32 or float16");
        }
        return {tensor.data, type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, tensor.shape};
    }

    const OrtKernelInfo* info_;
    const char* op_;
    const bool narrow_;
};

// The size of a head, which is even.
inline size_t head_size(const OrtKernelInfo* info, const char* op)
{
    const int32_t head = int_attribute(info, op, "head");
    if (head < 2 || head % 2 != 0) {
        throw std::invalid_argument(std::string(op) + ": head is " + std::to_string(head) + ", wanted an even size");
    }
    return static_cast<size_t>(head);
}

// Rows of `width` numbers in a tensor of any shape.
inline size_t rows_of(const char* op, const Input& tensor, size_t width)
{
    int64_t numbers = 1;
    for (const int64_t size : tensor.shape) {
        numbers *= size;
    }
    if (numbers % static_cast<int64_t>(width) != 0) {
        throw std::invalid_argument(std::string(op) + ": an input has shape " + text(tensor.shape) + ", wanted rows of "
                                    + std::to_string(width));
    }
    return static_cast<size_t>(numbers) / width;
}

// The numbers of a tensor of any shape that holds so many rows of `width`.
inline const float* rows_like(const char* op, const Input& tensor, size_t width, size_t rows)
{
    if (tensor.value == nullptr || rows_of(op, tensor, width) != rows) {
        throw std::invalid_argument(std::string(op) + ": an input has shape " + text(tensor.shape) + ", wanted "
                                    + std::to_string(rows) + " rows of " + std::to_string(width));
    }
    return static_cast<const float*>(tensor.data);
}

// The product of attention's context, what it is added to, and the gated MLP behind a norm.
class Feed {
public:
    // out [C,K], norm [C], gate [I,C], up [I,C], down [C,I] are inputs from `first` on.
    Feed(const Stored& stored, size_t first, float epsilon)
        : epsilon_(epsilon), out_(stored.panels(first, 0)), gate_(stored.panels(first + 2, out_.outputs())),
          up_(stored.panels(first + 3, out_.outputs())), down_(stored.panels(first + 4, gate_.outputs())),
          norm_(stored.vector(first + 1, out_.outputs()))
    {
        if (up_.outputs() != gate_.outputs() || down_.outputs() != out_.outputs()) {
            throw std::invalid_argument(std::string(stored.op()) + ": up gives " + std::to_string(up_.outputs()) + " and down "
                                        + std::to_string(down_.outputs()) + " numbers, wanted "
                                        + std::to_string(gate_.outputs()) + " and " + std::to_string(out_.outputs()));
        }
    }

    size_t context() const { return out_.inputs(); }
    size_t width() const { return out_.outputs(); }
    size_t weights() const { return (context() + 3 * gate_.outputs()) * width(); }

    // What so many rows take of scratch.
    size_t floats(size_t rows) const { return rows * (2 * whole_panels(width()) + whole_panels(gate_.outputs()) + kPanel); }

    // to [rows,C] from context [rows,K] and x [rows,C].
    void run(const float* context, const float* x, size_t rows, float* to, Scratch scratch) const
    {
        const size_t wide = whole_panels(width()), inner = whole_panels(gate_.outputs());
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

// Where query, key and value go, [B,S,N] and the first S rows of [B,N/D,room,D]: null where nobody wants them. tokens: S.
struct Projected {
    explicit Projected(size_t count) : room{count, count, count}, tokens(count) {}

    float* by_token[kParts]{};
    float* by_head[kParts]{};
    size_t room[kParts];
    size_t tokens;

    void write(size_t part, size_t token, const float* numbers, size_t count, size_t head) const
    {
        if (by_token[part] != nullptr) {
            std::memcpy(by_token[part] + token * count, numbers, count * sizeof(float));
        }
        if (by_head[part] != nullptr) {
            float* const sample = by_head[part] + token / tokens * room[part] * count + token % tokens * head;
            for (size_t place = 0; place < count; place += head) {
                std::memcpy(sample + place * room[part], numbers + place, head * sizeof(float));
            }
        }
    }
};

// A norm, the products that give query, key and value, their biases, and the rotation of query and key.
class Project {
public:
    // norm [C], query, key, value [N,C], their biases [N] if biased, are inputs from `first` on.
    Project(const Stored& stored, size_t first, size_t head, float epsilon, bool biased)
        : head_(head), epsilon_(epsilon), biased_(biased)
    {
        for (size_t part = 0; part < kParts; ++part) {
            weights_[part] = stored.panels(first + 1 + part, part == 0 ? 0 : weights_[0].inputs());
            if (weights_[part].outputs() % head_ != 0) {
                throw std::invalid_argument(std::string(stored.op()) + ": head is " + std::to_string(head_)
                                            + ", wanted a divisor of " + std::to_string(weights_[part].outputs()));
            }
            biases_[part] = biased_ ? stored.vector(first + 1 + kParts + part, weights_[part].outputs()) : std::vector<float>();
            widest_ = std::max(widest_, whole_panels(weights_[part].outputs()));
        }
        norm_ = stored.vector(first, width());
    }

    size_t width() const { return weights_[0].inputs(); }
    size_t weights() const
    {
        return (weights_[0].outputs() + weights_[1].outputs() + weights_[2].outputs()) * width();
    }

    size_t outputs(size_t part) const { return weights_[part].outputs(); }

    // What so many rows take of scratch.
    size_t floats(size_t rows) const { return rows * (whole_panels(width()) + widest_); }

    // From rows x [rows,C], which are tokens from `first` on; cos, sin [B S, D/2].
    void run(const float* x, size_t first, size_t rows, const float* cos, const float* sin, const Projected& to, Scratch scratch) const
    {
        const size_t half = head_ / 2;
        const size_t wide = whole_panels(width());
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

}  // namespace btp
#endif
