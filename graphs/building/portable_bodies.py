"""The portable bodies of a graph's custom nodes, put into its model: any runtime can run it without a plugin."""

from typing import Any

import onnx
import onnx_ir as ir

from graphs import ops
from graphs.building.graph_builder import BTP_DOMAIN, GraphBuilder
from graphs.ops import select_tokens
from graphs.ops.select_tokens.schema import FARTHEST


def embed_bodies(b: GraphBuilder) -> None:
    """Put the bodies that the nodes so far need into the model.

    One body per operator and model: where nodes differ in optional inputs or rules it is the generic one, else the
    shorter one made for exactly these.
    """
    by_operator: dict[str, list[ir.Node]] = {}
    for node in b.nodes(BTP_DOMAIN):
        by_operator.setdefault(node.op_type, []).append(node)
    for nodes in by_operator.values():
        b.function(_body(nodes, b.opset))


def _body(nodes: list[ir.Node], opset: int) -> onnx.FunctionProto:
    """The body for nodes of one operator."""
    operator = ops.of_node(nodes[0].op_type)
    assert operator is not None, nodes[0].op_type
    bodies = dict(ops.exact_body(operator, opset, *given_to(node)) for node in nodes)
    if len(bodies) == 1:
        return bodies.popitem()[1]
    if operator.NAME == select_tokens.NAME:
        rules = {select_tokens.form(*given_to(node)).diversity_rule for node in nodes}
        return select_tokens.function(opset, only=FARTHEST if rules == {FARTHEST} else None)
    generic: onnx.FunctionProto = operator.function(opset)
    return generic


def given_to(node: ir.Node) -> tuple[list[bool], dict[str, Any]]:
    """Whether each input of a node is there, and its attributes."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    return [value is not None for value in node.inputs], attributes
