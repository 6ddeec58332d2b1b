// BtpLinear as ONNX Runtime custom operator: the CUDA kernels where they were compiled, and a plain loop for the CPU.
//
// On the CPU OrtLoader puts another node in place of this one: BtpLinearInt8 below, or ONNX Runtime's own MatMulNBits
// (ort_node.py). The loop is for those who load a graph with this library themselves: right for every type, no faster than
// it must be.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../common/half.h"
#include "../common/ort_common.h"
#include "cpu_half.h"
#include "cpu_int8.h"
#include "rules.h"

namespace btp {
namespace {

constexpr const char* kName = "BtpLinear";
#ifdef BTP_X86
constexpr const char* kInt8 = "BtpLinearInt8";
constexpr const char* kHalf = "BtpLinearHalf";
#endif

// Floats of 16 bits on the CPU: to float32, and to the nearest one, halves to even.
float wide(uint16_t bits, int32_t type)
{
    if (type == BTP_LINEAR_FLOAT16) {
        return half_to_float(bits);
    }
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

uint16_t narrow(float value, int32_t type)
{
    if (type == BTP_LINEAR_FLOAT16) {
        return float_to_half(value);
    }
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return value != value ? uint16_t{0x7fff} : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// One call of the loop. T: float or, for both types of 16 bits, uint16_t.
template <typename T>
class Product {
public:
    Product(const BtpLinear& l, const void* x, const void* qweight, const void* scales, const void* zeros, const void* bias, void* y)
        : l_(l), x_(static_cast<const T*>(x)), codes_(static_cast<const uint8_t*>(qweight)), scales_(static_cast<const T*>(scales)),
          zeros_(static_cast<const uint8_t*>(zeros)), bias_(static_cast<const T*>(bias)), y_(static_cast<T*>(y))
    {
    }

    void run()
    {
        const size_t rows = size_of(l_.rows), inputs = size_of(l_.inputs), outputs = size_of(l_.outputs);
        std::vector<float> x(rows * inputs), w(inputs);
        for (size_t i = 0; i < x.size(); ++i) {
            x[i] = get(x_[i]);
        }
        for (size_t n = 0; n < outputs; ++n) {
            unpack(n, w);
            for (size_t m = 0; m < rows; ++m) {
                const float sum = dot(x.data() + m * inputs, w.data(), inputs);
                put(y_[m * outputs + n], bias_ != nullptr ? sum + get(bias_[n]) : sum);
            }
        }
    }

private:
    static size_t size_of(int32_t value) { return static_cast<size_t>(value); }
    float get(float value) const { return value; }
    float get(uint16_t bits) const { return wide(bits, l_.type); }
    void put(float& to, float value) const { to = value; }
    void put(uint16_t& to, float value) const { to = narrow(value, l_.type); }

    // Row n of w, each number rounded once to the type of x.
    void unpack(size_t n, std::vector<float>& w) const
    {
        const size_t group = size_of(l_.group), groups = w.size() / group;
        for (size_t k = 0; k < w.size(); ++k) {
            const size_t g = k / group;
            const int q = codes_[(n * w.size() + k) / 2] >> (4 * (k % 2)) & 15;
            const int z = zeros_ == nullptr ? 8 : zeros_[n * ((groups + 1) / 2) + g / 2] >> (4 * (g % 2)) & 15;
            T rounded;
            put(rounded, static_cast<float>(q - z) * get(scales_[n * groups + g]));
            w[k] = get(rounded);
        }
    }

    // Sixteen sums side by side, which the compiler puts into vectors. K is a multiple of 16.
    static float dot(const float* a, const float* b, size_t count)
    {
        float sums[16] = {};
        for (size_t k = 0; k < count; k += 16) {
            for (size_t i = 0; i < 16; ++i) {
                sums[i] += a[k + i] * b[k + i];
            }
        }
        float total = 0.0f;
        for (const float sum : sums) {
            total += sum;
        }
        return total;
    }

    const BtpLinear l_;
    const T* const x_;
    const uint8_t* const codes_;
    const T* const scales_;
    const uint8_t* const zeros_;
    const T* const bias_;
    T* const y_;
};

class Linear {
public:
    static constexpr size_t kInputs = 5;
    static constexpr size_t kRequired = 3;
    static constexpr size_t kOutputs = 1;

    static ONNXTensorElementDataType input_type(ONNXTensorElementDataType floats, size_t index)
    {
        return index == 1 || index == 3 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : floats;
    }

    static ONNXTensorElementDataType output_type(ONNXTensorElementDataType floats, size_t) { return floats; }

    Linear(const OrtOp& op, const OrtKernelInfo* info) : gpu_(op.on_gpu())
    {
        attributes_.bits = int_attribute(info, kName, "bits");
        attributes_.group = int_attribute(info, kName, "group");
        attributes_.type = op.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT     ? BTP_LINEAR_FLOAT32
                           : op.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? BTP_LINEAR_FLOAT16
                                                                              : BTP_LINEAR_BFLOAT16;
    }

    void run(OrtKernelContext* context) const
    {
        const Input x = input(context, 0), qweight = input(context, 1), scales = input(context, 2);
        const Input zeros = input(context, 3), bias = input(context, 4);
        const BtpLinear linear = sizes(x, qweight, scales, zeros, bias);
        void* const y = output(context, 0, {linear.rows, linear.outputs});
        if (gpu_) {
            run_gpu(context, linear, x, qweight.data, scales.data, zeros.data, bias.data, y);
        } else if (linear.type == BTP_LINEAR_FLOAT32) {
            Product<float>(linear, x.data, qweight.data, scales.data, zeros.data, bias.data, y).run();
        } else {
            Product<uint16_t>(linear, x.data, qweight.data, scales.data, zeros.data, bias.data, y).run();
        }
    }

private:
    BtpLinear sizes(const Input& x, const Input& qweight, const Input& scales, const Input& zeros, const Input& bias) const
    {
        if (x.shape.size() != 2) {
            throw std::invalid_argument(std::string(kName) + ": x has shape " + text(x.shape) + ", wanted [M,K]");
        }
        if (qweight.shape.size() != 3) {
            throw std::invalid_argument(std::string(kName) + ": qweight has shape " + text(qweight.shape)
                                        + ", wanted [N,K/group,group/2]");
        }
        BtpLinear linear = attributes_;
        linear.rows = small(x.shape[0]);
        linear.inputs = small(x.shape[1]);
        linear.outputs = small(qweight.shape[0]);
        linear.zeros = zeros.value != nullptr;
        linear.bias = bias.value != nullptr;
        require_ok(linear_problem(linear));
        const int64_t n = linear.outputs, groups = linear.inputs / linear.group;
        require_shape(kName, "qweight", qweight.shape, {n, groups, linear.group / 2});
        require_shape(kName, "scales", scales.shape, {n, groups});
        if (linear.zeros != 0) {
            require_shape(kName, "zeros", zeros.shape, {n, (groups + 1) / 2});
        }
        if (linear.bias != 0) {
            require_shape(kName, "bias", bias.shape, {n});
        }
        return linear;
    }

#ifdef BTP_WITH_CUDA
    static void run_gpu(OrtKernelContext* context, const BtpLinear& linear, const Input& x, const void* qweight,
                        const void* scales, const void* zeros, const void* bias, void* y)
    {
        void* stream = nullptr;
        check(ort()->KernelContext_GetGPUComputeStream(context, &stream));
        const char* const problem = btp_linear_problem(&linear);
        require_ok(problem != nullptr ? problem : "");
        const size_t bytes = btp_linear_workspace(&linear);
        const auto launch = [&](void* workspace) {
            return btp_linear(&linear, x.data, qweight, scales, zeros, bias, y, workspace, bytes, stream);
        };
        const int32_t status =
            bytes == 0 ? launch(nullptr) : launch(StreamBuffer(context, x.value, bytes).data());
        if (status != BTP_OK) {
            throw std::runtime_error(std::string(kName) + ": " + btp_error_string(status));
        }
    }
#else
    static void run_gpu(OrtKernelContext*, const BtpLinear&, const Input&, const void*, const void*, const void*,
                        const void*, void*)
    {
        throw std::logic_error("BtpLinear: this library was built without CUDA kernels");
    }
#endif

    BtpLinear attributes_{};
    const bool gpu_;
};

#ifdef BTP_X86
// BtpLinear with rows of x rounded to int8 in groups. On processors with AVX512-VNNI only, and in no file: it is put in when
// a session is prepared (engines/runners/on_cpu/linear.py). Scales are float32 or float16, x and y are float32.
class LinearInt8 {
public:
    static constexpr size_t kInputs = 5;
    static constexpr size_t kRequired = 3;
    static constexpr size_t kOutputs = 1;

    static ONNXTensorElementDataType input_type(ONNXTensorElementDataType floats, size_t index)
    {
        return index == 1 || index == 3 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8
               : index == 2             ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED
                                        : floats;
    }

    static ONNXTensorElementDataType output_type(ONNXTensorElementDataType floats, size_t) { return floats; }

    LinearInt8(const OrtOp&, const OrtKernelInfo* info) : group_(int_attribute(info, kInt8, "group"))
    {
        if (!is_group(group_) || !has_byte_products()) {
            throw std::invalid_argument(std::string(kInt8) + ": group is " + std::to_string(group_)
                                        + ", wanted 16, 32, 64, 128 or 256, on a processor with AVX512-VNNI");
        }
    }

    void run(OrtKernelContext* context) const
    {
        const Input x = input(context, 0), qweight = input(context, 1), scales = input(context, 2);
        const Input zeros = input(context, 3), bias = input(context, 4);
        const Codes codes = codes_of(x, qweight, scales, zeros, bias);
        const size_t rows = static_cast<size_t>(x.shape[0]), outputs = static_cast<size_t>(qweight.shape[0]);
        auto* const y = static_cast<float*>(output(context, 0, {x.shape[0], qweight.shape[0]}));
        const StreamBuffer scratch(context, x.value, byte_rows_size(rows, codes.inputs));
        const ByteRows given = byte_rows(scratch.data(), rows, codes.inputs);
        round_rows(context, static_cast<const float*>(x.data), rows, codes, given);
        const size_t together = std::max(kColumns, kChunk / (codes.inputs / 2) / kColumns * kColumns);
        const auto* const added = static_cast<const float*>(bias.data);
        parallel_for(context, static_cast<int>((outputs + together - 1) / together), [&](int chunk) {
            const size_t first = static_cast<size_t>(chunk) * together;
            multiply(given, rows, codes, added, y, outputs, first, std::min(outputs, first + together));
        });
    }

private:
    static constexpr size_t kChunk = 262144;  // bytes of codes that stay in the cache while all rows are multiplied
    static constexpr size_t kRows = 16;       // rounded together

    Codes codes_of(const Input& x, const Input& qweight, const Input& scales, const Input& zeros, const Input& bias) const
    {
        const int64_t inputs = x.shape.size() == 2 ? x.shape[1] : 0;
        const int64_t outputs = qweight.shape.empty() ? 0 : qweight.shape[0];
        const int64_t least = std::max(int64_t{group_}, static_cast<int64_t>(kBlock));
        if (inputs < 1 || inputs % least != 0 || outputs % static_cast<int64_t>(kColumns) != 0) {
            throw std::invalid_argument(std::string(kInt8) + ": x has shape " + text(x.shape) + " and qweight "
                                        + text(qweight.shape) + ", wanted K a multiple of " + std::to_string(least)
                                        + " and N one of " + std::to_string(kColumns));
        }
        const int64_t groups = inputs / group_;
        require_shape(kInt8, "qweight", qweight.shape, {outputs, groups, group_ / 2});
        require_shape(kInt8, "scales", scales.shape, {outputs, groups});
        const ONNXTensorElementDataType type = element_type(scales);
        const bool halves = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
        if (!halves && type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
            throw std::invalid_argument(std::string(kInt8) + ": scales are of another type, wanted float32 or float16");
        }
        if (zeros.value != nullptr) {
            require_shape(kInt8, "zeros", zeros.shape, {outputs, (groups + 1) / 2});
        }
        if (bias.value != nullptr) {
            require_shape(kInt8, "bias", bias.shape, {outputs});
        }
        return {static_cast<const uint8_t*>(qweight.data), scales.data, halves, static_cast<const uint8_t*>(zeros.data),
                static_cast<size_t>(inputs), static_cast<size_t>(group_)};
    }

    static void round_rows(const OrtKernelContext* context, const float* x, size_t rows, const Codes& codes,
                           const ByteRows& given)
    {
        const size_t inputs = codes.inputs;
        const auto some = [&](int part) {
            const size_t first = static_cast<size_t>(part) * kRows;
            for (size_t row = first; row < std::min(rows, first + kRows); ++row) {
                const size_t place = row * inputs;
                round_row(x + place, codes, given.bytes + place, given.scales + place / 8, given.less + place / 8);
            }
        };
        if (rows <= kRows) {
            return some(0);
        }
        parallel_for(context, static_cast<int>((rows + kRows - 1) / kRows), some);
    }

    static void multiply(const ByteRows& x, size_t rows, const Codes& w, const float* bias, float* y, size_t next,
                         size_t first, size_t last)
    {
        if (w.zeros != nullptr) {
            w.halves ? multiply_columns<true, true>(x, rows, w, bias, y, next, first, last)
                     : multiply_columns<true, false>(x, rows, w, bias, y, next, first, last);
        } else {
            w.halves ? multiply_columns<false, true>(x, rows, w, bias, y, next, first, last)
                     : multiply_columns<false, false>(x, rows, w, bias, y, next, first, last);
        }
    }

    const int32_t group_;
};

// x [M,K] float32, weight [N,K] float16 -> y [M,N] float32, for few rows. On processors with AVX-512, and in no file either.
class LinearHalf {
public:
    static constexpr size_t kInputs = 2;
    static constexpr size_t kRequired = 2;
    static constexpr size_t kOutputs = 1;

    static ONNXTensorElementDataType input_type(ONNXTensorElementDataType floats, size_t index)
    {
        return index == 0 ? floats : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    }

    static ONNXTensorElementDataType output_type(ONNXTensorElementDataType floats, size_t) { return floats; }

    LinearHalf(const OrtOp&, const OrtKernelInfo*) {}

    void run(OrtKernelContext* context) const
    {
        const Input x = input(context, 0), weight = input(context, 1);
        if (x.shape.size() != 2 || weight.shape.size() != 2 || x.shape[1] != weight.shape[1]) {
            throw std::invalid_argument(std::string(kHalf) + ": x has shape " + text(x.shape) + " and weight "
                                        + text(weight.shape) + ", wanted [M,K] and [N,K]");
        }
        const size_t rows = static_cast<size_t>(x.shape[0]), inputs = static_cast<size_t>(x.shape[1]);
        const size_t outputs = static_cast<size_t>(weight.shape[0]);
        const auto* const given = static_cast<const float*>(x.data);
        const auto* const stored = static_cast<const uint16_t*>(weight.data);
        auto* const y = static_cast<float*>(output(context, 0, {x.shape[0], weight.shape[0]}));
        const auto some = [&](size_t first, size_t last) {
            multiply_half_columns(given, rows, inputs, stored + first * inputs, last - first, y + first, outputs);
        };
        if (rows * inputs * outputs < kWorthThreads) {
            return some(0, outputs);
        }
        parallel_for(context, static_cast<int>((outputs + kTogether - 1) / kTogether), [&](int part) {
            const size_t first = static_cast<size_t>(part) * kTogether;
            some(first, std::min(outputs, first + kTogether));
        });
    }

private:
    static constexpr size_t kWorthThreads = 524288;  // products: below, a thread takes longer to wake than to multiply
    static constexpr size_t kTogether = 64;          // columns
};
#endif

std::vector<OrtOp> ops_of(bool with_gpu)
{
    std::vector<OrtOp> ops;
    for (const auto type : {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                            ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16}) {
        ops.push_back(ort_op<Linear>(kName, nullptr, type));
        if (with_gpu) {
            ops.push_back(ort_op<Linear>(kName, "CUDAExecutionProvider", type));
        }
    }
#ifdef BTP_X86
    if (has_byte_products()) {
        ops.push_back(ort_op<LinearInt8>(kInt8, nullptr, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT));
        ops.push_back(ort_op<LinearHalf>(kHalf, nullptr, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT));
    }
#endif
    return ops;
}

const OrtRegistration registration(ops_of);

}  // namespace
}  // namespace btp
