"""kernel.h of BtpGatherTokens for Python: structure and device pointers of one call (engines.native.kernels)."""

import ctypes
from collections.abc import Mapping, Sequence
from math import prod
from typing import Final

from graphs import dtypes
from graphs.ops.common.trt_python import Tensor

INPUTS: Final = 2
WORKSPACE: Final = False


class Settings(ctypes.Structure):
    """BtpGather."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("batch", "rows", "start", "count", "kept")),
        ("row_bytes", ctypes.c_int64),
    ]


def settings(inputs: Sequence[Tensor], attributes: Mapping[str, int | str]) -> Settings:
    """The call on tokens [B,S,...] and indices [B,k]."""
    tokens, indices = inputs
    row_bytes = prod(tokens.shape[2:]) * dtypes.BY_NAME[tokens.dtype].nbytes
    start, count = attributes["start"], attributes["count"]
    return Settings(*tokens.shape[:2], start, count, indices.shape[1], row_bytes)


def pointers(inputs: Sequence[Tensor]) -> list[int | None]:
    """The two addresses."""
    return [tensor.address for tensor in inputs]
