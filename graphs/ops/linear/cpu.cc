// Products on a CPU that no file has: put in when a session is prepared (engines/runners/on_cpu/float_weights.py).
#include <algorithm>
#include <stdexcept>
#include <string>

#include "../common/ort_common.h"
#include "cpu_few_rows.h"
#include "cpu_many_rows.h"

#ifdef BTP_X86
namespace btp {
namespace {

constexpr const char* kName = "BtpLinearFloat";

// x [M,K] float32, weight [N,K] float32 -> y [M,N]. K is a multiple of 16 and N one of 32.
class LinearFloat : public Operands<2> {
public:
    LinearFloat(const OrtOp&, const OrtKernelInfo*) {}

    void run(OrtKernelContext* context) const
    {
        const Input x = input(context, 0), weight = input(context, 1);
        const bool matrices = x.shape.size() == 2 && weight.shape.size() == 2 && x.shape[1] == weight.shape[1];
        if (!matrices || x.shape[1] < 1 || x.shape[1] % static_cast<int64_t>(kVector) != 0
            || weight.shape[0] % static_cast<int64_t>(kTileColumns) != 0) {
            throw std::invalid_argument(std::string(kName) + ": x has shape " + text(x.shape) + " and weight "
                                        + text(weight.shape) + ", wanted [M,K] and [N,K], K a multiple of 16 and N one of 32");
        }
        const size_t rows = static_cast<size_t>(x.shape[0]), inputs = static_cast<size_t>(x.shape[1]);
        const size_t outputs = static_cast<size_t>(weight.shape[0]);
        auto* const y = static_cast<float*>(output(context, 0, {x.shape[0], weight.shape[0]}));
        if (rows == 0 || outputs == 0) {
            return;
        }
        if (rows <= kFew) {
            return multiply_rows(context, static_cast<const float*>(x.data), rows, inputs,
                                 static_cast<const float*>(weight.data), outputs, y);
        }
        const StreamBuffer memory(context, x.value, (rows * inputs + kAhead * kTileRows) * sizeof(float));
        auto* const laid_out = static_cast<float*>(memory.data());
        const size_t blocks = (rows + kTogether - 1) / kTogether;
        const auto first = [&](size_t block) { return rows * block / blocks; };
        for (size_t block = 0; block < blocks; ++block) {
            lay_out(context, static_cast<const float*>(x.data), inputs, first(block), first(block + 1), laid_out);
        }
        const size_t wide = columns_of_part(outputs * blocks, kTileColumns, 2 * kTileColumns, kWidest);
        const size_t parts = (outputs + wide - 1) / wide;
        parallel_for(context, static_cast<int>(parts * blocks), [&](int part) {
            const size_t block = static_cast<size_t>(part) / parts, column = static_cast<size_t>(part) % parts * wide;
            const Rows own{laid_out + first(block) * inputs, first(block + 1) - first(block)};
            const size_t columns = std::min(wide, outputs - column);
            const StreamBuffer scratch(context, x.value, block_scratch(own.count, columns) * sizeof(float));
            multiply_block(own, inputs, static_cast<const float*>(weight.data) + column * inputs, columns,
                           y + first(block) * outputs + column, outputs, static_cast<float*>(scratch.data()));
        });
    }

private:
    static constexpr size_t kFew = 16;  // rows that take no longer than reading the weights

    static void multiply_rows(const OrtKernelContext* context, const float* x, size_t rows, size_t inputs,
                              const float* weights, size_t outputs, float* y)
    {
        constexpr size_t kSome = 2 * kTileColumns;
        parallel_for(context, static_cast<int>((outputs + kSome - 1) / kSome), [&](int part) {
            const size_t first = static_cast<size_t>(part) * kSome, count = std::min(kSome, outputs - first);
            multiply_few_columns(x, rows, inputs, weights + first * inputs, count, y + first, outputs);
        });
    }

    static void lay_out(const OrtKernelContext* context, const float* x, size_t inputs, size_t first, size_t last, float* to)
    {
        const RowPanels panels(last - first);
        parallel_for(context, static_cast<int>(panels.count), [&](int panel) {
            lay_out_panel(x + first * inputs, inputs, panels, last - first, static_cast<size_t>(panel), to + first * inputs);
        });
    }
};

const OrtRegistration registration([](bool) {
    std::vector<OrtOp> ops;
    if (has_byte_products()) {
        ops.push_back(ort_op<LinearFloat>(kName, nullptr, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT));
    }
    return ops;
});

}  // namespace
}  // namespace btp
#endif
