"""Attention over a whole sequence (prefill) and of one new token over a cache (decode).

Grouped keys (K < H) are never repeated: the H/K query heads that share a key are laid out as more rows of one
product. Softmax runs in float32 also when everything else is in half precision.
"""

from typing import Any

import numpy as np
import onnx_ir as ir

from graphs.building.graph_builder import GraphBuilder, dims, dtype_of

FLOAT = ir.DataType.FLOAT
BOOL = ir.DataType.BOOL


def softmax(b: GraphBuilder, scores: ir.Value, name: str) -> ir.Value:
    """Softmax over the last axis, in float32, back in the type of `scores`."""
    wide = b.cast(scores, FLOAT, f"{name}_wide")
    if wide is scores:
        return b.unary("Softmax", scores, name, axis=-1)
    return b.cast(b.unary("Softmax", wide, f"{name}_float32", axis=-1), dtype_of(scores), name)


def minus_infinity(b: GraphBuilder, dtype: ir.DataType) -> ir.Value:
    """What a masked score becomes."""
    return b.scalar("minus_infinity", -np.inf, dtype)


def positions(b: GraphBuilder, count: int) -> ir.Value:
    """0, 1, ... as [1,count] int32."""
    return b.constant(f"constant.positions.{count}", np.arange(count, dtype=np.int32)[None])


def causal_mask(b: GraphBuilder, tokens: int) -> ir.Value:
    """[S,S], 0 where row i may look at column j (j <= i) and -inf elsewhere; made once a graph.

    Computed from the positions, so that no S*S constant is stored. It is added and not selected by: Add took half of
    Where's time in ONNX Runtime (0.63 ms against 1.14 ms for [1,4,616,616] on one thread).
    """
    name = f"causal_mask.{tokens}"
    known = b.find(name)
    if known is not None:
        return known
    row = b.constant(f"constant.positions_down.{tokens}", np.arange(tokens, dtype=np.int32)[:, None])
    with b.root_scope():
        seen = b.binary("LessOrEqual", positions(b, tokens), row, f"{name}.seen", BOOL)
        return b.where(seen, b.scalar("0", 0.0, b.dtype), minus_infinity(b, b.dtype), name)


def causal_attention(b: GraphBuilder, query: ir.Value, key: ir.Value, value: ir.Value) -> ir.Value:
    """query [B,H,S,D], key and value [B,K,S,D] -> context [B,H,S,D]; token i sees tokens 0..i."""
    batch, heads, tokens, size = dims(query)
    scale = size**-0.5
    if b.fused:
        narrow: dict[str, Any] = {} if b.dtype == FLOAT else {"softmax_precision": int(FLOAT)}
        return b.op("Attention", [query, key, value], "context", shape=dims(query), is_causal=1, scale=scale, **narrow)
    kv_heads = dims(key)[1]
    rows = heads // kv_heads * tokens
    grouped = b.reshape(b.scaled(query, scale, "query_scaled"), (batch, kv_heads, rows, size), "query_grouped")
    products = b.matmul(grouped, b.transpose(key, (0, 1, 3, 2), "key_transposed"), "products")
    scores = b.reshape(products, (batch, heads, tokens, tokens), "scores")
    masked = b.add(scores, causal_mask(b, tokens), "scores_masked")
    weights = b.reshape(softmax(b, masked, "weights"), (batch, kv_heads, rows, tokens), "weights_grouped")
    return b.reshape(b.matmul(weights, value, "context_grouped"), dims(query), "context")


def cache_mask(b: GraphBuilder, length: ir.Value, capacity: int, name: str) -> ir.Value:
    """[B,1,1,cap] bool: the cache rows before `length` [B] int32."""
    batch = dims(length)[0]
    column = b.reshape(length, (batch, 1), f"{name}_column")
    valid = b.binary("Less", positions(b, capacity), column, f"{name}_rows", BOOL)
    return b.reshape(valid, (batch, 1, 1, capacity), name)


def cached_attention(
    b: GraphBuilder,
    query: ir.Value,
    new: tuple[ir.Value, ir.Value],
    past: tuple[ir.Value, ir.Value],
    valid: ir.Value,
) -> ir.Value:
    """One new token over its cache and itself, without joining the two: the cache is read in place.

    query [B,H,1,D]; new: key and value [B,K,1,D]; past: [B,K,cap,D] each; valid [B,1,1,cap] -> context [B,H,1,D].
    The transposition of past_key is part of the product in ONNX Runtime (FusedMatMul; a test holds that); past_key @
    query^T, which has none, took 1.7 times as long there (32 heads, 768 rows). TensorRT gets another form
    (engines/tensorrt/prepare/attention.py).
    Rows that are not valid get weight 0; they must hold finite numbers.
    """
    (new_key, new_value), (past_key, past_value) = new, past
    batch, heads, _, size = dims(query)
    kv_heads, capacity = dims(past_key)[1], dims(past_key)[2]
    group = heads // kv_heads
    grouped = b.reshape(b.scaled(query, size**-0.5, "query_scaled"), (batch, kv_heads, group, size), "query_grouped")
    past_scores = b.matmul(grouped, b.transpose(past_key, (0, 1, 3, 2), "past_key_transposed"), "past_scores")
    masked = b.where(valid, past_scores, minus_infinity(b, b.dtype), "past_scores_masked")
    new_scores = b.matmul(grouped, b.transpose(new_key, (0, 1, 3, 2), "new_key_transposed"), "new_scores")
    weights = softmax(b, b.concat([masked, new_scores], 3, "scores"), "weights")
    past_weights = b.slice(weights, 3, 0, capacity, "past_weights")
    new_weights = b.slice(weights, 3, capacity, capacity + 1, "new_weights")
    past_context = b.matmul(past_weights, past_value, "past_context")
    context = b.add(past_context, b.mul(new_weights, new_value, "new_context"), "context_grouped")
    return b.reshape(context, dims(query), "context")
