"""Write a safetensors file whose byte offsets are known before it is written, so that a graph can point into it.

The layout is the safetensors library's own, byte for byte (wider types first, then by name, header padded to 8
bytes; https://github.com/huggingface/safetensors): a file that library saves from the same arrays has the same offsets.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from graphs import dtypes

# The library sorts by its own list of types, backwards.
ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I8", "U8", "BOOL")


def header_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Everything in front of the data: 8 bytes of length and the padded JSON header."""
    entries: dict[str, object] = {}
    position = 0
    for name in tensor_order(tensors):
        array = tensors[name]
        entries[name] = {
            "dtype": dtypes.BY_NUMPY[array.dtype].safetensors,
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def tensor_offsets(tensors: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Where each tensor's bytes start, counted from the start of the file."""
    position = len(header_bytes(tensors))
    offsets: dict[str, int] = {}
    for name in tensor_order(tensors):
        offsets[name] = position
        position += tensors[name].nbytes
    return offsets


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write the file, one tensor after another. The same arrays give the same bytes."""
    with path.open("wb") as stream:
        write_stream(stream, tensors)


def write_stream(stream: BinaryIO, tensors: Mapping[str, np.ndarray]) -> None:
    """The same into an open file."""
    stream.write(header_bytes(tensors))
    for name in tensor_order(tensors):
        np.ascontiguousarray(tensors[name]).tofile(stream)


def tensor_order(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """The names in the order of their data in the file."""
    return sorted(tensors, key=lambda name: (ORDER.index(dtypes.BY_NUMPY[tensors[name].dtype].safetensors), name))
