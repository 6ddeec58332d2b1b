"""Four-bit weights for TensorRT: as inputs of the plugin, or as constants that TensorRT fuses by itself.

`shared`: codes, scales and zeros of every BtpLinear become network inputs, the packed ones as little-endian int32 words
(every version takes those): the loader binds the stored bytes, nothing is unpacked or copied.
`baked`: codes become INT4 constants with DequantizeLinear and a Gemm, which TensorRT makes one layer of. Its codes are
signed, so the stored bytes are written once more with the upper bit of each code turned around (`write_signed`), and it
has no zero points.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir

from engines.tensorrt.records import WeightInput, WeightSource
from graphs import dtypes
from graphs.building.graph_builder import BTP_DOMAIN, WEIGHTS_FOLDER, dims, dtype_of
from graphs.ops import linear
from graphs.records.errors import InputError

SIGNED: Final = ".int4"  # how the names of files with signed codes end
FIRST_OPSET: Final = 21  # with INT4 and DequantizeLinear in blocks
FLIP: Final = 0x88  # code ^ 8 is code - 8 in two's complement
PIECE: Final = 2**24
WORD_BYTES: Final = 4


def nbytes_of(dtype: ir.DataType, shape: Sequence[int]) -> int:
    """Bytes of a stored tensor; two numbers of four bits lie in one."""
    count = math.prod(shape)
    return -(-count // 2) if dtype == ir.DataType.INT4 else count * dtypes.BY_ONNX[dtype].nbytes


def linear_nodes(model: ir.Model) -> list[ir.Node]:
    """The products with four-bit weights."""
    return [node for node in model.graph if node.domain == BTP_DOMAIN and node.op_type.startswith(linear.NAME)]


# -- shared ----------------------------------------------------------------------------------------------------------


def share_packed(model: ir.Model, *, words: bool) -> list[WeightInput]:
    """Make the stored inputs of the products inputs of the model; gives what each is made of, in their order.

    words: packed ones as int32, as the plugin takes them; else as the bytes that the portable body unpacks.
    """
    weights: dict[str, WeightInput] = {}
    for node in linear_nodes(model):
        # x is no weight, and a bias is small enough to stay. Zeros are told from a bias by their type.
        for place in range(1, len(node.inputs)):
            value = node.inputs[place]
            stored = None if value is None else _stored(value)
            if value is None or stored is None or len(dims(stored)) < 2:
                continue
            weight = _as_input(model.graph, node, place, value, stored, words=words)
            weights[weight.name] = weight
    return list(weights.values())


def _stored(value: ir.Value) -> ir.Value | None:
    """The tensor of the checkpoint that a value is, or is cast from."""
    producer = value.producer()
    stored = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else value
    is_stored = stored is not None and stored.is_initializer() and isinstance(stored.const_value, ir.ExternalTensor)
    return stored if is_stored else None


def _as_input(
    graph: ir.Graph, node: ir.Node, place: int, value: ir.Value, stored: ir.Value, *, words: bool
) -> WeightInput:
    name, packs = str(stored.name).removesuffix(".stored"), dtype_of(stored) == ir.DataType.UINT8
    known = next((other for other in graph.inputs if other.name == name), None)
    if known is None:
        dtype, shape = dtype_of(value), dims(value)
        if packs and words:
            dtype, shape = ir.DataType.INT32, _word_shape(shape)
        stored.name = f"{name}.stored"  # not used any more, and removed with the others that are not
        known = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        graph.inputs.append(known)
    node.replace_input_with(place, known)
    return WeightInput(
        name=name,
        dtype=dtypes.BY_ONNX[dtype_of(known)].name,
        shape=dims(known),
        sources=(source_of(stored, name),),
        packing="words" if packs and words else "none",
    )


def _word_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Codes [N,G,group/2] are [N,K/8] words; zeros [N,ceil(G/2)] one row of them, filled up."""
    if len(shape) == 3:
        return shape[0], shape[1] * shape[2] // WORD_BYTES
    return (-(-shape[0] * shape[1] // WORD_BYTES),)


def source_of(stored: ir.Value, name: str) -> WeightSource:
    """Where the tensor lies in the bundle."""
    matrix = stored.const_value
    assert isinstance(matrix, ir.ExternalTensor) and matrix.offset is not None
    return WeightSource(
        tensor=name,
        file=f"graphs/{WEIGHTS_FOLDER}/{Path(matrix.location).name}",
        offset=matrix.offset,
        nbytes=matrix.nbytes,
        dtype=dtypes.BY_ONNX[matrix.dtype].name,
        shape=matrix.shape.numpy(),
    )


# -- baked -----------------------------------------------------------------------------------------------------------


def bake_packed(model: ir.Model, opset: int) -> None:
    """Put DequantizeLinear of INT4 constants and a Gemm in place of the products.

    Raises InputError for weights with zero points, which TensorRT does not take, and an operator set without INT4.
    """
    graph, nodes = model.graph, linear_nodes(model)
    if nodes and opset < FIRST_OPSET:
        raise InputError(
            f"four-bit constants in opset {opset}",
            wanted=f"opset {FIRST_OPSET} or later, which this TensorRT does not read",
            do="--engine-weights shared",
        )
    for node in nodes:
        x, codes, scales, *rest = node.inputs
        assert x is not None and codes is not None and scales is not None
        zeros = next((v for v in rest if v is not None and dtype_of(v) == ir.DataType.UINT8), None)
        if zeros is not None:
            raise InputError(
                f"{zeros.name}: weights with zero points, baked into engines",
                wanted="symmetric codes: TensorRT's own four-bit weights have no zero points",
                do="--engine-weights shared",
            )
        weight = _dequantised(graph, node, _signed(graph, codes), scales)
        bias = [v for v in rest if v is not None]
        gemm = ir.Node("", "Gemm", [x, weight, *bias], [ir.AttrInt64("transB", 1)], name=node.name)
        _replace(graph, node, gemm)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    if nodes:
        model.functions.clear() if not _custom_left(model) else _drop_bodies(model)


def _custom_left(model: ir.Model) -> bool:
    return any(node.domain == BTP_DOMAIN for node in model.graph)


def _drop_bodies(model: ir.Model) -> None:
    for identifier in list(model.functions):
        if identifier[1].startswith(linear.NAME):
            del model.functions[identifier]


def _signed(graph: ir.Graph, codes: ir.Value) -> ir.Value:
    """The INT4 constant [N,K] of stored codes; another product with the same ones gets the same."""
    stored = codes.const_value
    assert isinstance(stored, ir.ExternalTensor) and stored.offset is not None
    name = f"{codes.name}{SIGNED}"
    known = graph.initializers.get(name)
    if known is not None:
        return known
    rows, groups, group_bytes = dims(codes)
    shape = ir.Shape((rows, groups * group_bytes * 2))
    tensor = ir.ExternalTensor(
        f"{stored.location}{SIGNED}", stored.offset, stored.nbytes, ir.DataType.INT4, shape=shape, name=name
    )
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.INT4), const_value=tensor)
    graph.register_initializer(value)
    return value


