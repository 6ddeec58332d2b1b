"""A graph in parts that need little memory each: cut between decoder layers, run one after another.

A runtime on the CPU computes half precision in float32, so a session holds twice the bytes of its weights: 26 GB for a
7B decode graph. The parts together are exactly the nodes of the file. Cuts are behind the values `layer_<l>.output`
(and `embedded`, before layer 0 of a whole prefill), where only the hidden rows and the graph's own inputs pass.

bfloat16, for which there are hardly any CPU kernels, can be widened: weights stay as they are and are cast to float32,
everything computed is float32. That is more exact than bfloat16 and shows the same faults.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from graphs import dtypes, names
from graphs.files.memory import WIDE_BYTES
from graphs.records.errors import InputError


@dataclass(frozen=True)
class Part:
    """Some nodes of a graph as a model of their own; `weights` are the bytes of its weights in float32."""

    model: onnx.ModelProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: int


def wide_weights(model: onnx.ModelProto) -> int:
    """Bytes of all weights of a graph with its floats in float32; packed ones stay packed."""
    return sum(_wide(tensor) for tensor in model.graph.initializer)


def _wide(tensor: TensorProto) -> int:
    kind = dtypes.BY_ONNX.get(tensor.data_type)
    if kind is None or min(tensor.dims, default=0) < 0:
        raise InputError(
            f"the weight {tensor.name} is of type {tensor.data_type} and shape {list(tensor.dims)}",
            wanted="graphs as exported",
            do="export the bundle again",
        )
    return int(prod(tensor.dims)) * (WIDE_BYTES if kind.is_precision else kind.nbytes)


def split(model: onnx.ModelProto, most: int) -> list[Part]:
    """The parts, each with at most `most` bytes of weights in float32 or, where a single layer has more, one layer."""
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    sections = _packed(list(_sections(graph.node)), weights, most)
    made_in = {name: number for number, nodes in enumerate(sections) for node in nodes for name in node.output if name}
    used = [set(_used(nodes)) for nodes in sections]
    wanted_last = {value.name for value in graph.output}
    types = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}
    parts = []
    for number, nodes in enumerate(sections):
        own = {name for name, place in made_in.items() if place == number}
        later = set().union(*used[number + 1 :])
        outputs = [name for name in made_in if name in own and (name in later or name in wanted_last)]
        inputs = [name for name in types if name in used[number] and name not in own and name not in weights]
        held = [tensor for name, tensor in weights.items() if name in used[number]]
        part = helper.make_model(
            helper.make_graph(
                nodes,
                f"{graph.name}_{number}",
                [types[name] for name in inputs],
                [types[name] for name in outputs],
                initializer=held,
                # A value that is an output now may not be declared a second time.
                value_info=[value for value in graph.value_info if value.name in own and value.name not in outputs],
            ),
            functions=model.functions,
            opset_imports=model.opset_import,
            ir_version=model.ir_version,
        )
        size = sum(map(_wide, held))
        parts.append(Part(part, tuple(inputs), tuple(outputs), size))
    return parts


def _sections(nodes: Sequence[onnx.NodeProto]) -> Iterator[list[onnx.NodeProto]]:
    """Runs of nodes (they are in topological order), each but the last ending at a cut."""
    section: list[onnx.NodeProto] = []
    for node in nodes:
        section.append(node)
        if any(names.is_cut(name) for name in node.output):
            yield section
            section = []
    if section:
        yield section


def _packed(
    sections: list[list[onnx.NodeProto]], weights: dict[str, TensorProto], most: int
) -> list[list[onnx.NodeProto]]:
    """Neighbouring sections together as long as their weights fit; sections without weights join the one before."""
    packed: list[list[onnx.NodeProto]] = []
    filled = 0
    for nodes in sections:
        size = sum(_wide(weights[name]) for name in set(_used(nodes)) & weights.keys())
        if packed and filled + size <= most:
            packed[-1] = packed[-1] + nodes
            filled += size
        else:
            packed.append(nodes)
            filled = size
    return packed


def _used(nodes: Sequence[onnx.NodeProto]) -> Iterator[str]:
    """Every value that the nodes read, those inside their subgraphs included."""
    for node in nodes:
        yield from (name for name in node.input if name)
        for attribute in node.attribute:
            graphs = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs
            for graph in graphs:
                yield from _used(graph.node)


def has_bfloat16(model: onnx.ModelProto) -> bool:
    """Whether anything in the graph is bfloat16."""
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    return any(value.type.tensor_type.elem_type == TensorProto.BFLOAT16 for value in values)


def widen(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in float32 where it was bfloat16; weights stay stored as they are and are cast."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for nodes in (graph.node, *(function.node for function in wide.functions)):
        for node in nodes:
            for attribute in node.attribute:
                if attribute.name in ("to", "dtype") and attribute.i == TensorProto.BFLOAT16:
                    attribute.i = TensorProto.FLOAT
                if attribute.HasField("t") and attribute.t.data_type == TensorProto.BFLOAT16:
                    attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float32)))
    narrow = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.BFLOAT16}
    nodes = []
    cast: set[str] = set()
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in narrow:
                if name not in cast:  # right before its first use, so that it stays in that layer's part
                    nodes.append(helper.make_node("Cast", [name], [f"{name}.wide"], to=TensorProto.FLOAT))
                    cast.add(name)
                node.input[place] = f"{name}.wide"
        nodes.append(node)
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer if tensor.name in cast}
    graph.value_info.extend(
        helper.make_tensor_value_info(f"{name}.wide", TensorProto.FLOAT, shape) for name, shape in shapes.items()
    )
    del graph.node[:]
    graph.node.extend(nodes)
    return wide
