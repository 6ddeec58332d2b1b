// What stands around a selection as ONNX Runtime custom operators for the CPU, in float32. In no file: they are put in place of
// what the file says in many small nodes when a session is prepared (engines/runners/on_cpu/around_selection.py).
#include <algorithm>

#include "../common/ort_common.h"
#include "../gather_tokens/cpu_gather.h"
#include "cpu_scores.h"

namespace btp {
namespace {

constexpr const char* kStream = "BtpGatherStream";
constexpr const char* kRowsAt = "BtpRowsAt";
constexpr const char* kScores = "BtpAttentionScores";

constexpr auto kFloats = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kIntegers = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;

// last [B] int32; throws unless each is a row of S.
const int32_t* last_of(const char* op, const Input& last, int64_t batch, int64_t rows)
{
    require_shape(op, "last", last.shape, {batch});
    const auto* const places = static_cast<const int32_t*>(last.data);
    for (int64_t sample = 0; sample < batch; ++sample) {
        if (places[sample] < 0 || places[sample] >= rows) {
            throw std::invalid_argument(std::string(op) + ": last is " + std::to_string(places[sample]) + ", wanted 0 to "
                                        + std::to_string(rows - 1));
        }
    }
    return places;
}

// indices [B,k] int32, last [B] int32, hidden [B,S,C], cos, sin [B,S,D/2]
//   -> last less the tokens that are gone; the others with S - count + k rows, as BtpGatherTokens gives them
class GatherStream : public Operands<5, 5, 4> {
public:
    static ONNXTensorElementDataType input_type(ONNXTensorElementDataType, size_t index) { return index < 2 ? kIntegers : kFloats; }
    static ONNXTensorElementDataType output_type(ONNXTensorElementDataType, size_t index) { return index < 1 ? kIntegers : kFloats; }

    GatherStream(const OrtOp&, const OrtKernelInfo* info)
        : start_(int_attribute(info, kStream, "start")), count_(int_attribute(info, kStream, "count"))
    {
    }

    void run(OrtKernelContext* context) const
    {
        const Input indices = input(context, 0), last = input(context, 1);
        if (indices.shape.size() != 2) {
            throw std::invalid_argument(std::string(kStream) + ": indices has shape " + text(indices.shape) + ", wanted [B,k]");
        }
        const int64_t batch = indices.shape[0], kept = indices.shape[1];
        require_shape(kStream, "last", last.shape, {batch});
        auto* const places = static_cast<int32_t*>(output(context, 0, last.shape));
        for (int64_t sample = 0; sample < batch; ++sample) {
            places[sample] = static_cast<const int32_t*>(last.data)[sample] - (count_ - small(kept));
        }
        for (const size_t part : {size_t{1}, size_t{2}, size_t{3}}) {
            const Input rows = input(context, part + 1);
            if (rows.shape.size() != 3 || rows.shape[0] != batch) {
                throw std::invalid_argument(std::string(kStream) + ": rows have shape " + text(rows.shape) + ", wanted [B,S,C]");
            }
            const BtpGather gather{small(batch), small(rows.shape[1]), start_, count_, small(kept),
                                   rows.shape[2] * static_cast<int64_t>(sizeof(float))};
            require_ok(gather_problem(gather));
            void* const to = output(context, part, {batch, rows.shape[1] - count_ + kept, rows.shape[2]});
            gather_cpu(kStream, gather, rows.data, static_cast<const int32_t*>(indices.data), to);
        }
    }

private:
    const int32_t start_, count_;
};

// rows [B,H,S,D], last [B] int32 -> the rows at `last` [B,H,1,D]
class RowsAt : public Operands<2> {
public:
    static ONNXTensorElementDataType input_type(ONNXTensorElementDataType, size_t index) { return index < 1 ? kFloats : kIntegers; }

    RowsAt(const OrtOp&, const OrtKernelInfo*) {}

    void run(OrtKernelContext* context) const
    {
        const Input rows = input(context, 0);
        if (rows.shape.size() != 4) {
            throw std::invalid_argument(std::string(kRowsAt) + ": rows have shape " + text(rows.shape) + ", wanted [B,H,S,D]");
        }
        const int64_t batch = rows.shape[0], heads = rows.shape[1], tokens = rows.shape[2], size = rows.shape[3];
        const int32_t* const last = last_of(kRowsAt, input(context, 1), batch, tokens);
        const auto* const from = static_cast<const float*>(rows.data);
        auto* const to = static_cast<float*>(output(context, 0, {batch, heads, 1, size}));
        for (int64_t head = 0; head < batch * heads; ++head) {
            std::copy_n(from + (head * tokens + last[head / heads]) * size, size, to + head * size);
        }
    }
};

// query [B,H,1,D], key [B,K,S,D], last [B] int32: the query's place
//   -> [B,count]: the mean over heads of softmax(scale query key^T) up to `last`, of the tokens from `start` on
class AttentionScores : public Operands<3> {
public:
    static ONNXTensorElementDataType input_type(ONNXTensorElementDataType, size_t index) { return index < 2 ? kFloats : kIntegers; }

    AttentionScores(const OrtOp&, const OrtKernelInfo* info)
        : start_(int_attribute(info, kScores, "start")), count_(int_attribute(info, kScores, "count")),
          scale_(float_attribute(info, kScores, "scale"))
    {
    }

    void run(OrtKernelContext* context) const
    {
        const Input query = input(context, 0), key = input(context, 1);
        const bool whole = query.shape.size() == 4 && key.shape.size() == 4 && key.shape[1] > 0 && query.shape[1] % key.shape[1] == 0
                           && start_ >= 0 && count_ >= 0 && key.shape[2] >= int64_t{start_} + count_;
        if (!whole) {
            throw std::invalid_argument(std::string(kScores) + ": query has shape " + text(query.shape) + " and key " + text(key.shape)
                                        + ", wanted [B,H,1,D] and [B,K,S,D], S " + std::to_string(int64_t{start_} + count_) + " or more");
        }
        const int64_t batch = key.shape[0], heads = query.shape[1], group = heads / key.shape[1], tokens = key.shape[2];
        const auto size = static_cast<size_t>(key.shape[3]);
        require_shape(kScores, "query", query.shape, {batch, heads, 1, key.shape[3]});
        const int32_t* const last = last_of(kScores, input(context, 2), batch, tokens);
        auto* const scores = static_cast<float*>(output(context, 0, {batch, count_}));
        std::fill_n(scores, batch * count_, 0.0f);
        std::vector<float> scaled(size);
        for (int64_t row = 0; row < batch * heads; ++row) {
            const auto* const own = static_cast<const float*>(query.data) + row * key.shape[3];
            std::transform(own, own + size, scaled.begin(), [this](float number) { return number * scale_; });
            const auto* const keys = static_cast<const float*>(key.data) + row / group * tokens * key.shape[3];
            const int64_t sample = row / heads;
            add_weights(scores + sample * count_, static_cast<size_t>(start_), static_cast<size_t>(count_), scaled.data(), keys,
                        static_cast<size_t>(last[sample]) + 1, size);
        }
        for (int64_t token = 0; token < batch * count_; ++token) {
            scores[token] /= static_cast<float>(heads);
        }
    }

private:
    const int32_t start_, count_;
    const float scale_;
};

std::vector<OrtOp> ops_of(bool)
{
    return {ort_op<GatherStream>(kStream, nullptr, kFloats), ort_op<RowsAt>(kRowsAt, nullptr, kFloats),
            ort_op<AttentionScores>(kScores, nullptr, kFloats)};
}

const OrtRegistration registration(ops_of);

}  // namespace
}  // namespace btp
