"""Importance scores and similarity as ONNX nodes; the definitions are in graphs/pruning/torch_scores.py."""

import numpy as np
import onnx_ir as ir

from graphs.building.attention import BOOL, FLOAT, minus_infinity, positions
from graphs.building.graph_builder import GraphBuilder, dims
from graphs.pruning.spatial_set import NORM_EPSILON, random_scores, stage_pivots
from graphs.pruning.torch_scores import TEXT_TOLERANCE, uses_attention
from graphs.records.plan import PruningPlan, Stage
from graphs.records.shapes import ShapeProfile


def unit_rows(b: GraphBuilder, hidden: ir.Value, name: str) -> ir.Value:
    """hidden [B,n,C] -> rows of length 1, float32."""
    with b.scope(name):
        wide = b.cast(hidden, FLOAT, "wide")
        norm = b.unary("Sqrt", b.reduce("ReduceSum", b.mul(wide, wide, "square"), -1, "sum"), "norm")
        safe = b.binary("Max", norm, b.scalar("norm_epsilon", NORM_EPSILON, FLOAT), "safe_norm")
        return b.binary("Div", wide, safe, "unit")


def cosine_similarity(b: GraphBuilder, unit: ir.Value) -> ir.Value:
    """unit [B,n,C] -> [B,n,n] float32."""
    return b.matmul(unit, b.transpose(unit, (0, 2, 1), "unit_transposed"), "similarity")


def image_rows(b: GraphBuilder, hidden: ir.Value, profile: ShapeProfile, count: int) -> ir.Value:
    """The current image tokens of hidden [B,S,C]."""
    start = profile.prefix_tokens
    return b.slice(hidden, 1, start, start + count, "image")


def centred(b: GraphBuilder, image: ir.Value, name: str) -> ir.Value:
    """image [B,n,C] minus its mean over the n tokens, float32."""
    with b.scope(name):
        wide = b.cast(image, FLOAT, "wide")
        batch, _, width = dims(image)
        mean = b.reshape(b.reduce("ReduceMean", wide, 1, "mean"), (batch, 1, width), "mean_row")
        return b.binary("Sub", wide, mean, "centred")


def stage_similarity(b: GraphBuilder, stage: Stage, image: ir.Value) -> ir.Value:
    """What the selection takes as similarity of the stage's tokens image [B,n,C]: [B,n,n] float32."""
    features = centred(b, image, "image_features") if stage.features == "centred" else image
    return cosine_similarity(b, unit_rows(b, features, "image_rows"))


def stage_scores(
    b: GraphBuilder,
    plan: PruningPlan,
    stage: int,
    profile: ShapeProfile,
    *,
    hidden: ir.Value,
    image: ir.Value,
    last: ir.Value,
    query: ir.Value | None,
    key: ir.Value | None,
    class_attention: ir.Value | None = None,
) -> ir.Value:
    """Scores [B,n] float32 by the stage's rule; hidden [B,S,C], image [B,n,C] of it, last [B] int32.

    query [B,H,Q,D] and key [B,K,S,D], or the tower's class_attention [B,n], only if the rule needs them.
    """
    batch, count, rule = profile.batch, plan.tokens_before(stage), plan.importance_of(stage)
    if rule == "random":
        return b.constant(b.full_name("random_scores"), np.tile(random_scores(count, stage), (batch, 1)))
    if rule == "pivot-distance":
        return _pivot_scores(b, image, stage_pivots(plan, stage))
    if rule == "norm":
        features = centred(b, image, "norm_features")
        squares = b.reduce("ReduceSum", b.mul(features, features, "squares"), -1, "square_sum")
        return b.reshape(b.unary("Sqrt", squares, "norm"), (batch, count), "scores")
    if rule == "vision-cls":
        assert class_attention is not None
        return class_attention
    if not uses_attention(plan, stage):
        return b.constant(b.full_name("equal_scores"), np.zeros((batch, count), np.float32))
    assert query is not None and key is not None
    text_start = profile.prefix_tokens + count
    if rule == "last-token":
        tokens = dims(key)[2]
        visible = b.reshape(_reached(b, positions(b, tokens), last, "visible_rows"), (batch, 1, 1, tokens), "visible")
    else:  # padding rows behind `last` are masked like any other; their weight is 0 below
        visible = _text_mask(b, dims(key)[2], text_start)
    attention = _attention_weights(b, query, key, visible)
    image_attention = b.slice(attention, 3, profile.prefix_tokens, text_start, "image_attention")
    mean = b.reduce("ReduceMean", image_attention, 1, "mean_of_heads")
    rows = dims(query)[2]
    if rows == 1:
        return b.reshape(mean, (batch, count), "scores")
    weights = _text_weights(b, rule, hidden, image, last, text_start)
    by_row = b.reshape(mean, (batch, rows, count), "attention_by_row")
    weighted = b.matmul(b.reshape(weights, (batch, 1, rows), "row_weights"), by_row, "weighted")
    return b.reshape(weighted, (batch, count), "scores")


