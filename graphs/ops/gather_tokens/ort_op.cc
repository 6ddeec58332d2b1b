// BtpGatherTokens as ONNX Runtime custom operator: CPU for all builds, CUDA where the kernels were compiled.
#include "../common/ort_common.h"
#include "cpu_gather.h"

namespace btp {
namespace {

constexpr const char* kName = "BtpGatherTokens";

int64_t element_bytes(ONNXTensorElementDataType type)
{
    switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE: return 8;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return 4;
    default: return 2;
    }
}

class GatherTokens : public Operands<2> {
public:
    static ONNXTensorElementDataType input_type(ONNXTensorElementDataType tokens, size_t index)
    {
        return index == 0 ? tokens : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    }

    GatherTokens(const OrtOp& op, const OrtKernelInfo* info)
        : gpu_(op.on_gpu()), element_bytes_(element_bytes(op.type)), start_(int_attribute(info, kName, "start")),
          count_(int_attribute(info, kName, "count"))
    {
    }

    void run(OrtKernelContext* context) const
    {
        const Input tokens = input(context, 0);
        const Input indices = input(context, 1);
        if (tokens.shape.size() < 2) {
            throw std::invalid_argument(std::string(kName) + ": tokens has shape " + text(tokens.shape)
                                        + ", wanted [B,S,...]");
        }
        if (indices.shape.size() != 2 || indices.shape[0] != tokens.shape[0]) {
            throw std::invalid_argument(std::string(kName) + ": indices has shape " + text(indices.shape) + ", wanted ["
                                        + std::to_string(tokens.shape[0]) + ",k]");
        }
        BtpGather gather{small(tokens.shape[0]), small(tokens.shape[1]), start_, count_, small(indices.shape[1]),
                         element_bytes_};
        for (size_t axis = 2; axis < tokens.shape.size(); ++axis) {
            gather.row_bytes *= tokens.shape[axis];
        }
        require_ok(gather_problem(gather));
        std::vector<int64_t> shape = tokens.shape;
        shape[1] = gather.rows - gather.count + gather.kept;
        void* const to = output(context, 0, shape);
        const auto* const chosen = static_cast<const int32_t*>(indices.data);
        if (gpu_) {
            run_gpu(context, gather, tokens.data, chosen, to);
        } else {
            gather_cpu(kName, gather, tokens.data, chosen, to);
        }
    }

private:
#ifdef BTP_WITH_CUDA
    static void run_gpu(OrtKernelContext* context, const BtpGather& gather, const void* tokens, const int32_t* indices,
                        void* to)
    {
        void* stream = nullptr;
        check(ort()->KernelContext_GetGPUComputeStream(context, &stream));
        const char* const problem = btp_gather_tokens_problem(&gather);
        require_ok(problem != nullptr ? problem : "");
        const int32_t status = btp_gather_tokens(&gather, tokens, indices, to, stream);
        if (status != BTP_OK) {
            throw std::runtime_error(std::string(kName) + ": " + btp_error_string(status));
        }
    }
#else
    static void run_gpu(OrtKernelContext*, const BtpGather&, const void*, const int32_t*, void*)
    {
        throw std::logic_error("BtpGatherTokens: this library was built without CUDA kernels");
    }
#endif

    const bool gpu_;
    const int64_t element_bytes_;
    const int32_t start_;
    const int32_t count_;
};

std::vector<OrtOp> ops_of(bool with_gpu)
{
    std::vector<OrtOp> ops;
    for (const auto type : {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                            ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE}) {
        ops.push_back(ort_op<GatherTokens>(kName, nullptr, type));
        if (with_gpu) {
            ops.push_back(ort_op<GatherTokens>(kName, "CUDAExecutionProvider", type));
        }
    }
    return ops;
}

const OrtRegistration registration(ops_of);

}  // namespace
}  // namespace btp
