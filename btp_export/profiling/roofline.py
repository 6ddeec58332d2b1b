"""How fast a device can be at best: operations against its peak, bytes against its bandwidth.

    floor = max(operations / peak, bytes / bandwidth)

Operations are those of matrix products, counted from a graph's shapes: 2 m k n for every product of [m,k] and [k,n],
convolutions as the products they are, attention as its two, the full square under a mask (as
graphs/pruning/operations.py counts). Bytes are those that must move at least once: weights, inputs and outputs. What a
graph needs inside is taken to stay on the chip, so the floor is a bound from below: no measured time can be under it on
a device that keeps to its data sheet.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from engines.tensorrt.records import TERMS
from graphs import ops
from graphs.files.onnx_file import refusing_graph
from graphs.files.onnx_wire import GraphFile, Node
from graphs.ops.domain import DOMAIN

Shapes = Mapping[str, tuple[int, ...]]


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
    graph = GraphFile(path)
    with refusing_graph(path):
        return sum(_flops(node, graph.shapes) for node in graph.nodes)


def _flops(node: Node, shapes: Shapes) -> int:
    if node.domain == DOMAIN and node.operator.startswith(ops.node_name("linear")):  # bodies are told apart by endings
        return _matmul(node, shapes)
    return _COUNTS[node.operator](node, shapes) if node.operator in _COUNTS else 0


def _matmul(node: Node, shapes: Shapes) -> int:
    """[..., m, k] x [..., k, n]: k operations pairs for each element of the result."""
    return 2 * prod(shapes[node.outputs[0]]) * shapes[node.inputs[0]][-1]


def _sum(node: Node, shapes: Shapes) -> int:
    """A sum that a product over caches was written as: a product and an addition for each term; 0 for other sums."""
    return 2 * prod(shapes[node.inputs[0]]) if node.inputs[0].endswith(TERMS) else 0


def _gemm(node: Node, shapes: Shapes) -> int:
    return 2 * prod(shapes[node.outputs[0]]) * shapes[node.inputs[0]][0 if node.integers.get("transA", 0) else 1]


def _conv(node: Node, shapes: Shapes) -> int:
    """weight [out, in / groups, *window]: one product of a window for each element of the result."""
    return 2 * prod(shapes[node.outputs[0]]) * prod(shapes[node.inputs[1]][1:])


def _attention(node: Node, shapes: Shapes) -> int:
    """query [B,H,S,D] or [B,S,H D], key and value with N rows and what the past holds: 2 B H S N (D + D')."""
    query, key, value = (shapes[name] for name in node.inputs[:3])
    past = shapes[node.inputs[4]][2] if len(node.inputs) > 4 and node.inputs[4] else 0
    rows = key[-2] + past
    if len(query) == 4:
        batch, heads, tokens, size = query
        return 2 * batch * heads * tokens * rows * (size + value[-1])
    batch, tokens, width = query
    groups = node.integers.get("q_num_heads", 1) // max(node.integers.get("kv_num_heads", 1), 1)
    return 2 * batch * tokens * rows * (width + value[-1] * groups)


_COUNTS: dict[str, Callable[[Node, Shapes], int]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "Attention": _attention,
    "ReduceSum": _sum,
}
