"""Attention in forms that TensorRT makes few kernels of.

A decode step has one row of queries, so its products with the caches do little arithmetic and are as fast as the
caches are read. Where they are MatMul, TensorRT for RTX 1.7.1 copies the caches of every layer in every step into the
layout that its product kernels want: three times the memory traffic, and more kernels. Written as what they are, sums
of products, they become reductions that read each cache once, where it lies (docs/decisions/decode-attention.md has
the counts of the forms that were tried). The sums are in float32.

ONNX Runtime keeps the bundle's own form: there the product of a transposed cache is the fast one.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from engines.tensorrt.records import SUMMED, TERMS
from graphs import names
from graphs.building.graph_builder import dims, dtype_of

FLOAT = ir.DataType.FLOAT
SWAP_LAST = (0, 1, 3, 2)


def drop_softmax_precision(model: ir.Model) -> None:
    """Leave the type in which Attention's softmax is computed to TensorRT."""
    for node in model.graph:
        if node.op_type == "Attention":
            node.attributes.pop("softmax_precision", None)


def sum_over_caches(model: ir.Model) -> None:
    """Write the products of a decode graph's attention as sums: those with a cache, and the query with the new key.

    Other graphs have no caches and stay as they are.
    """
    graph = model.graph
    products = [node for node in graph if node.op_type == "MatMul" and not node.domain]
    over_keys = [node for node in products if _is_cache(_transposed(node.inputs[1]), "past_key")]
    queries = {node.inputs[0] for node in over_keys}
    for node in products:
        rows = _transposed(node.inputs[1])
        if rows is not None and node.inputs[0] in queries:
            _sum(graph, node, rows, axis=4)  # [B,K,g,1,D] x [B,K,1,n,D] -> [B,K,g,n]
        elif _is_cache(node.inputs[1], "past_value"):
            _sum(graph, node, node.inputs[1], axis=3)  # [B,K,g,n,1] x [B,K,1,n,D] -> [B,K,g,D]
    for node in list(graph):
        if node.op_type == "Transpose" and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            graph.remove(node, safe=True)


def is_sum(node: ir.Node) -> bool:
    """Whether the node adds up what a product was written as."""
    return node.op_type == "ReduceSum" and str(node.name).endswith(SUMMED)


def is_term(node: ir.Node) -> bool:
    """Whether the node makes what such a sum adds up: a part of the sum's own kernel."""
    return node.op_type in ("Mul", "Cast", "Reshape") and f"{SUMMED}." in str(node.name)


def _is_cache(value: ir.Value | None, role: str) -> bool:
    return value is not None and value.is_graph_input() and names.parse_tensor(str(value.name)).role == role


def _transposed(value: ir.Value | None) -> ir.Value | None:
    """What a value is the transpose of, by its last two axes."""
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "Transpose":
        return None
    swaps = tuple(producer.attributes["perm"].as_ints()) == SWAP_LAST
    return producer.inputs[0] if swaps else None


def _sum(graph: ir.Graph, node: ir.Node, rows: ir.Value | None, *, axis: int) -> None:
    """Replace the product of [B,K,g,...] and rows [B,K,n,D] by a sum along `axis` of the five that both then have."""
    left, result = node.inputs[0], node.outputs[0]
    assert left is not None and rows is not None
    batch, heads, count, size = dims(rows)
    group = dims(left)[2]
    across = (batch, heads, group, 1, size) if axis == 4 else (batch, heads, group, count, 1)
    added: list[ir.Node] = []

    def add(op_type: str, inputs: Sequence[ir.Value], label: str, shape: Sequence[int], dtype: ir.DataType) -> ir.Value:
        attributes = {"Cast": {"to": dtype.value}, "ReduceSum": {"keepdims": 0}}.get(op_type, {})
        name = f"{node.name}{SUMMED}{label}"
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        given = [ir.AttrInt64(key, number) for key, number in attributes.items()]
        added.append(ir.Node("", op_type, inputs, given, outputs=[value], name=name))
        return value

    def widened(value: ir.Value, label: str, shape: Sequence[int]) -> ir.Value:
        dtype = dtype_of(value)
        laid_out = add("Reshape", [value, _integers(graph, shape)], f".{label}", shape, dtype)
        return laid_out if dtype == FLOAT else add("Cast", [laid_out], f".{label}.float32", shape, FLOAT)

    factors = [widened(left, "left", across), widened(rows, "rows", (batch, heads, 1, count, size))]
    terms = add("Mul", factors, TERMS.removeprefix(SUMMED), (batch, heads, group, count, size), FLOAT)
    total = add("ReduceSum", [terms, _integers(graph, [axis])], "", dims(result), FLOAT)
    if dtype_of(result) != FLOAT:
        total = add("Cast", [total], ".narrow", dims(result), dtype_of(result))
    ir.convenience.replace_nodes_and_values(graph, node, [node], added, [result], [total])


def _integers(graph: ir.Graph, numbers: Sequence[int]) -> ir.Value:
    """An int64 constant of the graph, made once under the builder's own name for it."""
    name = f"constant.integers.{'_'.join(map(str, numbers))}"
    known = graph.initializers.get(name)
    if known is None:
        tensor = ir.tensor(np.array(numbers, np.int64), name=name)
        known = ir.Value(
            name=name, shape=ir.Shape([len(numbers)]), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.register_initializer(known)
    return known
