"""Buffers in host memory: numpy arrays at fixed, aligned addresses."""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import numpy as np

from engines.runners.interface import Array, Buffer, Dtype
from graphs.files.atomic import size_text
from graphs.files.memory import total_memory
from graphs.records.errors import InputError

ALIGNMENT = 64  # bytes: a cache line, and the widest vector load


class HostBuffer:
    """A numpy array that is never reallocated. `array` may be read and written in place."""

    def __init__(self, array: Array) -> None:
        self.array = array

    @staticmethod
    def allocate(dtype: Dtype, shape: Sequence[int]) -> "HostBuffer":
        """Zeroed memory for one tensor. Raises InputError for more than the whole machine has, or less than none."""
        size = prod(shape) * dtype.itemsize
        if not 0 <= size <= total_memory():
            raise InputError(
                f"a tensor {list(shape)} of {size_text(size)}",
                wanted="a graph as exported",
                do="export the bundle again",
            )
        raw = np.zeros(size + ALIGNMENT, np.uint8)
        skip = -raw.ctypes.data % ALIGNMENT
        return HostBuffer(raw[skip : skip + size].view(dtype).reshape(shape))

    @property
    def dtype(self) -> Dtype:
        return self.array.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def pointer(self) -> int:
        return self.array.ctypes.data

    def write(self, values: Array) -> None:
        if values.shape != self.shape:
            raise ValueError(f"cannot write {values.shape} into a buffer of shape {self.shape}")
        self.array[...] = values

    def read(self) -> Array:
        copy: Array = self.array.copy()
        return copy

    def view(self, shape: Sequence[int], *, offset: int = 0) -> "HostBuffer":
        if offset < 0 or offset + prod(shape) > self.array.size:
            raise ValueError(f"{tuple(shape)} at element {offset} needs more memory than {self.shape}")
        return HostBuffer(self.array.reshape(-1)[offset : offset + prod(shape)].reshape(shape))

    def write_rows(self, rows: Array | Buffer, starts: Sequence[int]) -> None:
        source = rows if isinstance(rows, np.ndarray) else _array_of(rows)
        check_rows(self.shape, source.shape, starts)
        count = source.shape[-2]
        if len(set(starts)) == 1:  # the common case in one assignment
            self.array[..., starts[0] : starts[0] + count, :] = source
            return
        for sample, start in enumerate(starts):
            self.array[sample, ..., start : start + count, :] = source[sample]

    def row_writer(self, rows: Buffer) -> Callable[[Sequence[int]], None]:
        return partial(self.write_rows, rows)


def check_rows(shape: Sequence[int], rows: Sequence[int], starts: Sequence[int]) -> None:
    """Raise ValueError unless rows [B, ..., n, W] fit into a buffer [B, ..., N, W] at `starts`."""
    fits = len(shape) == len(rows) and shape[:-2] == rows[:-2] and shape[-1] == rows[-1] and len(starts) == shape[0]
    if not fits or min(starts) < 0 or max(starts) + rows[-2] > shape[-2]:
        raise ValueError(f"rows of shape {tuple(rows)} do not fit into {tuple(shape)} at rows {list(starts)}")


def _array_of(buffer: Buffer) -> Array:
    if not isinstance(buffer, HostBuffer):
        raise TypeError(f"{type(buffer).__name__} is not in host memory")
    return buffer.array
