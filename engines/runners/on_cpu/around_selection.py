"""What stands around a selection on a CPU: three operators of btp_ort in place of some twenty nodes.

In a small decoder's pruned prefill a node costs more by being one than by what it computes. In float32:

    three BtpGatherTokens by the same indices, and what is taken from `last`
        -> BtpGatherStream(indices, last, hidden, cos, sin) -> last, hidden, cos, sin
    GatherElements(rows [B,H,S,D], last, repeated), axis 2 -> BtpRowsAt(rows, last) -> [B,H,1,D]
    the mean over heads of Softmax(Where(column <= last, scale query key^T, -inf)), the image's columns
        -> BtpAttentionScores(query [B,H,1,D], key [B,K,S,D], last) -> [B,n]

The first two move numbers; scores are those of the nodes within rounding. A key may have further rows: none behind
`last` is read.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from engines.runners.on_cpu.rewriting import Rewriting
from graphs import names
from graphs.ops.domain import DOMAIN

GATHER: Final = "BtpGatherTokens"
STREAM, ROWS_AT, SCORES = "BtpGatherStream", "BtpRowsAt", "BtpAttentionScores"  # graphs/ops/around_selection/ort_op.cc
MOVED: Final = ("hidden", "cos", "sin")


def may_have(serialized: bytes) -> bool:
    """Whether a model's bytes may hold what `for_cpu` replaces. Reads no protobuf."""
    return GATHER.encode() in serialized or b"GatherElements" in serialized


def for_cpu(model: onnx.ModelProto) -> None:
    """Replace what has the known form, in float32; the rest stays."""
    graph = _Graph(model)
    replaced = graph.streams()
    for node in model.graph.node:
        found = graph.rows_at(node) or graph.scores(node)
        if found is not None:
            replaced[node.output[0]] = [found]
    if replaced:
        graph.put(replaced)


