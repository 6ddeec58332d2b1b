"""Weights that are network inputs (`--engine-weights shared`): each matrix once in device memory, for every engine.

All weights of a set of engines lie in one arena. The safetensors files are read range by range, never mapped or loaded
as a whole, and where the device shares its memory with the system the pages of each range are given back at once: they
would take room beside the copy. Packed inputs (q, k and v, or gate and up) are several matrices one after another along
axis 0, so each source is copied to its own rows of the input. A place is found by what is in it, not by its name:
prefill, decode, all profiles and also the unpruned engines beside the pruned ones bind the same memory.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from engines.runners.interface import Array, Buffer, Dtype
from engines.tensorrt.records import EngineGraph, WeightInput, WeightSource
from graphs import dtypes
from graphs.files.page_cache import release
from graphs.records.errors import InputError

RANGE: Final = 16 * 2**20  # bytes read at once, whole words
ALIGNMENT: Final = 256  # bytes: what TensorRT wants of every address

# What a buffer is made of: type and shape, and for each source the file (device, inode), place and stored type.
_Key = tuple[str, tuple[int, ...], tuple[tuple[int, int, int, int, str], ...]]


class Arena(Protocol):
    """Device memory for many tensors."""

    def tensor(self, dtype: Dtype, shape: Sequence[int], offset: int) -> Buffer:
        """A tensor from byte `offset` on."""


class SharedWeights:
    """The device copies. `arena` gives so many bytes of device memory, `finish` waits until writes to it are done.

    `give_back`: whether file pages are released behind what was read.
    """

    def __init__(self, arena: Callable[[int], Arena], finish: Callable[[], None], *, give_back: bool = False) -> None:
        self._arena, self._finish, self._give_back = arena, finish, give_back
        self._places: dict[_Key, tuple[Arena, int]] = {}  # reserved, and nothing written yet
        self._buffers: dict[_Key, Buffer] = {}

    def reserve(self, folder: Path, graphs: Iterable[EngineGraph]) -> None:
        """One arena for every weight input of these graphs that has no place yet.

        Raises InputError for a file that is missing, UnavailableError if there is not that much memory.
        """
        offset, offsets = 0, dict[_Key, int]()
        for key, size in self._wanted(folder, graphs).items():
            if key not in self._places:
                offsets[key] = offset
                offset += -(-size // ALIGNMENT) * ALIGNMENT
        if offsets:
            arena = self._arena(offset)
            self._places |= {key: (arena, place) for key, place in offsets.items()}

    def bind(self, folder: Path, graph: EngineGraph) -> dict[str, Buffer]:
        """The buffer of every weight input of a graph whose record lies in `folder`; uploads those that are new.

        Raises InputError for a file that is missing, too short or not what the record says.
        """
        self.reserve(folder, [graph])
        bound = {weight.name: self._buffer(folder, weight) for weight in graph.weight_inputs}
        if self._give_back:
            for path in {folder / source.file for weight in graph.weight_inputs for source in weight.sources}:
                with path.open("rb") as file:
                    release(file.fileno())
        return bound

    def missing_bytes(self, folder: Path, graphs: Iterable[EngineGraph]) -> int:
        """Bytes that these graphs need beside what is reserved."""
        return sum(size for key, size in self._wanted(folder, graphs).items() if key not in self._places)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(prod(buffer.shape) * buffer.dtype.itemsize for buffer in self._buffers.values())

    def _wanted(self, folder: Path, graphs: Iterable[EngineGraph]) -> dict[_Key, int]:
        """The weight inputs that are not on the device, with their bytes."""
        wanted = {_key(folder, weight): _nbytes(weight) for graph in graphs for weight in graph.weight_inputs}
        return {key: size for key, size in wanted.items() if key not in self._buffers}

    def _buffer(self, folder: Path, weight: WeightInput) -> Buffer:
        key = _key(folder, weight)
        if key not in self._buffers:
            _check_shapes(weight)
            arena, offset = self._places[key]
            buffer = arena.tensor(dtypes.numpy_of(weight.dtype), weight.shape, offset)
            for start, part in _parts(folder, weight, give_back=self._give_back):
                buffer.view(part.shape, offset=start).write(part)
                self._finish()  # the host copy of one range is gone before the next is read
            self._buffers[key] = buffer
            del self._places[key]
        return self._buffers[key]


def packed(folder: Path, weight: WeightInput) -> Array:
    """The whole input in host memory, as it is uploaded."""
    _check_shapes(weight)
    whole = np.empty(weight.shape, dtypes.numpy_of(weight.dtype))
    flat = whole.reshape(-1)
    for start, part in _parts(folder, weight):
        flat[start : start + part.size] = part
    return whole


def _parts(folder: Path, weight: WeightInput, *, give_back: bool = False) -> Iterator[tuple[int, Array]]:
    """(first element, elements) of ranges of the sources, in the order in which they are packed."""
    first, dtype = 0, dtypes.numpy_of(weight.dtype)
    for source in weight.sources:
        stored = dtypes.numpy_of(source.dtype)
        step = RANGE // stored.itemsize
        with _checked(folder, source).open("rb", buffering=0) as file:
            for start in range(0, prod(source.shape), step):
                count = min(step, prod(source.shape) - start)
                place = source.offset + start * stored.itemsize
                file.seek(place)
                part = np.fromfile(file, stored, count)
                if weight.packing == "words":
                    yield start * stored.itemsize // dtype.itemsize, _words(part, dtype)
                else:
                    yield first + start, part.astype(dtype, copy=False)
                if give_back:  # from the source's start: a large page that the range before ended in goes now
                    release(file.fileno(), source.offset, place + count * stored.itemsize - source.offset)
        first += prod(source.shape)


def _words(stored: Array, dtype: Dtype) -> Array:
    """The same bytes as numbers of another type, filled up with zeros to a whole one."""
    flat = stored.reshape(-1).view(np.uint8)
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


def _checked(folder: Path, source: WeightSource) -> Path:
    """The file that holds the stored matrix. Raises InputError if it cannot."""
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
    return path


def _key(folder: Path, weight: WeightInput) -> _Key:
    return weight.dtype, weight.shape, tuple(_place(folder, source) for source in weight.sources)


def _place(folder: Path, source: WeightSource) -> tuple[int, int, int, int, str]:
    path = folder / source.file
    if not path.is_file():
        _checked(folder, source)  # raises
    status = os.stat(path)
    return status.st_dev, status.st_ino, source.offset, source.nbytes, source.dtype


def _nbytes(weight: WeightInput) -> int:
    return prod(weight.shape) * dtypes.numpy_of(weight.dtype).itemsize
