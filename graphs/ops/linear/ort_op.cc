// BtpLinear as ONNX Runtime custom operator: the CUDA kernels where they were compiled, and a plain loop for the CPU.
//
// On the CPU OrtLoader puts another node in place of this one: BtpLinearInt8 (ort_stored.h), or ONNX Runtime's own MatMulNBits
// (ort_node.py). The loop is for those who load a graph with this library themselves: right for every type, no faster than
// it must be.
#include <cstring>
#include <vector>

#include "../common/half.h"
#include "../common/ort_common.h"
#include "ort_stored.h"
#include "rules.h"

namespace btp {
namespace {

constexpr const char* kName = "BtpLinear";

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

class Linear : public Operands<5, 3> {
public:
    static ONNXTensorElementDataType input_type(ONNXTensorElementDataType floats, size_t index)
    {
        return index == 1 || index == 3 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : floats;
    }

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
        ops.push_back(ort_op<LinearInt8<float>>(kInt8, nullptr, kElement<float>));
        ops.push_back(ort_op<LinearInt8<uint16_t>>(kInt8, nullptr, kElement<uint16_t>));
        ops.push_back(ort_op<LinearHalf<float>>(kHalf, nullptr, kElement<float>));
        ops.push_back(ort_op<LinearHalf<uint16_t>>(kHalf, nullptr, kElement<uint16_t>));
    }
#endif
    return ops;
}

const OrtRegistration registration(ops_of);

}  // namespace
}  // namespace btp
