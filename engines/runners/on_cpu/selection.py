"""Coverage selections on a CPU: an operator of btp_ort that takes the tokens' rows, in place of their similarity.

The similarity is symmetric and the operator reads it as integers, so half of the product is enough, and no matrix of
float32 is written. Files keep the similarity, which every form of the operator takes: the node is replaced while a
session is prepared, in memory, and only where the library that has it is registered.

    rows [B,S,C] -> Slice -> (less their mean) -> unit rows -> similarity [B,V,V]; scores -> BtpSelectTokens -> indices
    BtpSelectTokensByRows(rows, scores or "", seeds) -> indices, norms [B,V]

Rows of float16 are cast behind the Slice, and so they are for the new node.
Where the scores are the norms of the same features, they come from the operator too.
"""

from dataclasses import dataclass
from typing import Any, Final

import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from engines.runners.on_cpu.rewriting import TAKEN, Rewriting
from graphs.ops.domain import DOMAIN, PLUGIN

SELECTION: Final = "BtpSelectTokens"
BY_ROWS: Final = "BtpSelectTokensByRows"  # graphs/ops/select_tokens/ort_op.cc
COVERAGE: Final = b"coverage"
TOKENS: Final = 1  # axis of [B,V,C]


def may_have(serialized: bytes) -> bool:
    """Whether a model's bytes may hold what `for_cpu` replaces. Reads no protobuf."""
    return SELECTION.encode() in serialized and COVERAGE in serialized


def for_cpu(model: onnx.ModelProto) -> None:
    """Replace selections by coverage of rows in float32, or cast to it; others stay."""
    graph = _Graph(model)
    replaced: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        rows = graph.rows_of(node)
        if rows is not None:
            replaced |= graph.replacement(node, rows)
    if replaced:
        graph.put(replaced)


@dataclass(frozen=True)
class _Rows:
    """Rows [start, start + count) of a tensor [B,S,C] are tokens; their features are these rows, less their mean.

    cast: to float32, in which the features are.
    """

    source: str
    start: int
    count: int
    centred: bool
    cast: bool


class _Graph(Rewriting):
    """The selections of a model."""

    def rows_of(self, node: NodeProto) -> _Rows | None:
        """What a selection's similarity is made of, if it is one by coverage and all of that has the known form."""
        settings = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type != SELECTION or node.domain != DOMAIN or settings.get("diversity_rule") != COVERAGE:
            return None
        product = self._made(node.input[1] if len(node.input) > 1 else "", "MatMul")
        across = self._made(product.input[1], "Transpose") if product else None
        if product is None or across is None or across.input[0] != product.input[0]:
            return None
        if list(across.attribute[0].ints) != [0, 2, 1]:
            return None
        unit = self._made(product.input[0], "Div")
        safe = self._made(unit.input[1], "Max") if unit else None
        if unit is None or safe is None or self._normed(safe.input[0]) != unit.input[0]:
            return None
        return self._features(unit.input[0])

    def replacement(self, node: NodeProto, rows: _Rows) -> dict[str, list[NodeProto]]:
        """The new node by what it replaces: the selection, and what gives its scores if those are the rows' norms."""
        scores = node.input[0]
        reshaped = self._made(scores, "Reshape")
        normed = self._normed(reshaped.input[0]) if reshaped else None
        own = normed is not None and self._features(normed) == rows and len(self.readers[scores]) == 1
        own_settings = [attribute for attribute in node.attribute if attribute.name not in PLUGIN]
        settings: dict[str, Any] = {one.name: helper.get_attribute_value(one) for one in own_settings}
        settings |= {"start": rows.start, "count": rows.count, "centred": int(rows.centred)}
        source = f"{node.output[0]}.rows" if rows.cast else rows.source
        before = [helper.make_node("Cast", [rows.source], [source], to=TensorProto.FLOAT)] if rows.cast else []
        inputs = [source, "" if own else scores, *node.input[2:]]
        outputs = [node.output[0], scores if own else f"{node.output[0]}.norms"]
        selection = helper.make_node(BY_ROWS, inputs, outputs, name=node.name, domain=DOMAIN, **settings)
        return {node.output[0]: [*before, selection], **({scores: []} if own else {})}

    def _features(self, name: str) -> _Rows | None:
        """The rows that features [B,V,C] are: a slice of tokens, or that less its mean over the tokens."""
        centred = self._made(name, "Sub")
        image = name
        if centred is not None:
            image, mean = centred.input[0], self._made(centred.input[1], "ReduceMean")
            if mean is None or mean.input[0] != image or self._constant(mean.input[1]) != [TOKENS]:
                return None
        wide = self._made(image, "Cast")
        part = self._made(image if wide is None else wide.input[0], "Slice")
        if part is None or len(part.input) != 5 or self.types.get(part.input[0]) not in TAKEN:
            return None
        start, stop, axis, step = (self._constant(value) for value in part.input[1:])
        shape = self.shapes[part.input[0]]
        if start is None or stop is None or axis != [TOKENS] or step != [1] or len(shape) != 3:
            return None
        count = stop[0] - start[0]
        if wide is not None:
            return _Rows(part.output[0], 0, count, centred is not None, cast=True)
        return _Rows(part.input[0], start[0], count, centred is not None, cast=False)

    def _normed(self, name: str) -> str | None:
        """The tensor of whose rows these are the norms."""
        root = self._made(name, "Sqrt")
        total = self._made(root.input[0], "ReduceSum") if root else None
        squares = self._made(total.input[0], "Mul") if total else None
        if total is None or squares is None or squares.input[0] != squares.input[1]:
            return None
        return squares.input[0] if self._constant(total.input[1]) in ([-1], [2]) else None

    def _made(self, name: str, op_type: str) -> NodeProto | None:
        """The node that gives a tensor, if it is of this type."""
        node = self.producers.get(name)
        return node if node is not None and node.op_type == op_type else None

    def _constant(self, name: str) -> list[int] | None:
        """A stored list of integers."""
        stored = self.stored.get(name)
        return None if stored is None else [int(number) for number in numpy_helper.to_array(stored).ravel()]