class _Graph(Rewriting):
    """What stands around the selections of a model."""

    def streams(self) -> dict[str, list[NodeProto]]:
        """New nodes in place of the graph's own outputs, as a stage of its own has them."""
        gathers = [self.producers.get(names.after(part)) for part in MOVED]
        shorter = self.producers.get(names.after("last"))
        known = [node for node in gathers if node is not None and node.op_type == GATHER and node.domain == DOMAIN]
        if len(known) < len(MOVED) or shorter is None or shorter.op_type != "Sub":
            return {}
        settings = [_settings(node) for node in known]
        same = all(one == settings[0] for one in settings) and len({node.input[1] for node in known}) == 1
        indices, gone = self.shapes.get(known[0].input[1], ()), self.stored.get(shorter.input[1])
        wide = all(self.types.get(node.input[0]) == TensorProto.FLOAT for node in known)
        flat = all(len(self.shapes[node.input[0]]) == 3 for node in known)
        if not (same and wide and flat) or len(indices) != 2 or gone is None:
            return {}
        if numpy_helper.to_array(gone).tolist() != [settings[0]["count"] - indices[1]]:
            return {}
        inputs = [known[0].input[1], shorter.input[0], *(node.input[0] for node in known)]
        outputs = [names.after("last"), *(names.after(part) for part in MOVED)]
        node = helper.make_node(STREAM, inputs, outputs, domain=DOMAIN, **settings[0])
        last = max(known, key=lambda each: list(self._model.graph.node).index(each))  # by then there is all it reads
        return {output: [node] if output == last.output[0] else [] for output in outputs}

    def rows_at(self, node: NodeProto) -> NodeProto | None:
        """The new node for one that takes the same row of every head."""
        if node.op_type != "GatherElements" or _settings(node) != {"axis": 2}:
            return None
        rows, repeated = self.shapes.get(node.input[0], ()), self._made(node.input[1], "Expand")
        column = self._made(repeated.input[0], "Reshape") if repeated is not None else None
        if column is None or repeated is None or len(rows) != 4 or self.types.get(node.input[0]) != TensorProto.FLOAT:
            return None
        given = self.shapes.get(column.input[0]) == rows[:1] and self._constant(column.input[1]) == [rows[0], 1, 1, 1]
        if not given or self._constant(repeated.input[1]) != [*rows[:2], 1, rows[3]]:
            return None
        return helper.make_node(ROWS_AT, [node.input[0], column.input[0]], list(node.output), domain=DOMAIN)

    def scores(self, node: NodeProto) -> NodeProto | None:
        """The new node for the last one of those that give a stage's scores by attention."""
        mean = self._made(node.input[0], "ReduceMean") if node.op_type == "Reshape" else None
        part = self._made(mean.input[0], "Slice") if mean is not None else None
        weights = self._made(part.input[0], "Softmax") if part is not None else None
        masked = self._made(weights.input[0], "Where") if weights is not None else None
        if mean is None or part is None or weights is None or masked is None:
            return None
        columns = self._columns(part)
        known = self._constant(mean.input[1]) == [1] and _settings(weights).get("axis", -1) == -1
        last, found = self._last(masked), self._products(masked.input[1])
        infinite = self.stored.get(masked.input[2])
        if not known or columns is None or last is None or found is None or infinite is None:
            return None
        query, key, scale = found
        fits = self.shapes[query][2] == 1 and self.shapes[node.output[0]] == (self.shapes[key][0], columns[1])
        if not fits or not np.isneginf(numpy_helper.to_array(infinite)).all():
            return None
        settings: dict[str, Any] = {"start": columns[0], "count": columns[1], "scale": scale}
        return helper.make_node(SCORES, [query, key, last], list(node.output), domain=DOMAIN, **settings)

    def _columns(self, part: NodeProto) -> tuple[int, int] | None:
        """Start and count of a slice of the last axis."""
        start, stop, axis, step = (self._constant(name) for name in part.input[1:5])
        return (start[0], stop[0] - start[0]) if start and stop and axis == [3] and step == [1] else None

    def _last(self, masked: NodeProto) -> str | None:
        """What the columns are compared with that are seen: [B], of which each is at most as large."""
        shown = self._made(masked.input[0], "Reshape")
        within = self._made(shown.input[0], "LessOrEqual") if shown is not None else None
        bound = self._made(within.input[1], "Reshape") if within is not None else None
        if within is None or bound is None or self.types.get(bound.input[0]) != TensorProto.INT32:
            return None
        columns = self._constant(within.input[0])
        return bound.input[0] if columns is not None and columns == list(range(len(columns))) else None

    def _products(self, name: str) -> tuple[str, str, float] | None:
        """Query [B,H,1,D], key [B,K,S,D] and scale of their products [B,H,1,S]."""
        product = self._made(self._laid_out(name), "MatMul")
        across = self._made(product.input[1], "Transpose") if product is not None else None
        scaled = self._made(self._laid_out(product.input[0]), "Mul") if product is not None else None
        scale = self.stored.get(scaled.input[1]) if scaled is not None else None
        if across is None or scaled is None or scale is None or list(_settings(across)["perm"]) != [0, 1, 3, 2]:
            return None
        query, key, factor = scaled.input[0], across.input[0], numpy_helper.to_array(scale)
        wide = all(self.types.get(each) == TensorProto.FLOAT and len(self.shapes[each]) == 4 for each in (query, key))
        return (query, key, float(factor)) if wide and factor.size == 1 else None

    def _laid_out(self, name: str) -> str:
        """The tensor whose numbers in the same order a tensor is."""
        node = self._made(name, "Reshape")
        return name if node is None else str(node.input[0])

    def _made(self, name: str, op_type: str) -> NodeProto | None:
        """The node that gives a tensor, if it is of this type."""
        node = self.producers.get(name)
        return node if node is not None and node.op_type == op_type and not node.domain else None

    def _constant(self, name: str) -> Sequence[int] | None:
        """A stored list of integers."""
        stored = self.stored.get(name)
        return None if stored is None else [int(number) for number in numpy_helper.to_array(stored).ravel()]


def _settings(node: NodeProto) -> dict[str, Any]:
    """A node's attributes without those of TensorRT's plugins."""
    return {one.name: helper.get_attribute_value(one) for one in node.attribute if not one.name.startswith("plugin_")}
