"""Weights that are network inputs (`--engine-weights shared`): each matrix once in device memory, for every engine.

The safetensors files are mapped, never loaded as a whole. Packed inputs (q, k and v, or gate and up) are several
matrices one after another along axis 0, so each source is copied to its own rows of the device buffer. A buffer is
found by what it is made of, not by its name: prefill, decode, all profiles and also the unpruned engines beside the
pruned ones bind the same memory.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from engines.runners.interface import Array, Buffer, Dtype
from engines.tensorrt.records import EngineGraph, WeightInput, WeightSource
from graphs import dtypes
from graphs.records.errors import InputError

# What a buffer is made of: type and shape, and for each source the file (device, inode), place and stored type.
_Key = tuple[str, tuple[int, ...], tuple[tuple[int, int, int, int, str], ...]]


class SharedWeights:
    """The device copies. `allocate` gives device memory, `finish` waits until writes to it are done."""

    def __init__(self, allocate: Callable[[Dtype, Sequence[int]], Buffer], finish: Callable[[], None]) -> None:
        self._allocate, self._finish = allocate, finish
        self._buffers: dict[_Key, Buffer] = {}

    def bind(self, folder: Path, graph: EngineGraph) -> dict[str, Buffer]:
        """The buffer of every weight input of a graph whose record lies in `folder`; uploads those that are new.

        Raises InputError for a file that is missing, too short or not what the record says.
        """
        return {weight.name: self._buffer(folder, weight) for weight in graph.weight_inputs}

    def missing_bytes(self, folder: Path, graphs: Iterable[EngineGraph]) -> int:
        """Bytes that binding these graphs would upload."""
        wanted = {_key(folder, weight): _nbytes(weight) for graph in graphs for weight in graph.weight_inputs}
        return sum(size for key, size in wanted.items() if key not in self._buffers)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(prod(buffer.shape) * buffer.dtype.itemsize for buffer in self._buffers.values())

    def _buffer(self, folder: Path, weight: WeightInput) -> Buffer:
        key = _key(folder, weight)
        if key not in self._buffers:
            buffer = self._allocate(dtypes.numpy_of(weight.dtype), weight.shape)
            for start, rows in _parts(folder, weight):
                buffer.view(rows.shape, offset=start).write(rows)
                self._finish()  # the host copy of one matrix is gone before the next is made
            self._buffers[key] = buffer
        return self._buffers[key]


def packed(folder: Path, weight: WeightInput) -> Array:
    """The whole input in host memory, as it is uploaded."""
    whole = np.empty(weight.shape, dtypes.numpy_of(weight.dtype))
    flat = whole.reshape(-1)
    for start, rows in _parts(folder, weight):
        flat[start : start + rows.size] = rows.reshape(-1)
    return whole


def _parts(folder: Path, weight: WeightInput) -> Iterable[tuple[int, Array]]:
    """(first element, rows) of each source, in the order in which they are packed."""
    _check_shapes(weight)
    start, dtype = 0, dtypes.numpy_of(weight.dtype)
    for source in weight.sources:
        rows = _mapped(folder, source)
        if weight.packing == "words":
            yield start, _words(rows, dtype)
            return
        yield start, np.asarray(rows.astype(dtype, copy=False))
        start += rows.size


def _words(stored: np.ndarray[Any, Any], dtype: Dtype) -> Array:
    """The same bytes as numbers of another type, filled up with zeros to a whole one."""
    flat = np.asarray(stored).reshape(-1).view(np.uint8)
    missing = -flat.size % dtype.itemsize
    whole: Array = np.pad(flat, (0, missing)) if missing else flat
    words: Array = whole.view(dtype.newbyteorder("<")).astype(dtype, copy=False)
    return words


def _check_shapes(weight: WeightInput) -> None:
    """Sources lie one after another along axis 0 and make up the input, or one source is the input."""
    shapes = [source.shape for source in weight.sources]
    if weight.packing == "words" and -(-weight.sources[0].nbytes // 4) * 4 == _nbytes(weight):
        return
    joined = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if all(shapes) else ()
    alike = len({shape[1:] for shape in shapes}) == 1
    if (joined if len(shapes) > 1 else shapes[0]) != weight.shape or not alike:
        raise InputError(
            f"weight {weight.name} {list(weight.shape)} is made of {', '.join(str(list(shape)) for shape in shapes)}",
            wanted="matrices that make up the input row by row",
            do="btp-export build BUNDLE --target TARGET --force",
        )


def _mapped(folder: Path, source: WeightSource) -> np.ndarray[Any, Any]:
    """The stored matrix, memory-mapped read-only."""
    path, dtype = folder / source.file, dtypes.numpy_of(source.dtype)
    size = path.stat().st_size if path.is_file() else -1
    whole = prod(source.shape) * dtype.itemsize == source.nbytes
    if not whole or size < source.offset + source.nbytes:
        got = f"has {size} bytes" if size >= 0 else "is missing"
        raise InputError(
            f"{path} {got if whole else f'cannot hold {source.tensor} {list(source.shape)} {source.dtype}'}",
            wanted=f"{source.tensor}: {source.nbytes} bytes at {source.offset}",
            do="restore the bundle's weights, or export and build again",
        )
    return np.memmap(path, dtype, "r", offset=source.offset, shape=source.shape)


def _key(folder: Path, weight: WeightInput) -> _Key:
    return weight.dtype, weight.shape, tuple(_place(folder, source) for source in weight.sources)


def _place(folder: Path, source: WeightSource) -> tuple[int, int, int, int, str]:
    path = folder / source.file
    if not path.is_file():
        _mapped(folder, source)  # raises
    status = os.stat(path)
    return status.st_dev, status.st_ino, source.offset, source.nbytes, source.dtype


def _nbytes(weight: WeightInput) -> int:
    return prod(weight.shape) * dtypes.numpy_of(weight.dtype).itemsize
