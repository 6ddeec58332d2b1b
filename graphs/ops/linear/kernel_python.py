"""kernel.h of BtpLinear for Python: structure and device pointers of one call (engines.native.kernels)."""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Final

from graphs.ops.common.trt_python import Tensor

INPUTS: Final = 5
WORKSPACE: Final = True
TYPES: Final = {"float32": 1, "float16": 2, "bfloat16": 3}  # BTP_LINEAR_*
PACKED: Final = ("uint8", "int32")  # the same bytes, see graphs/packing.py


class Settings(ctypes.Structure):
    """BtpLinear."""

    _fields_ = [
        (name, ctypes.c_int32) for name in ("rows", "outputs", "inputs", "bits", "group", "type", "zeros", "bias")
    ]


def settings(inputs: Sequence[Tensor], attributes: Mapping[str, int | str]) -> Settings:
    """The call on x [M,K], qweight, scales and whichever of zeros and bias is there."""
    x, qweight = inputs[:2]
    zeros, bias = _optional(inputs)
    given = (int(zeros is not None), int(bias is not None))
    return Settings(*_sizes(x, qweight), attributes["bits"], attributes["group"], TYPES[x.dtype], *given)


def pointers(inputs: Sequence[Tensor]) -> list[int | None]:
    """INPUTS addresses; null for what is missing."""
    return [None if tensor is None else tensor.address for tensor in (*inputs[:3], *_optional(inputs))]


def _sizes(x: Tensor, qweight: Tensor) -> tuple[int, int, int]:
    (rows, columns), outputs = x.shape, qweight.shape[0]
    return rows, outputs, columns


def _optional(inputs: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """zeros and bias, which are told apart by their types: zeros are packed."""
    zeros = next((tensor for tensor in inputs[3:] if tensor.dtype in PACKED), None)
    bias = next((tensor for tensor in inputs[3:] if tensor.dtype not in PACKED), None)
    return zeros, bias
