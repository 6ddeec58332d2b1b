"""Decoders with small weights on a CPU: one operator of btp_ort for all that lies between two attentions.

A layer is some twenty nodes, and a node costs its start, the waking of threads that sleep, and a pass of its rows
through memory. Where the weights are small, that is a large part of the time. BtpDecoderRows takes some rows through
all steps at once, so a layer is two nodes (docs/performance.md has the times). Its weights are laid out anew while a
session opens and have to stay in a core's cache while all rows pass: larger ones are left to products of their own.

    feeds:    context o^T + rows -> RMSNormalization -> silu(gate) x up -> down, + the same -> rows [M,C]
    projects: rows -> RMSNormalization -> three Gemm with q, k, v -> in heads, q and k rotated, by token and by head
    BtpDecoderRows(rows, cos, sin, context, weights ...) -> rows; query, key, value [B,S,N]; the same [B,N/D,S,D]

Outputs that nobody wants are left out.

Only on processors with AVX-512, where it was measured.
"""

from collections.abc import Iterator
from typing import Any, Final

import onnx
from onnx import NodeProto, helper

from engines.runners.on_cpu.decoder_layers import NORM, Feed, Layers, Projection, heads_of
from engines.runners.on_cpu.rewriting import Shape
from graphs.ops.domain import DOMAIN

ROWS: Final = "BtpDecoderRows"  # graphs/ops/decoder_rows/ort_op.cc
FEW: Final = 16  # rows, up to which weights stay in the 16 bits they are stored in


def may_have(serialized: bytes) -> bool:
    """Whether a model's bytes may hold what `for_cpu` replaces. Reads no protobuf."""
    return NORM.encode() in serialized and b"Gemm" in serialized


def for_cpu(model: onnx.ModelProto) -> None:
    """Replace what has the known form, in float32 with small weights; the rest stays."""
    graph = _Graph(model)
    norms = [node for node in model.graph.node if graph.is_norm(node)]
    projections = {found.rows: found for norm in norms if (found := graph.projection(norm)) is not None}
    replaced: dict[str, list[NodeProto]] = {}
    superseded: set[str] = set()
    for norm in norms:
        feed = graph.feed(norm)
        if feed is None:
            continue
        behind = projections.get(feed.result)
        if behind is not None and behind.epsilon == feed.epsilon and graph.is_small([*feed.weights, *behind.weights]):
            superseded |= {behind.norm, *behind.inner}
            del projections[feed.result]
        else:
            behind = None
        replaced[feed.result] = list(graph.rows_node(feed, behind))
    for projection in projections.values():
        replaced[projection.norm] = list(graph.rows_node(None, projection))
        superseded |= projection.inner
    if replaced:
        graph.put(replaced, frozenset(superseded))


class _Graph(Layers):
    """The layers of a model, and what stands in for them."""

    def rows_node(self, feed: Feed | None, projection: Projection | None) -> Iterator[NodeProto]:
        """The operator for what follows one attention, precedes the next, or both; and reshapes of what it gives."""
        inputs, outputs, reshapes = [""] * 3, [feed.result if feed else ""], list[NodeProto]()
        settings: dict[str, Any] = {"head": 2, "feeds": int(feed is not None), "projects": int(projection is not None)}
        if projection is not None:
            by_token, by_head = self._wanted(projection, reshapes)
            inputs = [projection.rows, projection.cos, projection.sin]
            outputs += [*by_token, *by_head]
            settings |= {"epsilon": projection.epsilon, "head": 2 * self.shapes[projection.cos][2]}
        if feed is not None:
            inputs[0] = feed.rows
            settings["epsilon"] = feed.epsilon
        inputs += [feed.context, feed.weights[0], feed.scale, *feed.weights[1:]] if feed else [""] * 6
        if projection is not None:
            biases = [part.bias for part in projection.parts if part.bias]
            inputs += [projection.scale, *projection.weights, *biases]
            settings["biased"] = int(bool(biases))
        settings["few"] = int(self.shapes[inputs[0]][0] <= FEW)
        yield helper.make_node(ROWS, inputs, outputs, domain=DOMAIN, **settings)
        yield from reshapes

    def _wanted(self, projection: Projection, reshapes: list[NodeProto]) -> tuple[list[str], list[str]]:
        """Names of query, key and value by token and by head, "" where nobody wants one.

        reshapes: gets nodes for what is wanted in a shape that the operator does not give.
        """
        by_token, by_head, cos = ["", "", ""], ["", "", ""], self.shapes[projection.cos]
        for place, part in enumerate(projection.parts):
            for name in part.wanted:
                in_heads, _ = self.made_by(name)
                shape, alike = self.shape(name), cos[1] == 1  # both orders are the same for one token
                if in_heads or (alike and shape == heads_of(cos, part.numbers)):
                    by_head[place] = self._same(by_head[place], name, shape, reshapes)
                elif shape == (*cos[:2], part.numbers):
                    by_token[place] = self._same(by_token[place], name, shape, reshapes)
                else:
                    by_token[place] = by_token[place] or f"{part.weight}.rows"
                    reshapes.append(self.reshape(by_token[place], shape, name))
        return by_token, by_head

    def _same(self, given: str, name: str, shape: Shape, reshapes: list[NodeProto]) -> str:
        """The output's name: this tensor's, unless another is that output; then this is made from it."""
        if given:
            reshapes.append(self.reshape(given, shape, name))
        return given or name