def _dequantised(graph: ir.Graph, node: ir.Node, codes: ir.Value, scales: ir.Value) -> ir.Value:
    """[N,K] in the type of the scales."""
    weight = ir.Value(name=f"{node.name}.weight", shape=codes.shape, type=ir.TensorType(dtype_of(scales)))
    attributes = [ir.AttrInt64("axis", 1), ir.AttrInt64("block_size", node.attributes.get_int("group", 0))]
    dequantise = ir.Node(
        "", "DequantizeLinear", [codes, scales], attributes, outputs=[weight], name=f"{node.name}.dequantise"
    )
    graph.insert_before(node, dequantise)
    return weight


def _replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    result = old.outputs[0]
    replacement = new.outputs[0]
    replacement.name, replacement.shape, replacement.type = result.name, result.shape, result.type
    ir.convenience.replace_nodes_and_values(graph, old, [old], [new], [result], [replacement])


def signed_tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    """The INT4 constants of a prepared graph."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return [t for t in tensors if isinstance(t, ir.ExternalTensor) and str(t.location).endswith(SIGNED)]


def write_signed(tensors: Sequence[ir.ExternalTensor], source: Path, target: Path) -> None:
    """Write the files of INT4 constants under `target` from the bundle's weights under `source`.

    Each is as long as the stored file and holds nothing but the codes, at their places.
    """
    places = {(str(tensor.location), tensor.offset or 0, tensor.nbytes) for tensor in tensors}
    for location in sorted({place[0] for place in places}):
        stored, written = source / location.removesuffix(SIGNED), target / location
        written.parent.mkdir(parents=True, exist_ok=True)
        with stored.open("rb") as reader, written.open("wb") as writer:
            writer.truncate(stored.stat().st_size)
            for _, offset, length in sorted(place for place in places if place[0] == location):
                reader.seek(offset)
                writer.seek(offset)
                for first in range(0, length, PIECE):
                    piece = np.frombuffer(reader.read(min(PIECE, length - first)), np.uint8)
                    writer.write((piece ^ FLIP).tobytes())
