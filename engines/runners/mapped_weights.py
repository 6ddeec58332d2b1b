"""Weights that sessions read where a file is mapped, each file mapped once in a process.

ONNX Runtime maps a graph's weights anew for each session. The pages are the file's and in memory once, but in a process
whose prefill and decode read the same weights each counts twice: in what is resident, which limits and tools look at,
and in page tables and first touches. So what operators read as it is stored is handed over, from one mapping for all
sessions. What ONNX Runtime casts or packs when a session opens, and reads never again, it maps itself for as long.
"""

import mmap
import os
import threading
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, Final
from weakref import WeakValueDictionary

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto

from engines.runners.on_cpu import AS_STORED
from engines.runners.session_options import FOLDER_OPTION
from graphs import dtypes

_maps: "Final[WeakValueDictionary[tuple[int, ...], mmap.mmap]]" = WeakValueDictionary()
_lock: Final = threading.Lock()


def share_weights(model: onnx.ModelProto, folder: Path, options: ort.SessionOptions) -> list[Any]:
    """Let a session read weights of a graph, which lie in `folder`, where the process has them mapped.

    The session needs what is given back for as long as it lives. What is not all there, is of an unknown type or lies
    elsewhere is left to ONNX Runtime, which says what is wrong with it.
    """
    options.add_session_config_entry(FOLDER_OPTION, str(folder))
    read = {name for node in model.graph.node if node.op_type in AS_STORED for name in node.input}
    found = mapped_tensors(model, folder, wanted=read.__contains__)
    for name, value in found.items():
        options.add_initializer(name, value)
    return list(found.values())


def mapped_tensors(
    model: onnx.ModelProto, folder: Path, *, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, ort.OrtValue]:
    """The stored tensors of a graph by name, those whose names are wanted."""
    stored = [tensor for tensor in model.graph.initializer if tensor.external_data and wanted(tensor.name)]
    places = {tensor.name: external_entry(tensor).get("location", "") for tensor in stored}
    files = {place: _mapped(folder / place, folder) for place in set(places.values())}
    values = {tensor.name: _value(tensor, files[places[tensor.name]]) for tensor in stored}
    return {name: value for name, value in values.items() if value is not None}


def external_entry(tensor: TensorProto) -> dict[str, str]:
    """Where a stored tensor lies: location, offset, length, all as text."""
    return {entry.key: entry.value for entry in tensor.external_data}


def nbytes(tensor: TensorProto) -> int:
    """The bytes of a tensor of a known type."""
    return int(prod(tensor.dims)) * dtypes.BY_ONNX[tensor.data_type].nbytes


def _value(tensor: TensorProto, data: mmap.mmap | None) -> ort.OrtValue | None:
    """A stored tensor over the bytes of its file."""
    entry, element = external_entry(tensor), dtypes.BY_ONNX.get(tensor.data_type)
    offset = entry.get("offset", "0")
    if data is None or element is None or not offset.isdecimal():
        return None
    first, size = int(offset), nbytes(tensor)
    if size == 0 or first + size > len(data) or entry.get("length", str(size)) != str(size):
        return None
    kind = np.dtype(np.uint16) if element.numpy == dtypes.BFLOAT16 else element.numpy
    array = np.frombuffer(data, kind, prod(tensor.dims), first).reshape(tuple(tensor.dims))
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, element.onnx)


def _mapped(path: Path, folder: Path) -> mmap.mmap | None:
    """A file's bytes. Whoever asks while they are in use gets the same; a file that has changed is another one.

    None for what is no file with bytes in the folder: no `..` and no link leads out of it, as ONNX Runtime has it too.
    """
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        return None
    with path.open("rb") as file, _lock:
        status = os.fstat(file.fileno())
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        found = _maps.get(key)
        if found is None and status.st_size > 0:
            found = _maps[key] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return found
