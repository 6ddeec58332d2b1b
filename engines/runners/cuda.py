"""Buffers in the memory of an NVIDIA GPU.

ONNX Runtime allocates the memory; copies go through the CUDA runtime library that onnxruntime-gpu has loaded already,
because its Python interface cannot write part of a tensor. A row of a key/value cache lies once per head at a constant
distance, so one strided copy (cudaMemcpy2D) writes it, and the cache itself is never moved.

Not yet run on a GPU: written after the CUDA runtime's documentation and tested against a library in host memory.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from math import prod

import numpy as np
import onnxruntime as ort

from engines.runners import Array, Buffer, Dtype
from engines.runners.host import check_rows
from graphs.errors import CheckError, UnavailableError

LIBRARIES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "cudart64_13.dll", "cudart64_12.dll")
DETECT_DIRECTION = 4  # cudaMemcpyDefault: the addresses tell which side is the device


class CudaBuffer:
    """A tensor in device memory at a fixed address."""

    def __init__(self, owner: ort.OrtValue, dtype: Dtype, shape: Sequence[int]) -> None:
        self._owner = owner  # holds the memory
        self.dtype: Dtype = dtype
        self.shape: tuple[int, ...] = tuple(shape)
        self.pointer: int = owner.data_ptr()

    @staticmethod
    def allocate(dtype: Dtype, shape: Sequence[int], *, device: int) -> "CudaBuffer":
        """Zeroed memory for one tensor. Raises UnavailableError without the CUDA runtime library."""
        size = max(prod(shape) * dtype.itemsize, 1)
        owner = ort.OrtValue.ortvalue_from_shape_and_type([size], np.uint8, "cuda", device)
        _call("cudaMemset", owner.data_ptr(), 0, size)
        return CudaBuffer(owner, dtype, shape)

    def write(self, values: Array) -> None:
        if values.shape != self.shape:
            raise ValueError(f"cannot write {values.shape} into a buffer of shape {self.shape}")
        host = np.ascontiguousarray(values, dtype=self.dtype)
        _call("cudaMemcpy", self.pointer, host.ctypes.data, host.nbytes, DETECT_DIRECTION)

    def read(self) -> Array:
        host = np.empty(self.shape, self.dtype)
        _call("cudaMemcpy", host.ctypes.data, self.pointer, host.nbytes, DETECT_DIRECTION)
        return host

    def view(self, shape: Sequence[int]) -> "CudaBuffer":
        if prod(shape) > prod(self.shape):
            raise ValueError(f"{tuple(shape)} needs more memory than {self.shape}")
        return CudaBuffer(self._owner, self.dtype, shape)

    def write_rows(self, rows: Array | Buffer, starts: Sequence[int]) -> None:
        check_rows(self.shape, rows.shape, starts)
        host = np.ascontiguousarray(rows, dtype=self.dtype) if isinstance(rows, np.ndarray) else None
        source = rows.pointer if host is None else host.ctypes.data  # type: ignore[union-attr]
        row = self.shape[-1] * self.dtype.itemsize
        width, pitch = rows.shape[-2] * row, self.shape[-2] * row  # bytes copied, bytes from one head to the next
        heads = prod(self.shape[1:-2])
        for sample, start in enumerate(starts):
            target = self.pointer + sample * heads * pitch + start * row
            origin = source + sample * heads * width
            _call("cudaMemcpy2D", target, pitch, origin, width, width, heads, DETECT_DIRECTION)
        # Copies inside the device return at once; ONNX Runtime computes on a stream that does not wait for them.
        _call("cudaDeviceSynchronize")


# Argument types of the CUDA runtime functions used here; addresses and sizes are as wide as a pointer.
_WIDE, _INT = ctypes.c_size_t, ctypes.c_int
_SIGNATURES: dict[str, tuple[type[ctypes.c_size_t] | type[ctypes.c_int], ...]] = {
    "cudaMemset": (_WIDE, _INT, _WIDE),  # target, byte, count
    "cudaMemcpy": (_WIDE, _WIDE, _WIDE, _INT),  # target, source, count, direction
    "cudaMemcpy2D": (_WIDE, _WIDE, _WIDE, _WIDE, _WIDE, _WIDE, _INT),  # target, pitch, source, pitch, width, height
    "cudaDeviceSynchronize": (),
}


def _call(name: str, *arguments: int) -> None:
    """Call one function of the CUDA runtime. Raises CheckError if it reports an error."""
    converted = [kind(argument) for kind, argument in zip(_SIGNATURES[name], arguments, strict=True)]
    code = getattr(_library(), name)(*converted)
    if code:
        raise CheckError(
            f"{name} failed with CUDA error {code}", wanted="a working GPU", do="nvidia-smi; or --device cpu"
        )


@cache
def _library() -> ctypes.CDLL:
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise UnavailableError(
        f"none of {', '.join(LIBRARIES[:3])} can be loaded",
        wanted="the CUDA runtime library of onnxruntime-gpu",
        do='pip install "onnxruntime-gpu[cuda,cudnn]", or --device cpu',
    )
