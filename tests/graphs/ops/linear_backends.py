"""BtpLinear's native forms as functions from a case to y, for tests."""

import functools
from typing import Any

import numpy as np

from benchmarks.gpu_ort import CustomOps
from engines.native.kernels import Kernels
from graphs import packing
from graphs.ops.common.trt_python import Tensor
from graphs.ops.linear import Case
from tests.engines.native import builds


def emulated(case: Case, *, as_words: bool = False) -> Any:
    """y from the CUDA kernels' own source in the SIMT emulation. as_words: the codes as TensorRT's graphs have them."""
    given = {name: _aligned(array) for name, array in case.inputs.items()}
    if as_words:
        given["qweight"] = _aligned(packing.words(given["qweight"]))
        given |= {"zeros": packing.zero_words(given["zeros"])} if "zeros" in given else {}
    tensors = [Tensor(array.ctypes.data, array.shape, array.dtype.name) for array in given.values()]
    room = kernels().workspace("linear", tensors, **case.attributes)
    workspace = _aligned(np.full(room + 16, 0xA5, np.uint8))
    m, n = len(case.x), len(case.qweight)
    y = np.full(m * n + 1, -7, case.x.dtype)
    kernels().linear(tensors, y.ctypes.data, workspace.ctypes.data, stream=0, **case.attributes)
    assert (workspace[-16:] == 0xA5).all(), "the kernel wrote behind its workspace"
    assert y[-1] == -7, "the kernel wrote behind its output"
    return y[:-1].reshape(m, n)


@functools.cache
def kernels() -> Kernels:
    return Kernels(builds.emulated_kernels())


def custom_op(case: Case) -> Any:
    """y from ONNX Runtime's custom operator on the CPU."""
    return _library().run("BtpLinear", case.inputs, case.attributes, case.x.dtype, 2)


@functools.cache
def _library() -> CustomOps:
    return CustomOps(builds.ort_library())


def _aligned(array: Any) -> Any:
    """The same array at an address that is a multiple of 256, as a device's allocator gives it."""
    room = np.empty(array.nbytes + 256, np.uint8)
    start = -room.ctypes.data % 256
    built = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    built[...] = array
    return built
