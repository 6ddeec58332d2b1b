"""How fast a device can be at best: operations against its peak, bytes against its bandwidth.

    floor = max(operations / peak, bytes / bandwidth)

Operations are those of matrix products, counted from a graph's shapes: 2 m k n for every product of [m,k] and [k,n],
convolutions as the products they are, attention as its two, the full square under a mask (as
graphs/pruning/operations.py counts). Bytes are those that must move at least once: weights, inputs and outputs. What a
graph needs inside is taken to stay on the chip, so the floor is a bound from below: no measured time can be under it on
a device that keeps to its data sheet.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from graphs.files.onnx_file import read_model, refusing_graph
from graphs.ops import linear

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Roofline:
    """A device's limits: FLOP/s in the precision in use, bytes/s."""

    peak: float
    bandwidth: float

    def floor_ms(self, flops: int, nbytes: int) -> float:
        """The least time for so many operations and bytes, in milliseconds."""
        return max(flops / self.peak, nbytes / self.bandwidth) * 1000.0

    def bound(self, flops: int, nbytes: int) -> Literal["compute", "memory"]:
        """What the least time is limited by."""
        return "compute" if flops / self.peak >= nbytes / self.bandwidth else "memory"


def product_flops(path: Path) -> int:
    """Operations in matrix products of one run of an ONNX graph of static shapes. No weight is read."""
    graph = read_model(path).graph
    with refusing_graph(path):
        return sum(_flops(node) for node in graph)


def _flops(node: ir.Node) -> int:
    if node.domain == linear.SCHEMA.domain and node.op_type.startswith(linear.NAME):  # bodies are told apart by endings
        return _matmul(node)
    return _COUNTS[node.op_type](node) if node.op_type in _COUNTS else 0


def _matmul(node: ir.Node) -> int:
    """[..., m, k] x [..., k, n]: k operations pairs for each element of the result."""
    return 2 * prod(_output(node)) * _input(node, 0)[-1]


def _gemm(node: ir.Node) -> int:
    return 2 * prod(_output(node)) * _input(node, 0)[0 if node.attributes.get_int("transA", 0) else 1]


def _conv(node: ir.Node) -> int:
    """weight [out, in / groups, *window]: one product of a window for each element of the result."""
    return 2 * prod(_output(node)) * prod(_input(node, 1)[1:])


def _attention(node: ir.Node) -> int:
    """query [B,H,S,D] or [B,S,H D], key and value with N rows and what the past holds: 2 B H S N (D + D')."""
    query, key, value = (_input(node, place) for place in range(3))
    past = _input(node, 4)[2] if len(node.inputs) > 4 and node.inputs[4] is not None else 0
    rows = key[-2] + past
    if len(query) == 4:
        batch, heads, tokens, size = query
        return 2 * batch * heads * tokens * rows * (size + value[-1])
    batch, tokens, width = query
    groups = node.attributes.get_int("q_num_heads", 1) // max(node.attributes.get_int("kv_num_heads", 1), 1)
    return 2 * batch * tokens * rows * (width + value[-1] * groups)


_COUNTS: dict[str, Callable[[ir.Node], int]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "Attention": _attention,
}


def _input(node: ir.Node, place: int) -> Shape:
    value = node.inputs[place]
    assert value is not None
    return _dims(value)


def _output(node: ir.Node) -> Shape:
    return _dims(node.outputs[0])


def _dims(value: ir.Value) -> Shape:
    assert value.shape is not None, f"{value.name} has no shape"
    return tuple(int(size) for size in value.shape.numpy())
