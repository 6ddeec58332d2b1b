// What the ONNX Runtime operators share: reading attributes and tensors with errors that name op, got and wanted.
// Written against the C interface, which only grows, so one library serves later runtimes.
#pragma once

#if __has_include(<onnxruntime_c_api.h>)
#include <onnxruntime_c_api.h>
#else
#include "ort_abi.h"
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace btp {

// The oldest interface with everything used here (ONNX Runtime 1.18): the library loads in it and in all later ones.
constexpr uint32_t kOrtApi = 18;

inline const OrtApi*& ort()
{
    static const OrtApi* api = nullptr;
    return api;
}

// Turns a failed call into an exception; every entry point turns exceptions back into a status (guard()).
inline void check(OrtStatus* status)
{
    if (status != nullptr) {
        const std::string message = ort()->GetErrorMessage(status);
        ort()->ReleaseStatus(status);
        throw std::runtime_error(message);
    }
}

template <typename Body>
OrtStatus* guard(Body body) noexcept
{
    try {
        body();
        return nullptr;
    } catch (const std::invalid_argument& error) {
        return ort()->CreateStatus(ORT_INVALID_ARGUMENT, error.what());
    } catch (const std::exception& error) {
        return ort()->CreateStatus(ORT_FAIL, error.what());
    }
}

inline void require_ok(const std::string& problem)
{
    if (!problem.empty()) {
        throw std::invalid_argument(problem);
    }
}

// Whether an attribute was read; false where the node does not have it. Throws where it has it with another type.
inline bool attribute_read(OrtStatus* status, const char* op, const char* name, const char* type)
{
    if (status == nullptr) {
        return true;
    }
    const std::string message = ort()->GetErrorMessage(status);
    ort()->ReleaseStatus(status);
    if (message.find("No attribute with name") != std::string::npos) {
        return false;
    }
    throw std::invalid_argument(std::string(op) + ": attribute " + name + " cannot be read as " + type + " (" + message
                                + ")");
}

// `fallback`: the value where the node does not have the attribute; null: it must have it.
inline int32_t int_attribute(const OrtKernelInfo* info, const char* op, const char* name,
                             const int32_t* fallback = nullptr)
{
    int64_t value = 0;
    if (!attribute_read(ort()->KernelInfoGetAttribute_int64(info, name, &value), op, name, "INT")) {
        if (fallback == nullptr) {
            throw std::invalid_argument(std::string(op) + ": attribute " + name + " is missing, wanted one INT");
        }
        return *fallback;
    }
    if (value < INT32_MIN || value > INT32_MAX) {
        throw std::invalid_argument(std::string(op) + ": attribute " + name + " is " + std::to_string(value)
                                    + ", wanted a 32-bit value");
    }
    return static_cast<int32_t>(value);
}

inline float float_attribute(const OrtKernelInfo* info, const char* op, const char* name)
{
    float value = 0.0f;
    if (!attribute_read(ort()->KernelInfoGetAttribute_float(info, name, &value), op, name, "FLOAT")) {
        throw std::invalid_argument(std::string(op) + ": attribute " + name + " is missing, wanted one FLOAT");
    }
    return value;
}

// The place of a STRING attribute's text among `choices` (null behind the last); 0 where the node does not have it.
inline int32_t choice_attribute(const OrtKernelInfo* info, const char* op, const char* name, const char* const* choices)
{
    size_t size = 0;  // with the zero at its end
    if (!attribute_read(ort()->KernelInfoGetAttribute_string(info, name, nullptr, &size), op, name, "STRING")) {
        return 0;
    }
    std::string text(size, '\0');
    check(ort()->KernelInfoGetAttribute_string(info, name, text.data(), &size));
    text.resize(text.find('\0'));
    std::string wanted;
    for (int32_t place = 0; choices[place] != nullptr; ++place) {
        if (text == choices[place]) {
            return place;
        }
        wanted += (place > 0 ? " or \"" : "\"") + std::string(choices[place]) + "\"";
    }
    throw std::invalid_argument(std::string(op) + ": " + name + " is \"" + text + "\", wanted " + wanted);
}

// An input tensor; `data` is null for an optional input that is not there.
struct Input {
    const void* data = nullptr;
    const OrtValue* value = nullptr;
    std::vector<int64_t> shape;
};

inline Input tensor_of(const OrtValue* value)
{
    Input result;
    result.value = value;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(ort()->GetTensorTypeAndShape(value, &info));
    size_t rank = 0;
    check(ort()->GetDimensionsCount(info, &rank));
    result.shape.resize(rank);
    check(ort()->GetDimensions(info, result.shape.data(), rank));
    ort()->ReleaseTensorTypeAndShapeInfo(info);
    void* data = nullptr;
    check(ort()->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    result.data = data;
    return result;
}

inline Input input(const OrtKernelContext* context, size_t index)
{
    Input result;
    size_t count = 0;
    check(ort()->KernelContext_GetInputCount(context, &count));
    if (index >= count) {
        return result;
    }
    const OrtValue* value = nullptr;
    check(ort()->KernelContext_GetInput(context, index, &value));
    return value == nullptr ? result : tensor_of(value);
}

// For an input that may be of several types.
inline ONNXTensorElementDataType element_type(const Input& input)
{
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(ort()->GetTensorTypeAndShape(input.value, &info));
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    OrtStatus* const status = ort()->GetTensorElementType(info, &type);
    ort()->ReleaseTensorTypeAndShapeInfo(info);
    check(status);
    return type;
}

inline void* output(OrtKernelContext* context, size_t index, const std::vector<int64_t>& shape)
{
    OrtValue* value = nullptr;
    check(ort()->KernelContext_GetOutput(context, index, shape.data(), shape.size(), &value));
    void* data = nullptr;
    check(ort()->GetTensorMutableData(value, &data));
    return data;
}

// The same for an output that a node need not have: null where nobody wants it.
inline void* wanted_output(OrtKernelContext* context, size_t index, const std::vector<int64_t>& shape)
{
    OrtValue* value = nullptr;
    check(ort()->KernelContext_GetOutput(context, index, shape.data(), shape.size(), &value));
    void* data = nullptr;
    if (value != nullptr) {
        check(ort()->GetTensorMutableData(value, &data));
    }
    return data;
}

// Columns of a part of a product that has so many, counted once for each block of its rows: `most`, which the cache takes,
// unless threads would have too few parts to share; a multiple of `unit`.
inline size_t columns_of_part(size_t columns, size_t unit, size_t least, size_t most)
{
    static const size_t threads = std::max(1u, std::thread::hardware_concurrency());
    return std::clamp(columns / (4 * threads) / unit * unit, least, most);
}

// Runs body(0) to body(count - 1) on the session's threads, and throws what one of them has thrown.
template <typename Body>
void parallel_for(const OrtKernelContext* context, int count, const Body& body)
{
    struct Work {
        const Body& body;
        std::atomic<bool> failed{false};
        std::exception_ptr error;
    } work{body, {}, {}};
    const auto one = [](void* data, size_t place) {
        auto& shared = *static_cast<Work*>(data);
        try {
            shared.body(static_cast<int>(place));
        } catch (...) {
            if (!shared.failed.exchange(true)) {
                shared.error = std::current_exception();
            }
        }
    };
    check(ort()->KernelContext_ParallelFor(context, one, static_cast<size_t>(count), 0, &work));
    if (work.error) {
        std::rethrow_exception(work.error);
    }
}

// Memory beside the tensor `beside`, for work on the kernel's stream. The arena keeps what is freed for this stream: another
// run gets it only behind the work that is on the stream by then. (OrtAllocator::Alloc knows no stream: memory from there
// may be handed to two runs at once.)
class StreamBuffer {
public:
    StreamBuffer(const OrtKernelContext* context, const OrtValue* beside, size_t bytes)
    {
        const OrtMemoryInfo* memory = nullptr;
        check(ort()->GetTensorMemoryInfo(beside, &memory));
        check(ort()->KernelContext_GetAllocator(context, memory, &allocator_));
        OrtStatus* const status = ort()->KernelContext_GetScratchBuffer(context, memory, bytes, &data_);
        if (status != nullptr) {
            ort()->ReleaseAllocator(allocator_);
            check(status);
        }
    }
    ~StreamBuffer()
    {
        if (data_ != nullptr) {
            allocator_->Free(allocator_, data_);
        }
        ort()->ReleaseAllocator(allocator_);
    }
    StreamBuffer(const StreamBuffer&) = delete;
    StreamBuffer& operator=(const StreamBuffer&) = delete;

    void* data() const { return data_; }

private:
    OrtAllocator* allocator_ = nullptr;
    void* data_ = nullptr;
};

inline std::string text(const std::vector<int64_t>& shape)
{
    std::string result = "[";
    for (size_t axis = 0; axis < shape.size(); ++axis) {
        result += (axis > 0 ? "," : "") + std::to_string(shape[axis]);
    }
    return result + "]";
}

inline void require_shape(const char* op, const char* name, const std::vector<int64_t>& got,
                          const std::vector<int64_t>& wanted)
{
    if (got != wanted) {
        throw std::invalid_argument(std::string(op) + ": " + name + " has shape " + text(got) + ", wanted "
                                    + text(wanted));
    }
}

inline int32_t small(int64_t value)
{
    if (value < 0 || value > INT32_MAX) {
        throw std::invalid_argument("a dimension is " + std::to_string(value) + ", wanted at most 2147483647");
    }
    return static_cast<int32_t>(value);
}

// One registration: an operator name for one device and one type of its typed input.
struct OrtOp : OrtCustomOp {
    const char* name;
    const char* device;  // execution provider, null for the CPU
    ONNXTensorElementDataType type;

    static const OrtOp& of(const OrtCustomOp* op) { return *static_cast<const OrtOp*>(op); }
    bool on_gpu() const { return device != nullptr; }
};

// What a kernel class says of its operands, as most have it: `inputs`, of which the first `required` must be there, and
// `outputs`, all of the registration's type. A class with other types has an input_type or output_type of its own.
template <size_t inputs, size_t required = inputs, size_t outputs = 1>
struct Operands {
    static constexpr size_t kInputs = inputs, kRequired = required, kOutputs = outputs;

    static ONNXTensorElementDataType input_type(ONNXTensorElementDataType type, size_t) { return type; }
    static ONNXTensorElementDataType output_type(ONNXTensorElementDataType type, size_t) { return type; }
};

// The part of the table that is the same for every operator. Kernel: constructed from (op, info), run(context); its
// operands are an Operands.
template <typename Kernel>
OrtOp ort_op(const char* name, const char* device, ONNXTensorElementDataType type)
{
    OrtOp op{};
    op.version = kOrtApi;
    op.name = name;
    op.device = device;
    op.type = type;
    op.GetName = [](const OrtCustomOp* self) { return OrtOp::of(self).name; };
    op.GetExecutionProviderType = [](const OrtCustomOp* self) { return OrtOp::of(self).device; };
    op.GetInputTypeCount = [](const OrtCustomOp*) { return Kernel::kInputs; };
    op.GetOutputTypeCount = [](const OrtCustomOp*) { return Kernel::kOutputs; };
    op.GetInputType = [](const OrtCustomOp* self, size_t index) {
        return Kernel::input_type(OrtOp::of(self).type, index);
    };
    op.GetOutputType = [](const OrtCustomOp* self, size_t index) {
        return Kernel::output_type(OrtOp::of(self).type, index);
    };
    op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
        return index < Kernel::kRequired ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    };
    op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
    op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
    op.CreateKernelV2 = [](const OrtCustomOp* self, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
        return guard([&] { *kernel = new Kernel(OrtOp::of(self), info); });
    };
    op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
        return guard([&] { static_cast<Kernel*>(kernel)->run(context); });
    };
    op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    return op;
}

// The operators of a library: the ort_op.cc of each operator's folder adds a function that makes its registrations, with a
// static OrtRegistration. So a library holds the operators whose sources it is linked from, and no list names them.
using OrtOps = std::vector<OrtOp> (*)(bool with_gpu);

// It is never destroyed: what zig links runs destructors when the process ends, where the library may be unloaded by then.
inline std::vector<OrtOps>& ort_operators()
{
    static auto* const operators = new std::vector<OrtOps>;
    return *operators;
}

struct OrtRegistration {
    explicit OrtRegistration(OrtOps ops) { ort_operators().push_back(ops); }
};

}  // namespace btp
