// Test only: where ONNX Runtime's own header is at hand, every place and number of ort_abi.h must be that of the header.
#define OrtApi OurApi
#define OrtApiBase OurApiBase
#define OrtAllocator OurAllocator
#define OrtCustomOp OurCustomOp
#define OrtErrorCode OurErrorCode
#define OrtMemType OurMemType
#define OrtCustomOpInputOutputCharacteristic OurCharacteristic
#define ONNXTensorElementDataType OurDataType
#define ORT_OK OUR_OK
#define ORT_FAIL OUR_FAIL
#define ORT_INVALID_ARGUMENT OUR_INVALID_ARGUMENT
#define ORT_NOT_IMPLEMENTED OUR_NOT_IMPLEMENTED
#define OrtMemTypeDefault OurMemTypeDefault
#define INPUT_OUTPUT_REQUIRED OUR_REQUIRED
#define INPUT_OUTPUT_OPTIONAL OUR_OPTIONAL
#define INPUT_OUTPUT_VARIADIC OUR_VARIADIC
#define ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED OUR_UNDEFINED
#define ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT OUR_FLOAT
#define ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 OUR_UINT8
#define ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 OUR_INT32
#define ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 OUR_INT64
#define ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 OUR_FLOAT16
#define ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE OUR_DOUBLE
#define ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 OUR_BFLOAT16
#include "../../../graphs/ops/common/ort_abi.h"
#undef OrtApi
#undef OrtApiBase
#undef OrtAllocator
#undef OrtCustomOp
#undef OrtErrorCode
#undef OrtMemType
#undef OrtCustomOpInputOutputCharacteristic
#undef ONNXTensorElementDataType
#undef ORT_OK
#undef ORT_FAIL
#undef ORT_INVALID_ARGUMENT
#undef ORT_NOT_IMPLEMENTED
#undef OrtMemTypeDefault
#undef INPUT_OUTPUT_REQUIRED
#undef INPUT_OUTPUT_OPTIONAL
#undef INPUT_OUTPUT_VARIADIC
#undef ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED
#undef ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
#undef ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8
#undef ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32
#undef ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64
#undef ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16
#undef ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE
#undef ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16
#include <onnxruntime_c_api.h>

#define SAME_PLACE(ours, theirs, member) \
    static_assert(offsetof(ours, member) == offsetof(theirs, member), #member " has another place")
#define SAME_VALUE(ours, theirs) static_assert(int(ours) == int(theirs), #theirs " is another number")

SAME_PLACE(OurApi, OrtApi, CreateStatus);
SAME_PLACE(OurApi, OrtApi, GetErrorMessage);
SAME_PLACE(OurApi, OrtApi, CreateCustomOpDomain);
SAME_PLACE(OurApi, OrtApi, CustomOpDomain_Add);
SAME_PLACE(OurApi, OrtApi, AddCustomOpDomain);
SAME_PLACE(OurApi, OrtApi, GetTensorMutableData);
SAME_PLACE(OurApi, OrtApi, GetTensorElementType);
SAME_PLACE(OurApi, OrtApi, GetDimensionsCount);
SAME_PLACE(OurApi, OrtApi, GetDimensions);
SAME_PLACE(OurApi, OrtApi, GetTensorTypeAndShape);
SAME_PLACE(OurApi, OrtApi, KernelInfoGetAttribute_float);
SAME_PLACE(OurApi, OrtApi, KernelInfoGetAttribute_int64);
SAME_PLACE(OurApi, OrtApi, KernelInfoGetAttribute_string);
SAME_PLACE(OurApi, OrtApi, KernelContext_GetInputCount);
SAME_PLACE(OurApi, OrtApi, KernelContext_GetInput);
SAME_PLACE(OurApi, OrtApi, KernelContext_GetOutput);
SAME_PLACE(OurApi, OrtApi, ReleaseStatus);
SAME_PLACE(OurApi, OrtApi, ReleaseTensorTypeAndShapeInfo);
SAME_PLACE(OurApi, OrtApi, ReleaseAllocator);
SAME_PLACE(OurApi, OrtApi, KernelContext_GetGPUComputeStream);
SAME_PLACE(OurApi, OrtApi, GetTensorMemoryInfo);
SAME_PLACE(OurApi, OrtApi, KernelInfoGetConstantInput_tensor);
SAME_PLACE(OurApi, OrtApi, KernelContext_GetAllocator);
SAME_PLACE(OurApi, OrtApi, KernelContext_ParallelFor);
SAME_PLACE(OurApi, OrtApi, KernelContext_GetScratchBuffer);
SAME_PLACE(OurApiBase, OrtApiBase, GetApi);
SAME_PLACE(OurAllocator, OrtAllocator, Alloc);
SAME_PLACE(OurAllocator, OrtAllocator, Free);
SAME_PLACE(OurCustomOp, OrtCustomOp, GetName);
SAME_PLACE(OurCustomOp, OrtCustomOp, GetExecutionProviderType);
SAME_PLACE(OurCustomOp, OrtCustomOp, GetInputType);
SAME_PLACE(OurCustomOp, OrtCustomOp, GetInputTypeCount);
SAME_PLACE(OurCustomOp, OrtCustomOp, GetOutputType);
SAME_PLACE(OurCustomOp, OrtCustomOp, GetOutputTypeCount);
SAME_PLACE(OurCustomOp, OrtCustomOp, KernelDestroy);
SAME_PLACE(OurCustomOp, OrtCustomOp, GetInputCharacteristic);
SAME_PLACE(OurCustomOp, OrtCustomOp, GetOutputCharacteristic);
SAME_PLACE(OurCustomOp, OrtCustomOp, GetInputMemoryType);
SAME_PLACE(OurCustomOp, OrtCustomOp, GetVariadicInputMinArity);
SAME_PLACE(OurCustomOp, OrtCustomOp, GetVariadicInputHomogeneity);
SAME_PLACE(OurCustomOp, OrtCustomOp, GetVariadicOutputMinArity);
SAME_PLACE(OurCustomOp, OrtCustomOp, GetVariadicOutputHomogeneity);
SAME_PLACE(OurCustomOp, OrtCustomOp, CreateKernelV2);
SAME_PLACE(OurCustomOp, OrtCustomOp, KernelComputeV2);
SAME_PLACE(OurCustomOp, OrtCustomOp, GetStartVersion);
SAME_PLACE(OurCustomOp, OrtCustomOp, GetEndVersion);
static_assert(sizeof(OurCustomOp) >= offsetof(OrtCustomOp, GetMayInplace), "the runtime reads no further than `version` says");
SAME_VALUE(OUR_OK, ORT_OK);
SAME_VALUE(OUR_FAIL, ORT_FAIL);
SAME_VALUE(OUR_INVALID_ARGUMENT, ORT_INVALID_ARGUMENT);
SAME_VALUE(OUR_NOT_IMPLEMENTED, ORT_NOT_IMPLEMENTED);
SAME_VALUE(OurMemTypeDefault, OrtMemTypeDefault);
SAME_VALUE(OUR_REQUIRED, INPUT_OUTPUT_REQUIRED);
SAME_VALUE(OUR_OPTIONAL, INPUT_OUTPUT_OPTIONAL);
SAME_VALUE(OUR_VARIADIC, INPUT_OUTPUT_VARIADIC);
SAME_VALUE(OUR_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
SAME_VALUE(OUR_UINT8, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);
SAME_VALUE(OUR_INT32, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
SAME_VALUE(OUR_INT64, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
SAME_VALUE(OUR_FLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
SAME_VALUE(OUR_DOUBLE, ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE);
SAME_VALUE(OUR_BFLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16);
