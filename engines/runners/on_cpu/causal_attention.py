"""Attention over a whole sequence on a CPU: ONNX Runtime's own node in place of the standard operator.

ONNX Runtime computes the operator Attention as it is written down: all products of queries and keys in memory, those
above the diagonal too. Its GroupQueryAttention goes over them block by block and stops at the diagonal
(docs/decisions/attention-on-a-cpu.md has the times). So the node is replaced while a session is prepared, in memory:
files keep the operator, which every runtime knows.

    Attention(query [B,H,S,D], key [B,K,S,D], value [B,K,S,D], is_causal) -> context [B,H,S,D]
    GroupQueryAttention([B,S,H*D], [B,S,K*D], [B,S,K*D]) -> [B,S,H*D]

It takes rows by token, as projections give them, so the transpositions before and after it go as well. Its further
outputs, key and value in the order of the caches, are not asked for: with them it is the slower one of the two.

In float16 it computes in float32 and rounds once, where the operator rounds scores to float16 on their way.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from engines.runners.on_cpu.rewriting import NODE, TAKEN, Rewriting

OPERATOR: Final = "Attention"
BY_TOKEN: Final = [0, 2, 1, 3]  # [B,H,S,D] <-> [B,S,H,D]
HEAD_STEP: Final = 8  # what the node wants head sizes to be multiples of


def may_have(serialized: bytes) -> bool:
    """Whether a model's bytes may hold what `for_cpu` replaces. Reads no protobuf."""
    return b"is_causal" in serialized


def for_cpu(model: onnx.ModelProto) -> None:
    """Replace every causal Attention of float32 or float16 without mask and past; others stay."""
    graph = _Graph(model)
    replaced = {n.output[0]: list(graph.replacement(n)) for n in model.graph.node if graph.is_replaced(n)}
    if replaced:
        graph.put(replaced, frozenset(graph.superseded))


class _Graph(Rewriting):
    """The causal attention of a model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        self._readers = Counter(name for node in model.graph.node for name in node.input)
        self.superseded: set[str] = set()  # what new nodes give in place of old ones

    def is_replaced(self, node: NodeProto) -> bool:
        """Causal, of nothing but query, key and value of whole sequences, each of a shape that is known."""
        settings = _attributes(node)
        if node.op_type != OPERATOR or node.domain or set(settings) - {"is_causal", "scale", "softmax_precision"}:
            return False
        if settings.get("softmax_precision", TensorProto.FLOAT) != TensorProto.FLOAT:
            return False
        if settings.get("is_causal") != 1 or len(node.input) != 3 or len(node.output) != 1:
            return False
        shapes = [self.shapes.get(name, ()) for name in node.input]
        if any(len(shape) != 4 or 0 in shape for shape in shapes) or self.types[node.input[0]] not in TAKEN:
            return False
        (_, _, tokens, size), key, value = shapes
        return key == value and key[2] == tokens and key[3] == size and size % HEAD_STEP == 0

    def replacement(self, node: NodeProto) -> Iterator[NodeProto]:
        """Nodes that give what the node gave."""
        query, key, _ = node.input
        batch, heads, tokens, size = self.shapes[query]
        rows = []
        for name in node.input:
            yield from self._by_token(name)
            rows.append(f"{name}.by_token")
        valid = self.constant(f"{NODE}.valid.{batch}.{tokens}", np.full(batch, tokens - 1, np.int32))
        total = self.constant(f"{NODE}.total.{tokens}", np.array([tokens], np.int32))
        context = f"{node.output[0]}.rows"
        given = [*rows, "", "", valid, total]
        settings: dict[str, Any] = {
            "num_heads": heads,
            "kv_num_heads": self.shapes[key][1],
            "scale": _attributes(node).get("scale"),
        }
        yield self.attention(given, [context], name=node.name, **settings)
        split = f"{context}.split"
        yield self.reshape(context, (batch, tokens, heads, size), split)
        yield helper.make_node("Transpose", [split], [node.output[0]], perm=BY_TOKEN)

    def _by_token(self, name: str) -> Iterator[NodeProto]:
        """[B,H,S,D] as [B,S,H*D]: what it was made from where that is in this order, rotated in it where it is."""
        batch, heads, tokens, size = self.shapes[name]
        made, split, whole = f"{name}.by_token", f"{name}.split", (batch, tokens, heads * size)
        producer = self.producers.get(name)
        rotated = producer is not None and producer.op_type == "RotaryEmbedding" and not producer.attribute
        source = self._before_transposition(producer.input[0] if producer is not None and rotated else name)
        if source is None:
            yield helper.make_node("Transpose", [name], [split], perm=BY_TOKEN)
            yield self.reshape(split, whole, made)
        elif producer is None or not rotated:
            yield self.reshape(source, whole, made)
        else:
            yield self.reshape(source, whole, f"{made}.unrotated")
            inputs = [f"{made}.unrotated", *producer.input[1:]]
            rotation = helper.make_node("RotaryEmbedding", inputs, [made], num_heads=heads)
            yield rotation
            if self._readers[name] == 1:  # beside the attention only the caches want it: it is rotated once
                self.superseded.add(name)
                yield self.reshape(made, (batch, tokens, heads, size), split)
                yield helper.make_node("Transpose", [split], [name], perm=BY_TOKEN)

    def _before_transposition(self, name: str) -> str | None:
        """[B,S,H,D], if that is what the tensor was made from."""
        node = self.producers.get(name)
        if node is None or node.op_type != "Transpose" or _attributes(node).get("perm") != BY_TOKEN:
            return None
        return str(node.input[0])


def _attributes(node: NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
