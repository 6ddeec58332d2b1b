"""One parameterised decoder block (Llama, Vicuna, Mistral, Qwen2) and the graphs made of it: segments, head, decode."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphs import names
from graphs.building import layers
from graphs.building.attention import cache_mask, cached_attention, causal_attention
from graphs.building.graph_builder import GraphBuilder, dims
from graphs.records.plan import PruningPlan, Segment
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import DecoderSpec

INT32 = ir.DataType.INT32


@dataclass(frozen=True)
class Stream:
    """What flows between segments: hidden [B,S_i,C], cos and sin [B,S_i,D/2], last [B] int32."""

    hidden: ir.Value
    cos: ir.Value
    sin: ir.Value
    last: ir.Value


@dataclass(frozen=True)
class SegmentResult:
    """A segment's output rows [B,S_i,C], its keys and values by layer, and its last layer's query [B,H,S_i,D]."""

    hidden: ir.Value
    caches: dict[int, tuple[ir.Value, ir.Value]]
    query: ir.Value


def add_segment(b: GraphBuilder, spec: DecoderSpec, segment: Segment, stream: Stream) -> SegmentResult:
    """Run layers [start, stop) over the stream."""
    batch, tokens, width = dims(stream.hidden)
    # Everything but attention works on single rows, so batch and tokens are one axis between its reshapes.
    rows = b.reshape(stream.hidden, (batch * tokens, width), f"{names.segment_scope(segment.index)}.rows")
    caches: dict[int, tuple[ir.Value, ir.Value]] = {}
    for layer in range(segment.start, segment.stop):
        with b.scope(names.layer_scope(layer)):
            with b.scope("attention"):
                normal = layers.attention_norm(b, spec, layer, rows)
                query, key, value = layers.qkv(b, spec, layer, normal, stream.cos, stream.sin)
                context = causal_attention(b, query, key, value)
                projected = layers.merge_heads(b, spec, layer, context)
            rows = layers.mlp_block(b, spec, layer, b.add(rows, projected, "attended"))
        caches[layer] = (key, value)
    hidden = b.reshape(rows, (batch, tokens, width), f"{names.segment_scope(segment.index)}.hidden")
    return SegmentResult(hidden, caches, query)


def add_head(b: GraphBuilder, spec: DecoderSpec, hidden: ir.Value, last: ir.Value) -> ir.Value:
    """Logits [B,vocab] float32 of the row at `last` of each batch item."""
    batch, tokens, width = dims(hidden)
    starts = b.constant("constant.batch_starts", np.arange(batch, dtype=np.int32) * tokens)
    rows = b.reshape(hidden, (batch * tokens, width), "head.rows")
    last_rows = b.gather_rows(rows, b.add(last, starts, "head.last_row"), 0, "head.last_hidden")
    return layers.output_logits(b, spec, last_rows)


def last_query(b: GraphBuilder, query: ir.Value, last: ir.Value) -> ir.Value:
    """The row at `last` of query [B,H,S,D] -> [B,H,1,D]."""
    batch, heads, _, size = dims(query)
    shape = (batch, heads, 1, size)
    with b.scope("last_query"):
        column = b.reshape(last, (batch, 1, 1, 1), "column")
        indices = b.op("Expand", [column, b.integers(*shape)], "indices", shape=shape)
        return b.op("GatherElements", [query, indices], "row", shape=shape, axis=2)


def add_decode(b: GraphBuilder, spec: DecoderSpec, plan: PruningPlan, profile: ShapeProfile) -> None:
    """The whole decode graph: inputs, every layer on one token, outputs."""
    batch, half = profile.batch, spec.head_dim // 2
    hidden = b.input("hidden", (batch, 1, spec.hidden_size))
    cos, sin = b.input("cos", (batch, 1, half)), b.input("sin", (batch, 1, half))
    segments = plan.segments()
    lengths = [b.input(names.length(segment.index), (batch,), INT32) for segment in segments]
    past = {layer: _past(b, spec, layer, profile.capacity_with(s.image_tokens), batch) for s in segments
            for layer in range(s.start, s.stop)}  # fmt: skip
    rows = b.reshape(hidden, (batch, spec.hidden_size), "rows")
    fresh: dict[int, tuple[ir.Value, ir.Value]] = {}
    for segment, length in zip(segments, lengths, strict=True):
        scope = names.segment_scope(segment.index)
        valid = cache_mask(b, length, profile.capacity_with(segment.image_tokens), f"{scope}.valid")
        for layer in range(segment.start, segment.stop):
            rows, fresh[layer] = _decode_layer(b, spec, layer, rows, (cos, sin), past[layer], valid)
    b.output(layers.output_logits(b, spec, rows), "logits")
    add_cache_outputs(b, fresh)


def _past(b: GraphBuilder, spec: DecoderSpec, layer: int, capacity: int, batch: int) -> tuple[ir.Value, ir.Value]:
    shape = (batch, spec.num_kv_heads, capacity, spec.head_dim)
    return b.input(names.past_key(layer), shape), b.input(names.past_value(layer), shape)


def _decode_layer(
    b: GraphBuilder,
    spec: DecoderSpec,
    layer: int,
    rows: ir.Value,
    rotation: tuple[ir.Value, ir.Value],
    past: tuple[ir.Value, ir.Value],
    valid: ir.Value,
) -> tuple[ir.Value, tuple[ir.Value, ir.Value]]:
    """One layer on rows [B,C]; gives the new rows and the token's own key and value [B,K,1,D]."""
    with b.scope(names.layer_scope(layer)):
        with b.scope("attention"):
            normal = layers.attention_norm(b, spec, layer, rows)
            query, key, value = layers.qkv(b, spec, layer, normal, *rotation)
            context = cached_attention(b, query, (key, value), past, valid)
            projected = layers.merge_heads(b, spec, layer, context)
        rows = layers.mlp_block(b, spec, layer, b.add(rows, projected, "attended"))
    return rows, (key, value)


def add_cache_outputs(b: GraphBuilder, caches: dict[int, tuple[ir.Value, ir.Value]]) -> None:
    """Outputs key_<l> and value_<l>, by layer."""
    for layer, (key, value) in caches.items():
        b.output(key, names.key(layer))
        b.output(value, names.value(layer))
