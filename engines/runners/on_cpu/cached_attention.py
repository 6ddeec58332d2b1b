"""Attention of a new token over its cache on a CPU: ONNX Runtime's own node, which reads the valid rows alone.

A decode graph multiplies with whole caches and masks the rows that are not valid yet, so a step takes the longer the
more room its caches have. GroupQueryAttention knows how many rows are valid (docs/decisions/attention-on-a-cpu.md has
the times). It wants the new row inside the cache, and writes it there itself if its present output is the past input's
own memory. So each replaced layer gets two outputs more, which whoever binds the session binds to the memory of its
caches: nothing is copied. The chain writes the same row to the same place again, as it does for every runtime.

    query [B,H,1,D], key and value [B,K,1,D], past [B,K,cap,D] each, length [B] -> context [B,H,1,D]
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from engines.runners.on_cpu.rewriting import NODE, TAKEN, Rewriting
from graphs import names

IN_PLACE: Final = ".in_place"  # what an output is called that is the input's own memory


def may_have(serialized: bytes) -> bool:
    """Whether a model's bytes may hold what `for_cpu` replaces. Reads no protobuf."""
    return names.past_key(0).rstrip("0").encode() in serialized


def for_cpu(model: onnx.ModelProto) -> dict[str, str]:
    """Replace attention over caches; gives the outputs that are new, with the input that each is the memory of.

    Layers of another form, and of types other than float32 and float16, stay as they are.
    """
    graph = _Graph(model)
    replaced: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        layer = graph.layer_of(node)
        if layer is not None:
            replaced[layer.context] = list(graph.replacement(layer))
    if not replaced:
        return {}
    for name, source in graph.in_place.items():
        kind = helper.make_tensor_value_info(name, graph.types[source], graph.shapes[source])
        model.graph.output.append(kind)
    graph.put(replaced)
    return graph.in_place


@dataclass(frozen=True)
class _Layer:
    """Names of what one layer's attention reads and gives, and what scores are multiplied with."""

    query: str
    rows: tuple[str, str]
    past: tuple[str, str]
    length: str
    context: str
    scale: float


class _Graph(Rewriting):
    """The attention of a model over its caches."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        self._inputs = {value.name for value in model.graph.input}
        self.in_place: dict[str, str] = {}

    def layer_of(self, node: NodeProto) -> _Layer | None:
        """The layer whose weighted sum of cached values the node is, if all of its attention has the known form."""
        if node.op_type != "MatMul" or node.input[1] not in self._inputs:
            return None
        past_value = names.parse_tensor(node.input[1])
        if past_value.role != "past_value" or past_value.number is None:
            return None
        number = past_value.number
        past, rows = (names.past_key(number), names.past_value(number)), (names.key(number), names.value(number))
        context = self._only(node.output[0], "Add")
        masked = self._masked_scores(past[0])
        if context is None or masked is None or self.types.get(past[0]) not in TAKEN:
            return None
        scaled, valid = (self._made_by(name) for name in masked)
        if scaled is None or scaled.op_type != "Mul" or valid is None or valid.op_type != "Less":
            return None
        length, factor = self._laid_out(valid.input[1]), self._factor(scaled.input[1])
        if length not in self._inputs or factor is None:
            return None
        return _Layer(scaled.input[0], rows, past, length, context, float(numpy_helper.to_array(factor)))

    def _factor(self, name: str) -> TensorProto | None:
        """A stored number, which graphs of half precision cast."""
        cast = self.producers.get(name)
        return self.stored.get(cast.input[0] if cast is not None and cast.op_type == "Cast" else name)

    def _masked_scores(self, past_key: str) -> tuple[str, str] | None:
        """The grouped query and the mask of the product with the cached keys."""
        product = self._only_reader(self._only(past_key, "Transpose"), "MatMul")
        where = None if product is None else self._only_reader(product.output[0], "Where")
        return None if product is None or where is None else (product.input[0], where.input[0])

    def _only_reader(self, name: str | None, op_type: str) -> NodeProto | None:
        readers = self.readers.get(name or "", [])
        return readers[0] if len(readers) == 1 and readers[0].op_type == op_type else None

    def _only(self, name: str | None, op_type: str) -> str | None:
        reader = self._only_reader(name, op_type)
        return None if reader is None else reader.output[0]

    def _laid_out(self, name: str) -> str:
        """The tensor whose elements a tensor has in another shape; the tensor itself where it is no Reshape."""
        node = self.producers.get(name)
        return self._laid_out(node.input[0]) if node is not None and node.op_type == "Reshape" else name

    def _made_by(self, name: str) -> NodeProto | None:
        return self.producers.get(self._laid_out(name))

    def replacement(self, layer: _Layer) -> Iterator[NodeProto]:
        """Nodes that give the layer's context."""
        batch, heads, _, size = self.shapes[layer.query]
        kv_heads = self.shapes[layer.past[0]][1]
        given = []
        for name, count in zip((layer.query, *layer.rows), (heads, kv_heads, kv_heads), strict=True):
            given.append(f"{name}.by_token")
            yield self.reshape(name, (batch, 1, count * size), given[-1])
        total = f"{layer.length}.total.{layer.past[0]}"
        most, one = f"{total}.most", self.constant(f"{NODE}.one", np.array([1], np.int32))
        yield helper.make_node("ReduceMax", [layer.length], [most], keepdims=1)
        yield helper.make_node("Add", [most, one], [total])
        present = [f"{name}{IN_PLACE}" for name in layer.past]
        self.in_place |= dict(zip(present, layer.past, strict=True))
        rows = f"{layer.context}.rows"
        settings: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": layer.scale}
        yield self.attention([*given, *layer.past, layer.length, total], [rows, *present], **settings)
        yield self.reshape(rows, self.shapes[layer.context], layer.context)
