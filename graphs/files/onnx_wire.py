"""What is in an ONNX file, read without the onnx package: interface, nodes, shapes, and where weights lie.

An ONNX file is one protobuf message. Only the wire format is read here, by the field numbers of onnx.proto: enough to
check and to count, and light enough for a device. No weight is read.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, wraps
from math import prod
from pathlib import Path
from typing import Concatenate, Final, ParamSpec, TypeVar

from graphs import dtypes
from graphs.files.memory import WIDE_BYTES
from graphs.files.onnx_file import graph_bytes, refusing_graph

DEEPEST: Final = 64  # graphs within graphs
INT: Final = 2  # of AttributeProto.AttributeType
LOCATION: Final = b"location"  # the key with which a tensor names its file
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types

Message = dict[int, list[int | bytes]]  # what stands in each field, by its number


@dataclass(frozen=True)
class Value:
    """An input, output or value between nodes. `shape` has -1 for a size that is no number."""

    name: str
    element: int  # code of TensorProto.DataType
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """A stored tensor. `location` is the file that holds its bytes, None where the graph itself does."""

    name: str
    element: int
    shape: tuple[int, ...]
    location: str | None


@dataclass(frozen=True)
class Node:
    """An operation. `integers` are its attributes of that type."""

    operator: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    integers: Mapping[str, int]


Read = TypeVar("Read")
P = ParamSpec("P")


def _read_late(method: "Callable[Concatenate[GraphFile, P], Read]") -> "Callable[Concatenate[GraphFile, P], Read]":
    """What a method finds damaged is refused as what is read at the beginning."""

    @wraps(method)
    def read(self: "GraphFile", /, *args: P.args, **kwargs: P.kwargs) -> Read:
        with refusing_graph(self.path):
            return method(self, *args, **kwargs)

    return read


class GraphFile:
    """A whole file; what takes long is read when it is asked for. All of it raises InputError where it is damaged."""

    def __init__(self, path: Path) -> None:
        """Raises InputError if the file is missing or damaged."""
        self.path = path
        content = graph_bytes(path)
        with refusing_graph(path):
            self._read(content)

    def _read(self, data: bytes) -> None:
        """Raises ValueError or IndexError for what is no ONNX file."""
        self._model = _parsed(data)
        graphs = _bytes(self._model, 7)
        if len(graphs) != 1:
            raise ValueError(f"{len(graphs)} graphs")
        self._graph = _parsed(graphs[0])
        self.inputs, self.outputs = (tuple(map(_value, _bytes(self._graph, number))) for number in (11, 12))
        self.initializers = tuple(map(_tensor, _bytes(self._graph, 5)))

    @_read_late
    def outside(self) -> list[Tensor]:
        """Tensors that lie in other files, wherever they are: initializers, in attributes, inner graphs, functions."""
        functions = [node for function in _bytes(self._model, 25) for node in _bytes(_parsed(function), 7)]
        inner = (tensor for node in functions for tensor in _tensors_of_node(node, 0))
        found = (*self.initializers, *_other_tensors(self._graph, 0), *inner)
        return [one for one in found if one.location is not None]

    @cached_property
    @_read_late
    def values(self) -> tuple[Value, ...]:
        """Between nodes."""
        return tuple(map(_value, _bytes(self._graph, 13)))

    @cached_property
    @_read_late
    def nodes(self) -> tuple[Node, ...]:
        """Of the graph itself, in the order in which they run."""
        return tuple(map(_node, _bytes(self._graph, 1)))

    @cached_property
    @_read_late
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every value and initializer of the graph that has one."""
        values = {value.name: value.shape for value in (*self.inputs, *self.outputs, *self.values)}
        return values | {tensor.name: tensor.shape for tensor in self.initializers}

    @_read_late
    def wide_weights(self) -> int:
        """Bytes of all weights of the graph with its floats in float32; packed ones stay packed."""
        kinds = [(prod(tensor.shape), dtypes.BY_ONNX[tensor.element]) for tensor in self.initializers]
        return sum(count * (WIDE_BYTES if kind.is_precision else kind.nbytes) for count, kind in kinds)

    @_read_late
    def matrices(self, least: int) -> dict[str, int]:
        """Bytes of the packed weights of the graph by name, and of matrices from `least` elements on, in float32."""
        found: dict[str, int] = {}
        for tensor in self.initializers:
            kind, count = dtypes.BY_ONNX[tensor.element], prod(tensor.shape)
            if kind.name == "uint8":
                found[tensor.name] = count
            elif kind.is_precision and len(tensor.shape) == 2 and count >= least:
                found[tensor.name] = WIDE_BYTES * count
        return found

    def has(self, element: int) -> bool:
        """Whether any value of the graph is of that type."""
        return any(value.element == element for value in (*self.inputs, *self.outputs, *self.values))


# -- messages of onnx.proto --------------------------------------------------------------------------------------------