def _reached(b: GraphBuilder, column: ir.Value, last: ir.Value, name: str) -> ir.Value:
    """[B,n] bool: column [1,n] <= last [B]."""
    return b.binary("LessOrEqual", column, b.reshape(last, (dims(last)[0], 1), f"{name}_last"), name, BOOL)


def _text_mask(b: GraphBuilder, tokens: int, text_start: int) -> ir.Value:
    """[T,S] bool: text row t sees the columns up to its own place."""
    rows = np.arange(text_start, tokens, dtype=np.int32)[:, None]
    row = b.constant(f"constant.text_rows.{text_start}_{tokens}", rows)
    return b.binary("LessOrEqual", positions(b, tokens), row, "visible", BOOL)


def _attention_weights(b: GraphBuilder, query: ir.Value, key: ir.Value, visible: ir.Value) -> ir.Value:
    """query [B,H,Q,D], key [B,K,S,D] -> [B,H,Q,S] float32."""
    batch, heads, rows, size = dims(query)
    kv_heads, tokens = dims(key)[1], dims(key)[2]
    # The query is scaled, not the products: it has D numbers a row where they have S.
    scaled = b.scaled(b.cast(query, FLOAT, "query_wide"), size**-0.5, "query_scaled")
    grouped = b.reshape(scaled, (batch, kv_heads, heads // kv_heads * rows, size), "query_grouped")
    across = b.transpose(b.cast(key, FLOAT, "key_wide"), (0, 1, 3, 2), "key_transposed")
    by_head = b.reshape(b.matmul(grouped, across, "products"), (batch, heads, rows, tokens), "products_by_head")
    masked = b.where(visible, by_head, minus_infinity(b, FLOAT), "products_masked")
    return b.unary("Softmax", masked, "attention", axis=-1)


def _text_weights(
    b: GraphBuilder, rule: str, hidden: ir.Value, image: ir.Value, last: ir.Value, text_start: int
) -> ir.Value:
    """[B,T] float32, summing to 1."""
    tokens = dims(hidden)[1]
    column = b.constant(f"constant.text_columns.{text_start}", np.arange(text_start, tokens, dtype=np.int32)[None])
    real = b.cast(_reached(b, column, last, "real_rows"), FLOAT, "real")
    if rule == "mean-text":
        return _normalised(b, real, real, "mean_weights")
    batch = dims(hidden)[0]
    mean_image = b.reduce("ReduceMean", b.cast(image, FLOAT, "image_wide"), 1, "image_mean")
    text = unit_rows(b, b.slice(hidden, 1, text_start, tokens, "text"), "text_rows")
    direction = b.transpose(unit_rows(b, mean_image, "image_direction"), (0, 2, 1), "image_direction_column")
    cosine = b.reshape(b.matmul(text, direction, "text_products"), (batch, tokens - text_start), "text_cosine")
    kept = b.mul(cosine, real, "real_cosine")
    average = b.reduce("ReduceSum", _normalised(b, kept, real, "average_terms"), 1, "average_cosine")
    bound = b.binary("Sub", average, b.scalar("text_tolerance", TEXT_TOLERANCE, FLOAT), "cosine_bound")
    similar = b.cast(b.binary("GreaterOrEqual", cosine, bound, "similar_rows", BOOL), FLOAT, "similar")
    chosen = b.mul(real, similar, "chosen")
    return _normalised(b, chosen, chosen, "similar_weights")


def _normalised(b: GraphBuilder, x: ir.Value, count: ir.Value, name: str) -> ir.Value:
    """x [B,T] / max(sum of count, 1)."""
    with b.scope(name):
        total = b.reduce("ReduceSum", count, 1, "total")
        return b.binary("Div", x, b.binary("Max", total, b.scalar("1", 1.0, FLOAT), "safe_total"), "share")


def _pivot_scores(b: GraphBuilder, image: ir.Value, pivots: np.ndarray) -> ir.Value:
    """min over pivots of 1 - cos, the pivots +inf: image [B,n,C] -> [B,n]."""
    batch, count, _ = dims(image)
    unit = unit_rows(b, image, "pivot_rows")
    chosen = b.gather_rows(unit, b.constant(b.full_name("pivot_indices"), pivots), 1, "pivots")
    cosines = b.matmul(unit, b.transpose(chosen, (0, 2, 1), "pivots_transposed"), "pivot_cosines")
    nearest = b.reshape(b.reduce("ReduceMax", cosines, 2, "nearest_pivot"), (batch, count), "nearest_cosine")
    distance = b.binary("Sub", b.scalar("1", 1.0, FLOAT), nearest, "pivot_distance")
    is_pivot = np.zeros((1, count), np.bool_)
    is_pivot[0, pivots] = True
    # By place: the cosine of a pivot to itself may round to less than 1, and another token may be equal to it.
    infinity = b.scalar("infinity", np.inf, FLOAT)
    return b.where(b.constant(b.full_name("is_pivot"), is_pivot), infinity, distance, "scores")
