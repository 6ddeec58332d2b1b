"""Test only: ONNX Runtime's side of a custom operator, so that the CUDA path of btp_ort runs where no GPU is.

The library is built with the emulated kernels. The host serves the functions that the operators call, at their places
in OrtApi (graphs/ops/common/ort_abi.h), and keeps account of the memory that they ask for.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tests.engines.native import builds

Array = npt.NDArray[Any]
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_PLACES: Final = {  # function -> place, types of its arguments
    "CreateStatus": (0, (ctypes.c_int, ctypes.c_char_p)),
    "GetErrorMessage": (2, (_POINTER,)),
    "CreateCustomOpDomain": (26, (ctypes.c_char_p, _POINTER)),
    "CustomOpDomain_Add": (27, (_POINTER, _POINTER)),
    "AddCustomOpDomain": (28, (_POINTER, _POINTER)),
    "GetTensorMutableData": (51, (_POINTER, _POINTER)),
    "GetDimensionsCount": (61, (_POINTER, _POINTER)),
    "GetDimensions": (62, (_POINTER, _POINTER, _SIZE)),
    "GetTensorTypeAndShape": (65, (_POINTER, _POINTER)),
    "KernelInfoGetAttribute_int64": (86, (_POINTER, ctypes.c_char_p, _POINTER)),
    "KernelInfoGetAttribute_string": (87, (_POINTER, ctypes.c_char_p, _POINTER, _POINTER)),
    "KernelContext_GetInputCount": (88, (_POINTER, _POINTER)),
    "KernelContext_GetInput": (90, (_POINTER, _SIZE, _POINTER)),
    "KernelContext_GetOutput": (91, (_POINTER, _SIZE, _POINTER, _SIZE, _POINTER)),
    "ReleaseStatus": (93, (_POINTER,)),
    "ReleaseTensorTypeAndShapeInfo": (99, (_POINTER,)),
    "ReleaseAllocator": (132, (_POINTER,)),
    "KernelContext_GetGPUComputeStream": (193, (_POINTER, _POINTER)),
    "GetTensorMemoryInfo": (194, (_POINTER, _POINTER)),
    "KernelContext_GetAllocator": (253, (_POINTER, _POINTER, _POINTER)),
    "KernelContext_GetScratchBuffer": (277, (_POINTER, _POINTER, _SIZE, _POINTER)),
}
_RESULTS: Final = {"ReleaseStatus": None, "ReleaseTensorTypeAndShapeInfo": None, "ReleaseAllocator": None}
_TYPES: Final = {"float32": 1, "int32": 6, "float16": 10, "bfloat16": 16}
# Places in OrtCustomOp, in pointers.
_NAME, _PROVIDER, _INPUT_TYPE, _DESTROY, _CREATE, _COMPUTE = 2, 3, 4, 9, 17, 18


class _Allocator(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("alloc", _POINTER), ("free", _POINTER)]


def _store(address: int, value: int) -> None:
    ctypes.c_size_t.from_address(address).value = value


@functools.cache
def gpu_host() -> "GpuHost":
    """The one host of this process: the library makes its domain of operators once, for the first that asks."""
    return GpuHost(builds.ort_cuda_library())


class GpuHost:
    """Runs the CUDA forms of the operators in the library `path` on arrays of this machine's memory.

    `scratch`: what GetScratchBuffer gave and nobody freed; `without_stream`: calls of OrtAllocator.Alloc.
    """

    def __init__(self, path: Path) -> None:
        self.scratch: dict[int, Array] = {}
        self.without_stream = 0
        self._objects: list[Any] = [None]  # a handle is a place in this list
        self._operators: list[int] = []
        self._attributes: dict[str, int | str] = {}
        self._inputs: list[Array | None] = []
        self._output: Array | None = None
        self._output_dtype: Any = None
        self._callbacks: list[Any] = []
        self._table = (_POINTER * 400)()
        for name, (place, arguments) in _PLACES.items():
            self._table[place] = self._callback(name, _RESULTS.get(name, _POINTER), arguments)
        self._allocator = _Allocator(
            18, self._callback("Alloc", _POINTER, (_POINTER, _SIZE)), self._callback("Free", None, (_POINTER, _POINTER))
        )
        base = (_POINTER * 2)(self._callback("GetApi", _POINTER, (ctypes.c_uint32,)), None)
        self._library = ctypes.CDLL(str(path))
        self._library.RegisterCustomOps.restype = _POINTER
        self._require(self._library.RegisterCustomOps(None, base))

    def select(self, inputs: dict[str, Array], attributes: dict[str, Any]) -> Array:
        """BtpSelectTokens: inputs by name, those that are there. Raises RuntimeError where the operator refuses."""
        similarity = inputs.get("similarity")
        kind = "float32" if similarity is None else similarity.dtype.name
        given = [inputs.get(name) for name in ("scores", "similarity", "seeds")]
        return self._run(self._operator("BtpSelectTokens", 1, kind), given, attributes, np.dtype(np.int32))

    def linear(self, inputs: dict[str, Array], attributes: dict[str, Any]) -> Array:
        """BtpLinear, likewise."""
        x = inputs["x"]
        given = [inputs.get(name) for name in ("x", "qweight", "scales", "zeros", "bias")]
        return self._run(self._operator("BtpLinear", 0, x.dtype.name), given, attributes, x.dtype)

    def _run(self, operator: int, inputs: list[Array | None], attributes: dict[str, Any], dtype: Any) -> Array:
        self._attributes, self._inputs, self._output_dtype = attributes, inputs, dtype
        kernel = _POINTER()
        self._require(self._call(operator, _CREATE, (operator, None, None, ctypes.byref(kernel))))
        try:
            self._require(self._call(operator, _COMPUTE, (kernel, None)))
        finally:
            self._call(operator, _DESTROY, (kernel,), None)
        assert self._output is not None
        return self._output

    def _operator(self, wanted: str, place: int, dtype: str) -> int:
        """The operator of that name for CUDA whose input at `place` has that type."""
        for operator in self._operators:
            name = self._call(operator, _NAME, (operator,), ctypes.c_char_p)
            provider = self._call(operator, _PROVIDER, (operator,), ctypes.c_char_p)
            kind = self._call(operator, _INPUT_TYPE, (operator, ctypes.c_size_t(place)), ctypes.c_int)
            if (name, provider, kind) == (wanted.encode(), b"CUDAExecutionProvider", _TYPES[dtype]):
                return operator
        raise AssertionError(f"no {wanted} for CUDA and {dtype}")

    @staticmethod
    def _call(operator: int, place: int, arguments: tuple[Any, ...], result: Any = _POINTER) -> Any:
        address = (_POINTER * 32).from_address(operator)[place]
        given = [_POINTER(argument) if isinstance(argument, int) else argument for argument in arguments]
        return ctypes.CFUNCTYPE(result)(address)(*given)

    def _callback(self, name: str, result: Any, arguments: tuple[Any, ...]) -> int:
        built = ctypes.CFUNCTYPE(result, *arguments)(functools.partial(getattr(self, f"_api_{name}")))
        self._callbacks.append(built)
        return ctypes.cast(built, _POINTER).value or 0

    def _handle(self, value: Any) -> int:
        self._objects.append(value)
        return len(self._objects) - 1

    def _require(self, status: int | None) -> None:
        if status:
            raise RuntimeError(self._objects[status].value.decode())

    # What the library calls. A status is a handle, or None where all went well.

    def _api_GetApi(self, version: int) -> int:
        return ctypes.addressof(self._table)

    def _api_CreateStatus(self, code: int, message: bytes) -> int:
        return self._handle(ctypes.create_string_buffer(message))

    def _api_GetErrorMessage(self, status: int) -> int:
        return ctypes.addressof(self._objects[status])

    def _api_CreateCustomOpDomain(self, name: bytes, out: int) -> None:
        _store(out, self._handle(name))

    def _api_CustomOpDomain_Add(self, domain: int, operator: int) -> None:
        self._operators.append(operator)

    def _api_AddCustomOpDomain(self, options: int, domain: int) -> None:
        return None

    def _api_GetTensorMutableData(self, value: int, out: int) -> None:
        _store(out, self._objects[value].ctypes.data)

    def _api_GetTensorTypeAndShape(self, value: int, out: int) -> None:
        _store(out, value)

    def _api_GetDimensionsCount(self, info: int, out: int) -> None:
        _store(out, self._objects[info].ndim)

    def _api_GetDimensions(self, info: int, out: int, count: int) -> None:
        for axis, size in enumerate(self._objects[info].shape):
            _store(out + 8 * axis, size)

    def _api_KernelInfoGetAttribute_int64(self, info: int, name: bytes, out: int) -> int | None:
        value = self._attributes.get(name.decode())
        if not isinstance(value, int):
            return self._no_attribute(name)
        _store(out, value)
        return None

    def _api_KernelInfoGetAttribute_string(self, info: int, name: bytes, out: int | None, size: int) -> int | None:
        value = self._attributes.get(name.decode())
        if not isinstance(value, str):
            return self._no_attribute(name)
        _store(size, len(value) + 1)
        if out:
            ctypes.memmove(out, value.encode() + b"\0", len(value) + 1)
        return None

    def _no_attribute(self, name: bytes) -> int:
        return self._api_CreateStatus(1, b"No attribute with name:'" + name + b"'is defined.")

    def _api_KernelContext_GetInputCount(self, context: int, out: int) -> None:
        _store(out, len(self._inputs))

    def _api_KernelContext_GetInput(self, context: int, place: int, out: int) -> None:
        value = self._inputs[place]
        _store(out, 0 if value is None else self._handle(value))

    def _api_KernelContext_GetOutput(self, context: int, place: int, shape: int, rank: int, out: int) -> None:
        sizes = [ctypes.c_int64.from_address(shape + 8 * axis).value for axis in range(rank)]
        self._output = np.full(sizes, -7, self._output_dtype)
        _store(out, self._handle(self._output))

    def _api_ReleaseStatus(self, status: int) -> None:
        return None

    def _api_ReleaseTensorTypeAndShapeInfo(self, info: int) -> None:
        return None

    def _api_ReleaseAllocator(self, allocator: int) -> None:
        return None

    def _api_KernelContext_GetGPUComputeStream(self, context: int, out: int) -> None:
        _store(out, 0)

    def _api_GetTensorMemoryInfo(self, value: int, out: int) -> None:
        _store(out, value)

    def _api_KernelContext_GetAllocator(self, context: int, memory: int, out: int) -> None:
        _store(out, ctypes.addressof(self._allocator))

    def _api_KernelContext_GetScratchBuffer(self, context: int, memory: int, size: int, out: int) -> None:
        _store(out, self._memory(size))

    def _api_Alloc(self, allocator: int, size: int) -> int:
        self.without_stream += 1
        return self._memory(size)

    def _api_Free(self, allocator: int, address: int) -> None:
        del self.scratch[address]

    def _memory(self, size: int) -> int:
        """Noise, at an address that the arena could give."""
        room = np.full(size + 256, 0xA5, np.uint8)
        address = (room.ctypes.data + 255) // 256 * 256
        self.scratch[address] = room
        return address
