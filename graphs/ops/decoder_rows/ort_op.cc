// What lies between one attention and the next in a decoder with small weights, row by row, as an ONNX Runtime custom
// operator for the CPU (AVX-512). In no file: it is put in place of some twenty nodes when a session is prepared
// (engines/runners/on_cpu/decoder_rows.py). Some rows pass through all steps at once, so they and the weights stay in the
// cache, and the session's threads are woken once for all of it.
#include <algorithm>
#include <memory>

#include "ort_layer.h"

namespace btp {
namespace {

#ifdef BTP_X86
constexpr size_t kTogether = 32;  // rows of a piece of work: fewer read the weights too often

constexpr const char* kName = "BtpDecoderRows";

// Places of inputs: those of Feed from kOut on, those of Project from kNorm on.
enum : size_t { kRows, kCos, kSin, kContext, kOut, kNorm = kOut + 5, kBias = kNorm + 1 + kParts };

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

    DecoderRows(const OrtOp&, const OrtKernelInfo* info) : head_(head_size(info, kName))
    {
        const Stored stored(info, kName, int_attribute(info, kName, "few") != 0);
        const float epsilon = float_attribute(info, kName, "epsilon");
        if (int_attribute(info, kName, "feeds") != 0) {
            feed_ = std::make_unique<Feed>(stored, kOut, epsilon);
        }
        if (int_attribute(info, kName, "projects") != 0) {
            const bool biased = int_attribute(info, kName, "biased") != 0;
            project_ = std::make_unique<Project>(stored, kNorm, head_, epsilon, biased);
        }
        if ((!feed_ && !project_) || (feed_ && project_ && feed_->width() != project_->width())) {
            throw std::invalid_argument(std::string(kName) + ": it feeds and projects rows of different sizes, or does neither");
        }
    }

    void run(OrtKernelContext* context) const
    {
        const Input given = input(context, kRows);
        const size_t width = feed_ ? feed_->width() : project_->width(), rows = rows_of(kName, given, width);
        const auto* const x = static_cast<const float*>(given.data);
        const float *cos = nullptr, *sin = nullptr, *attended = nullptr;
        float* fed = nullptr;
        Projected to(1);
        if (feed_) {
            attended = rows_like(kName, input(context, kContext), feed_->context(), rows);
            fed = static_cast<float*>(output(context, 0, given.shape));
        }
        if (project_) {
            const Input cosines = input(context, kCos);
            cos = rows_like(kName, cosines, head_ / 2, rows);
            sin = rows_like(kName, input(context, kSin), head_ / 2, rows);
            if (cosines.shape.size() != 3) {
                throw std::invalid_argument(std::string(kName) + ": cos has shape " + text(cosines.shape) + ", wanted [B,S,D/2]");
            }
            to = outputs(context, cosines.shape[0], cosines.shape[1]);
        }
        for_rows(context, rows, (feed_ ? feed_->weights() : 0) + (project_ ? project_->weights() : 0), [&](size_t first, size_t some) {
            const size_t floats = std::max(feed_ ? feed_->floats(some) : 0, project_ ? project_->floats(some) : 0);
            const std::unique_ptr<Line[]> memory(new Line[(floats * sizeof(float) + sizeof(Line) - 1) / sizeof(Line)]);
            const float* now = x + first * width;
            if (feed_) {
                float* const result = fed + first * width;
                feed_->run(attended + first * feed_->context(), now, some, result, Scratch(memory.get()));
                now = result;
            }
            if (project_) {
                project_->run(now, first, some, cos, sin, to, Scratch(memory.get()));
            }
        });
    }

private:
    Projected outputs(OrtKernelContext* context, int64_t samples, int64_t tokens) const
    {
        Projected to(static_cast<size_t>(tokens));
        for (size_t part = 0; part < kParts; ++part) {
            const auto count = static_cast<int64_t>(project_->outputs(part)), head = static_cast<int64_t>(head_);
            to.by_token[part] = static_cast<float*>(wanted_output(context, 1 + part, {samples, tokens, count}));
            const std::vector<int64_t> shape{samples, count / head, tokens, head};
            to.by_head[part] = static_cast<float*>(wanted_output(context, 1 + kParts + part, shape));
        }
        return to;
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
