// Causal attention on a CPU, in no file: put in when a session is prepared (engines/runners/on_cpu/causal_attention.py).
#include <stdexcept>
#include <string>

#include "../common/ort_common.h"
#include "cpu_attention.h"

#ifdef BTP_X86
namespace btp {
namespace {

constexpr const char* kName = "BtpCausalAttention";

// query [B,S,H D], key and value [B,S,K D] float32 -> context [B,S,H D]. Scores are divided by the root of D, which is a
// multiple of 16; H is one of K.
class CausalAttention : public Operands<3> {
public:
    CausalAttention(const OrtOp&, const OrtKernelInfo* info)
        : heads_(int_attribute(info, kName, "num_heads")), key_heads_(int_attribute(info, kName, "kv_num_heads"))
    {
        if (heads_ < 1 || key_heads_ < 1 || heads_ % key_heads_ != 0) {
            throw std::invalid_argument(std::string(kName) + ": num_heads is " + std::to_string(heads_)
                                        + ", wanted a multiple of kv_num_heads, " + std::to_string(key_heads_));
        }
    }

    void run(OrtKernelContext* context) const
    {
        const Input query = input(context, 0), key = input(context, 1), value = input(context, 2);
        const int64_t step = static_cast<int64_t>(heads_) * static_cast<int64_t>(kVector);
        if (query.shape.size() != 3 || query.shape[2] < 1 || query.shape[2] % step != 0) {
            throw std::invalid_argument(std::string(kName) + ": query has shape " + text(query.shape)
                                        + ", wanted [B,S,H D], D a multiple of 16 and H " + std::to_string(heads_));
        }
        const int64_t size = query.shape[2] / heads_;
        require_shape(kName, "key", key.shape, {query.shape[0], query.shape[1], key_heads_ * size});
        require_shape(kName, "value", value.shape, key.shape);
        auto* const found = static_cast<float*>(output(context, 0, query.shape));
        const auto tokens = static_cast<size_t>(query.shape[1]), width = static_cast<size_t>(size);
        const auto queries_apart = static_cast<size_t>(query.shape[2]), keys_apart = static_cast<size_t>(key.shape[2]);
        const size_t panels = LaidOut::floats(tokens, width);
        parallel_for(context, static_cast<int>(query.shape[0]) * heads_, [&](int place) {
            const size_t batch = static_cast<size_t>(place / heads_), head = static_cast<size_t>(place % heads_);
            const size_t own = batch * tokens * queries_apart + head * width;
            const size_t shared = batch * tokens * keys_apart + head / static_cast<size_t>(heads_ / key_heads_) * width;
            const StreamBuffer scratch(context, query.value, (panels + Attention::floats(tokens, width)) * sizeof(float));
            LaidOut seen(static_cast<float*>(scratch.data()), tokens, width);
            Attention attention(static_cast<float*>(scratch.data()) + panels, tokens, width);
            for (size_t first = 0; first < tokens; first += kQueries) {
                const size_t row = shared + first * keys_apart;
                seen.block(first, static_cast<const float*>(key.data) + row, static_cast<const float*>(value.data) + row, keys_apart);
            }
            for (size_t first = 0; first < tokens; first += kQueries) {
                const size_t row = own + first * queries_apart;
                attention.run(seen, first, static_cast<const float*>(query.data) + row, queries_apart, found + row);
            }
        });
    }

private:
    const int32_t heads_, key_heads_;
};

const OrtRegistration registration([](bool) {
    std::vector<OrtOp> ops;
    if (has_byte_products()) {
        ops.push_back(ort_op<CausalAttention>(kName, nullptr, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT));
    }
    return ops;
});

}  // namespace
}  // namespace btp
#endif
