"""Opening ONNX files: the one place where a graph on disk becomes one in memory.

Whatever is wrong with it is one InputError that names the file: bytes that are no protobuf, names that are not UTF-8,
types that ONNX does not have, shapes that contradict each other. (ONNX Runtime opens files itself: engines/runners.)
"""

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

from graphs.records.reading import read_file, require_file
from graphs.records.refusing import refusing

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

REMEDY: Final = "export it again, or restore the file"
MOST_BYTES: Final = 2**31  # of a graph: what protobuf takes
# It warns of what is wrong with a graph; without a handler Python prints that on standard error.
logging.getLogger("onnx_ir").addHandler(logging.NullHandler())


def read_graph(path: Path) -> "onnx.ModelProto":
    """An ONNX file without its external data. Raises InputError if it is missing or damaged."""
    return parse_graph(graph_bytes(path), path)


def graph_bytes(path: Path) -> bytes:
    """The contents of an ONNX file. Raises InputError if it is missing."""
    return read_file(path, noun="graph as exported", do=REMEDY, most=MOST_BYTES)


def parse_graph(content: bytes, path: Path) -> "onnx.ModelProto":
    """A graph from memory, of the file `path`. Raises InputError if it is damaged."""
    import onnx

    with refusing_graph(path):
        return onnx.load_model_from_string(content)


def read_model(path: Path) -> "ir.Model":
    """The same for changing it; external data is not read before it is asked for."""
    import onnx_ir as ir

    require_file(path, noun="graph as exported", do=REMEDY, most=MOST_BYTES)
    with refusing_graph(path):
        return ir.load(path)


def refusing_graph(path: Path | str) -> contextlib.AbstractContextManager[None]:
    """For what walks over a graph from a file and takes for granted what ONNX promises: shapes, types, inputs."""
    return refusing(f"{path} is no readable ONNX graph", wanted="the graph as exported", do=REMEDY)
