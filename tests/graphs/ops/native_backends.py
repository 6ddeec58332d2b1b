"""The native forms of the operators as functions from numpy arrays to numpy arrays, for tests."""

import functools
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.gpu_ort import CustomOps
from engines.native.kernels import Kernels
from graphs.ops.common.trt_python import Tensor
from tests.engines.native import builds

Array = npt.NDArray[Any]


class Backend(Protocol):
    """Runs one operator: inputs by name (those that are there), INT attributes."""

    def select(self, inputs: dict[str, Array], attributes: dict[str, int]) -> Array: ...

    def gather(self, inputs: dict[str, Array], attributes: dict[str, int]) -> Array: ...


class Emulated:
    """The CUDA kernels' own source in the SIMT emulation (tests/engines/native/simt.h)."""

    def __init__(self) -> None:
        self.kernels = Kernels(builds.emulated_kernels())

    def select(self, inputs: dict[str, Array], attributes: dict[str, int]) -> Array:
        arrays = [np.ascontiguousarray(array) for array in inputs.values()]  # copies must outlive the call
        tensors = [_tensor(array) for array in arrays]
        workspace = np.full(self.kernels.workspace("select_tokens", tensors, **attributes) + 8, 0xA5, np.uint8)
        output = np.full((inputs["scores"].shape[0], attributes["keep"]), -7, np.int32)
        self.kernels.select_tokens(tensors, output.ctypes.data, workspace.ctypes.data, stream=0, **attributes)
        assert (workspace[-8:] == 0xA5).all(), "the kernel wrote behind its workspace"
        return output

    def gather(self, inputs: dict[str, Array], attributes: dict[str, int]) -> Array:
        tokens, indices = inputs["tokens"], inputs["indices"]
        rows = tokens.shape[1] - attributes["count"] + indices.shape[1]
        guarded = np.zeros((tokens.shape[0] * rows + 1, *tokens.shape[2:]), tokens.dtype)
        guarded.view(np.uint8)[...] = 0xA5
        self.kernels.gather_tokens([_tensor(tokens), _tensor(indices)], guarded.ctypes.data, stream=0, **attributes)
        assert (guarded[-1:].view(np.uint8) == 0xA5).all(), "the kernel wrote behind its output"
        return guarded[:-1].reshape(tokens.shape[0], rows, *tokens.shape[2:])


def _tensor(array: Array) -> Tensor:
    assert array.flags.c_contiguous
    return Tensor(array.ctypes.data, array.shape, array.dtype.name)


@functools.cache
def backend(name: str) -> Backend:
    return Emulated() if name == "cuda-kernel-emulated" else CustomOps(builds.ort_library())


BACKENDS = ("cuda-kernel-emulated", "ort-custom-op")
