"""Attention over a whole sequence on a CPU: btp_ort's or ONNX Runtime's own node in place of the standard operator.

ONNX Runtime computes the operator Attention as it is written down: all products of queries and keys in memory, those
above the diagonal too. Its GroupQueryAttention goes over them block by block and stops at the diagonal, and so does
btp_ort's BtpCausalAttention, in half of the time, on processors with AVX-512 (docs/decisions/attention-on-a-cpu.md has
the times). So the node is replaced while a session is prepared, in memory: files keep the operator, which every runtime
knows.

    Attention(query [B,H,S,D], key [B,K,S,D], value [B,K,S,D], is_causal) -> context [B,H,S,D]
    GroupQueryAttention([B,S,H*D], [B,S,K*D], [B,S,K*D]) -> [B,S,H*D]
    BtpCausalAttention: the same in float32, where D is a multiple of 16 and scores are divided by its root

Both take rows by token, as projections give them, so the transpositions before and after go as well. The further
outputs of ONNX Runtime's node, key and value in the order of the caches, are not asked for: it is slower with them.

In float16 ONNX Runtime's computes in float32 and rounds once, where the operator rounds scores to float16 on their way.
"""

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from engines.runners.on_cpu.rewriting import NODE, TAKEN, Rewriting
from graphs.ops.domain import DOMAIN

OPERATOR: Final = "Attention"
OWN: Final = "BtpCausalAttention"  # graphs/ops/causal_attention/ort_op.cc
BY_TOKEN: Final = [0, 2, 1, 3]  # [B,H,S,D] <-> [B,S,H,D]
HEAD_STEP: Final = 8  # what ONNX Runtime's node wants head sizes to be multiples of
OWN_STEP: Final = 16  # what btp_ort's does


def may_have(serialized: bytes) -> bool:
    """Whether a model's bytes may hold what `for_cpu` replaces. Reads no protobuf."""
    return b"is_causal" in serialized


def for_cpu(model: onnx.ModelProto, *, native: bool = False) -> None:
    """Replace every causal Attention of float32 or float16 without mask and past; others stay.

    native: by btp_ort's node, where it takes type and sizes.
    """
    graph = _Graph(model, native)
    replaced = {n.output[0]: list(graph.replacement(n)) for n in model.graph.node if graph.is_replaced(n)}
    if replaced:
        graph.put(replaced, frozenset(graph.superseded))


class _Graph(Rewriting):
    """The causal attention of a model."""

    def __init__(self, model: onnx.ModelProto, native: bool) -> None:
        super().__init__(model)
        self._native = native
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
        query = node.input[0]
        batch, heads, tokens, size = self.shapes[query]
        rows = []
        for name in node.input:
            yield from self._by_token(name)
            rows.append(f"{name}.by_token")
        context = f"{node.output[0]}.rows"
        yield self._attention(node, rows, context)
        split = f"{context}.split"
        yield self.reshape(context, (batch, tokens, heads, size), split)
        yield helper.make_node("Transpose", [split], [node.output[0]], perm=BY_TOKEN)

    def _attention(self, node: NodeProto, rows: list[str], context: str) -> NodeProto:
        """The new node, of rows by token."""
        batch, heads, tokens, size = self.shapes[node.input[0]]
        scale = _attributes(node).get("scale")
        key_heads = self.shapes[node.input[1]][1]
        settings: dict[str, Any] = {"name": node.name, "num_heads": heads, "kv_num_heads": key_heads}
        usual = scale is None or bool(np.isclose(scale, size**-0.5, rtol=1e-6))
        wide = self.types[node.input[0]] == TensorProto.FLOAT
        if self._native and wide and usual and size % OWN_STEP == 0:
            return helper.make_node(OWN, rows, [context], domain=DOMAIN, **settings)
        valid = self.constant(f"{NODE}.valid.{batch}.{tokens}", np.full(batch, tokens - 1, np.int32))
        total = self.constant(f"{NODE}.total.{tokens}", np.array([tokens], np.int32))
        return self.attention([*rows, "", "", valid, total], [context], scale=scale, **settings)

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
            if len(self.readers[name]) == 1:  # beside the attention only the caches want it: it is rotated once
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
