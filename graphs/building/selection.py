"""Selection stages: scores -> BtpSelectTokens -> BtpGatherTokens, standing alone as `select_<j>`."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphs import names
from graphs.building.decoder import SegmentResult, Stream, last_query
from graphs.building.graph_builder import BTP_DOMAIN, PLUGIN, GraphBuilder, dims
from graphs.building.onnx_scores import image_rows, stage_scores, stage_similarity
from graphs.pruning.spatial_set import stage_seeds
from graphs.pruning.torch_scores import query_rows
from graphs.records.plan import PruningPlan, Segment
from graphs.records.shapes import ShapeProfile

INT32 = ir.DataType.INT32


@dataclass(frozen=True)
class Selection:
    """The reduced stream; indices [B,keep] int32 and scores [B,n] float32 if any image token is kept."""

    stream: Stream
    indices: ir.Value | None
    scores: ir.Value | None


def add_selection(
    b: GraphBuilder,
    plan: PruningPlan,
    number: int,
    profile: ShapeProfile,
    stream: Stream,
    *,
    query: ir.Value | None,
    key: ir.Value | None,
    class_attention: ir.Value | None = None,
) -> Selection:
    """Stage `number` on the stream; query [B,H,Q,D] and key [B,K,S,D], and the vision tower's class_attention [B,V]
    before layer 0, only if its scores need them.
    """
    stage, count = plan.stages[number], plan.tokens_before(number)
    with b.scope(names.stage_scope(number)):
        # One number for all samples: a stage keeps the same count of each, which is why shapes stay static.
        fewer = b.constant(b.full_name("dropped"), np.array([count - stage.keep], np.int32))
        last = b.binary("Sub", stream.last, fewer, "last")
        if stage.keep == 0:
            hidden, cos, sin = (
                _without_image(b, x, profile.prefix_tokens, count, name) for x, name in _rows_of(stream)
            )
            return Selection(Stream(hidden, cos, sin, last), None, None)
        image = image_rows(b, stream.hidden, profile, count)
        scores = stage_scores(
            b, plan, number, profile, hidden=stream.hidden, image=image, last=stream.last, query=query, key=key,
            class_attention=class_attention,
        )  # fmt: skip
        indices = _select(b, plan, number, image, scores)
        # cos and sin are pruned with their rows, so a token that stays keeps the position that it had in the picture.
        hidden, cos, sin = (_gather(b, x, indices, profile.prefix_tokens, count, name) for x, name in _rows_of(stream))
        return Selection(Stream(hidden, cos, sin, last), indices, scores)


def _rows_of(stream: Stream) -> list[tuple[ir.Value, str]]:
    return [(stream.hidden, "hidden"), (stream.cos, "cos"), (stream.sin, "sin")]


def _without_image(b: GraphBuilder, x: ir.Value, start: int, count: int, name: str) -> ir.Value:
    """x [B,S,...] without the rows [start, start+count)."""
    parts = [b.slice(x, 1, 0, start, f"{name}_before")] if start else []
    parts.append(b.slice(x, 1, start + count, dims(x)[1], f"{name}_after"))
    return b.concat(parts, 1, name)


def _select(b: GraphBuilder, plan: PruningPlan, number: int, image: ir.Value, scores: ir.Value) -> ir.Value:
    """The BtpSelectTokens node: indices [B,keep] int32."""
    stage = plan.stages[number]
    inputs: list[ir.Value | None] = [scores]
    if stage.needs_similarity:
        inputs.append(stage_similarity(b, stage, image))
    seeds = stage_seeds(plan, number)
    if seeds is not None:
        inputs.append(b.constant(b.full_name("seeds"), seeds))
    return b.op(
        "BtpSelectTokens", inputs, "indices", shape=(dims(scores)[0], stage.keep), dtype=INT32, domain=BTP_DOMAIN,
        **stage.attributes, **PLUGIN,
    )  # fmt: skip


def _gather(b: GraphBuilder, x: ir.Value, indices: ir.Value, start: int, count: int, name: str) -> ir.Value:
    """The BtpGatherTokens node: x [B,S,...] -> [B,S-count+keep,...]."""
    shape = list(dims(x))
    shape[1] += dims(indices)[1] - count
    return b.op(
        "BtpGatherTokens", [x, indices], name, shape=shape, domain=BTP_DOMAIN, start=start, count=count, **PLUGIN
    )


def stage_after(plan: PruningPlan, segment: Segment) -> int | None:
    """Number of the stage that follows a segment, if it keeps any token."""
    following = [number for number, stage in enumerate(plan.stages) if stage.layer == segment.stop and stage.keep > 0]
    return following[0] if following else None


def segment_query(
    b: GraphBuilder, plan: PruningPlan, segment: Segment, profile: ShapeProfile, result: SegmentResult, last: ir.Value
) -> ir.Value:
    """The query rows the next stage looks from: [B,H,1,D] at `last`, or [B,H,T,D] after the image.

    The segment must be one that a stage follows (`stage_after`).
    """
    following = stage_after(plan, segment)
    assert following is not None
    with b.scope(names.segment_scope(segment.index)):
        if query_rows(plan, following) == "last":
            return last_query(b, result.query, last)
        start = profile.prefix_tokens + segment.image_tokens
        return b.slice(result.query, 2, start, start + profile.text_tokens, "text_query")
