// Custom operators of ONNX Runtime that multiply with weights as they are stored, on the CPU: BtpLinearInt8 those of four
// bits, BtpLinearHalf those of float16. In no file: they are put in when a session is prepared
// (engines/runners/on_cpu/linear.py), and are there on processors with AVX512-VNNI only.
#pragma once

#include "../common/ort_common.h"
#include "cpu_few_rows.h"
#include "cpu_int8.h"
#include "cpu_int8_many_rows.h"
#include "rules.h"

#ifdef BTP_X86
#include <algorithm>
#include <string>
#include <type_traits>

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
        const Product p{context, x.value, static_cast<const T*>(x.data), rows, codes, static_cast<const T*>(bias.data), y, outputs};
        rows > kFew ? multiply_many(p) : multiply_few(p);
    }

private:
    static constexpr size_t kFew = 8;         // rows that take no longer as places in lanes (measured: 8 to 12)
    static constexpr size_t kChunk = 262144;  // bytes of codes that stay in the cache while few rows are multiplied
    static constexpr size_t kRows = 16;       // rounded together

    struct Product {
        const OrtKernelContext* context;
        const OrtValue* beside;
        const T* x;
        size_t rows;
        Codes w;
        const T* bias;
        T* y;
        size_t outputs;
    };

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

    static void multiply_few(const Product& p)
    {
        const size_t rows = p.rows, inputs = p.w.inputs;
        const StreamBuffer scratch(p.context, p.beside, byte_rows_size(rows, inputs));
        const ByteRows given = byte_rows(scratch.data(), rows, inputs);
        for (size_t row = 0; row < rows; ++row) {
            const size_t place = row * inputs;
            round_row(p.x + place, p.w, given.bytes + place, given.scales + place / 8, given.less + place / 8);
        }
        const size_t together = std::max(kColumns, kChunk / (inputs / 2) / kColumns * kColumns);
        parallel_for(p.context, static_cast<int>((p.outputs + together - 1) / together), [&](int chunk) {
            const size_t first = static_cast<size_t>(chunk) * together, last = std::min(p.outputs, first + together);
            with_types(p.w, [&](auto zeros, auto scale) {
                multiply_columns<decltype(zeros)::value, decltype(scale)>(given, rows, p.w, p.bias, p.y, p.outputs, first, last);
            });
        });
    }

    static void multiply_many(const Product& p)
    {
        const size_t inputs = p.w.inputs, parts = parts_of(inputs);
        const StreamBuffer memory(p.context, p.beside, parts * p.rows * sizeof(RowPart));
        auto* const laid_out = static_cast<RowPart*>(memory.data());
        const size_t blocks = (p.rows + kByteRows - 1) / kByteRows;
        const auto start = [&](size_t block) { return p.rows * block / blocks; };
        for (size_t block = 0; block < blocks; ++block) {
            lay_out(p, start(block), start(block + 1) - start(block), laid_out + start(block) * parts);
        }
        const size_t wide = columns_of_part(p.outputs * blocks, kLanes, kLanes, kByteColumns);
        const size_t chunks = (p.outputs + wide - 1) / wide;
        parallel_for(p.context, static_cast<int>(chunks * blocks), [&](int part) {
            const size_t block = static_cast<size_t>(part) / chunks, first = static_cast<size_t>(part) % chunks * wide;
            const size_t row = start(block), rows = start(block + 1) - row, last = std::min(p.outputs, first + wide);
            const StreamBuffer scratch(p.context, p.beside, ByteScratch::size(rows));
            auto& own = *static_cast<ByteScratch*>(scratch.data());
            with_types(p.w, [&](auto zeros, auto scale) {
                multiply_parts<decltype(zeros)::value, decltype(scale)>(laid_out + row * parts, rows, p.w, p.bias,
                                                                       p.y + row * p.outputs, p.outputs, first, last, own);
            });
        });
    }

    static void lay_out(const Product& p, size_t first, size_t count, RowPart* to)
    {
        parallel_for(p.context, static_cast<int>((count + kRows - 1) / kRows), [&](int part) {
            const size_t start = static_cast<size_t>(part) * kRows;
            for (size_t row = start; row < std::min(count, start + kRows); ++row) {
                lay_out_row(p.x + (first + row) * p.w.inputs, p.w, to, count, row);
            }
        });
    }

    // Calls body with whether there are zeros, as a type, and a number of the type of the scales.
    template <typename Body>
    static void with_types(const Codes& w, const Body& body)
    {
        const auto with_scales = [&](auto zeros) { w.halves ? body(zeros, uint16_t{}) : body(zeros, T{}); };
        w.zeros != nullptr ? with_scales(std::true_type{}) : with_scales(std::false_type{});
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
