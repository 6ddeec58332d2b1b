// Custom operators of ONNX Runtime that multiply with weights as they are stored, on the CPU: BtpLinearInt8 those of four
// bits, BtpLinearHalf those of float16. In no file: they are put in when a session is prepared
// (engines/runners/on_cpu/linear.py), and are there on processors with AVX512-VNNI only.
#pragma once

#include "../common/ort_common.h"
#include "cpu_few_rows.h"
#include "cpu_int8.h"
#include "rules.h"

#ifdef BTP_X86
#include <algorithm>
#include <string>

namespace btp {

constexpr const char* kInt8 = "BtpLinearInt8";
constexpr const char* kHalf = "BtpLinearHalf";

// The element type of a T.
template <typename T>
constexpr ONNXTensorElementDataType kElement =
    sizeof(T) == 2 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;

// BtpLinear with rows of x rounded to int8 in groups. T: float or uint16_t, of x, bias and y. Scales are of this type or
// float16.
template <typename T>
class LinearInt8 : public Operands<5, 3> {
public:
    static ONNXTensorElementDataType input_type(ONNXTensorElementDataType floats, size_t index)
    {
        return index == 1 || index == 3 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8
               : index == 2             ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED
                                        : floats;
    }

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
        auto* const y = static_cast<T*>(output(context, 0, {x.shape[0], qweight.shape[0]}));
        const StreamBuffer scratch(context, x.value, byte_rows_size(rows, codes.inputs));
        const ByteRows given = byte_rows(scratch.data(), rows, codes.inputs);
        round_rows(context, static_cast<const T*>(x.data), rows, codes, given);
        const size_t together = std::max(kColumns, kChunk / (codes.inputs / 2) / kColumns * kColumns);
        const auto* const added = static_cast<const T*>(bias.data);
        parallel_for(context, static_cast<int>((outputs + together - 1) / together), [&](int chunk) {
            const size_t first = static_cast<size_t>(chunk) * together;
            const size_t last = std::min(outputs, first + together);
            codes.halves ? multiply<uint16_t>(given, rows, codes, added, y, outputs, first, last)
                         : multiply<T>(given, rows, codes, added, y, outputs, first, last);
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
        if (!halves && type != kElement<T>) {
            throw std::invalid_argument(std::string(kInt8) + ": scales are of another type, wanted that of x or float16");
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

    static void round_rows(const OrtKernelContext* context, const T* x, size_t rows, const Codes& codes,
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

    // S: of the scales.
    template <typename S>
    static void multiply(const ByteRows& x, size_t rows, const Codes& w, const T* bias, T* y, size_t next, size_t first,
                         size_t last)
    {
        w.zeros != nullptr ? multiply_columns<true, S>(x, rows, w, bias, y, next, first, last)
                           : multiply_columns<false, S>(x, rows, w, bias, y, next, first, last);
    }

    const int32_t group_;
};

// x [M,K], weight [N,K] float16 -> y [M,N], for few rows. T: float or uint16_t, of x and y.
template <typename T>
class LinearHalf : public Operands<2> {
public:
    static ONNXTensorElementDataType input_type(ONNXTensorElementDataType floats, size_t index)
    {
        return index == 0 ? floats : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    }

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
        const auto* const given = static_cast<const T*>(x.data);
        const auto* const stored = static_cast<const uint16_t*>(weight.data);
        auto* const y = static_cast<T*>(output(context, 0, {x.shape[0], weight.shape[0]}));
        const auto some = [&](size_t first, size_t last) {
            multiply_few_columns(given, rows, inputs, stored + first * inputs, last - first, y + first, outputs);
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

}  // namespace btp
#endif