def _value(data: bytes) -> Value:
    fields = _parsed(data)
    types = [kind for found in _bytes(fields, 2)[-1:] for kind in _bytes(_parsed(found), 1)[-1:]]
    if not types:
        return Value(_text(fields, 1), 0, ())
    tensor = _parsed(types[0])
    dimensions = [size for shape in _bytes(tensor, 2)[-1:] for size in _bytes(_parsed(shape), 1)]
    return Value(_text(fields, 1), _number(tensor, 1, 0), tuple(_number(_parsed(size), 1, -1) for size in dimensions))


def _tensor(data: bytes) -> Tensor:
    fields = _parsed(data)
    entries = [_parsed(entry) for entry in _bytes(fields, 13)]
    location = next((_text(entry, 2) for entry in entries if _text(entry, 1) == LOCATION.decode()), None)
    return Tensor(_text(fields, 8), _number(fields, 2, 0), tuple(_numbers(fields, 1)), location)


def _node(data: bytes) -> Node:
    fields = _parsed(data)
    inputs, outputs = (tuple(text.decode() for text in _bytes(fields, number)) for number in (1, 2))
    attributes = [_parsed(attribute) for attribute in _bytes(fields, 5)]
    integers = {_text(one, 1): _number(one, 3, 0) for one in attributes if _number(one, 20, 0) == INT}
    return Node(_text(fields, 4), _text(fields, 7), inputs, outputs, integers)


def _tensors_of_graph(graph: Message, depth: int) -> Iterator[Tensor]:
    if depth > DEEPEST:
        raise ValueError("graphs within graphs without end")
    yield from map(_tensor, _bytes(graph, 5))
    yield from _other_tensors(graph, depth)


def _other_tensors(graph: Message, depth: int) -> Iterator[Tensor]:
    """All but the initializers."""
    for sparse in _bytes(graph, 15):
        yield from _sparse(sparse)
    for node in _bytes(graph, 1):
        yield from _tensors_of_node(node, depth)


def _tensors_of_node(node: bytes, depth: int) -> Iterator[Tensor]:
    if LOCATION not in node:  # most nodes: no tensor in it can lie elsewhere
        return
    for attribute in map(_parsed, _bytes(_parsed(node), 5)):
        yield from map(_tensor, (*_bytes(attribute, 5), *_bytes(attribute, 10)))
        for sparse in (*_bytes(attribute, 22), *_bytes(attribute, 23)):
            yield from _sparse(sparse)
        for graph in (*_bytes(attribute, 6), *_bytes(attribute, 11)):
            yield from _tensors_of_graph(_parsed(graph), depth + 1)


def _sparse(data: bytes) -> Iterator[Tensor]:
    """The values and the indices of a sparse tensor."""
    fields = _parsed(data)
    yield from map(_tensor, (*_bytes(fields, 1), *_bytes(fields, 2)))


# -- the wire format ---------------------------------------------------------------------------------------------------


def _bytes(message: Message, number: int) -> list[bytes]:
    """Messages, texts or bytes in a field."""
    return [value for value in message.get(number, ()) if isinstance(value, bytes)]


def _text(message: Message, number: int) -> str:
    """The text of a field, the last one if there are several, as protobuf reads it."""
    texts = _bytes(message, number) if number in message else ()
    return texts[-1].decode() if texts else ""


def _numbers(message: Message, number: int) -> list[int]:
    """Whole numbers of a field, packed or not, with sign."""
    numbers: list[int] = []
    for value in message.get(number, ()):
        if isinstance(value, int):
            numbers.append(value)
            continue
        place = 0
        while place < len(value):
            one, place = _varint(value, place)
            numbers.append(one)
    return [value - (1 << 64) if value >= 1 << 63 else value for value in numbers]


def _number(message: Message, number: int, default: int) -> int:
    found = _numbers(message, number) if number in message else ()
    return found[-1] if found else default


def _parsed(data: bytes) -> Message:
    """A message's fields. Raises ValueError or IndexError where it does not follow the format."""
    fields: Message = {}
    place, end = 0, len(data)
    while place < end:
        # Most numbers are of one byte. A call for each would take as long as all the rest.
        key, place = data[place], place + 1
        if key >= 0x80:
            key, place = _varint(data, place - 1)
        kind = key & 7
        value: int | bytes
        if kind == BYTES:
            size, place = data[place], place + 1
            if size >= 0x80:
                size, place = _varint(data, place - 1)
            value, place = data[place : place + size], place + size
        elif kind == VARINT:
            value, place = _varint(data, place)
        elif kind in (FIXED32, FIXED64):
            value, place = 0, place + (4 if kind == FIXED32 else 8)  # floats, which nobody asks for
        else:
            raise ValueError(f"a field of type {kind}")
        if place > end:
            raise ValueError(f"a field that goes on for {place - end} bytes behind the end")
        number = key >> 3
        if number in fields:
            fields[number].append(value)
        else:
            fields[number] = [value]
    return fields


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where the next field begins."""
    value = data[place]
    if value < 0x80:
        return value, place + 1
    value, shift = value & 0x7F, 7
    while shift < 70:
        place += 1
        byte = data[place]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, place + 1
        shift += 7
    raise ValueError("a number of more than ten bytes")
