"""`--assemble whole`: vision, segments, stages and head joined into one prefill graph."""

import onnx_ir as ir

from graphs import names
from graphs.building.decoder import SegmentResult, Stream, add_cache_outputs, add_head, add_segment
from graphs.building.graph_builder import BuiltGraph, GraphBuilder
from graphs.building.portable_bodies import embed_bodies
from graphs.building.selection import add_selection, segment_query, stage_after
from graphs.dtypes import Precision
from graphs.files.checkpoint import Checkpoint
from graphs.pruning.torch_scores import uses_attention
from graphs.records.match_plan import check_fits
from graphs.records.plan import PruningPlan
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import ModelSpec

INT32 = ir.DataType.INT32


def assemble_whole(
    vision: BuiltGraph,
    spec: ModelSpec,
    checkpoint: Checkpoint,
    plan: PruningPlan,
    profile: ShapeProfile,
    *,
    opset: int = 23,
    precision: Precision = "float32",
) -> BuiltGraph:
    """`prefill`: from pixel_values, prefix and text embeddings to logits and all caches; decode stays its own graph.

    `vision` must be made with the same batch, image size, opset and precision, and give class_attention if the plan
    scores by it.
    Raises InputError as build_decoder_graphs does.
    """
    check_fits(spec, plan, profile)
    b = GraphBuilder(names.WHOLE, opset=opset, precision=precision, checkpoint=checkpoint)
    stream, class_attention = _embedded(b, vision, spec, profile)
    lengths: dict[int, ir.Value] = {}
    chosen: dict[int, ir.Value] = {}
    caches: dict[int, tuple[ir.Value, ir.Value]] = {}
    query = key = None
    for segment in plan.segments():
        if segment.stage is not None:
            selection = add_selection(
                b, plan, segment.stage, profile, stream, query=query, key=key, class_attention=class_attention
            )
            stream = selection.stream
            if selection.indices is not None:
                chosen[segment.stage] = selection.indices
        lengths[segment.index] = stream.last
        result: SegmentResult = add_segment(b, spec.decoder, segment, stream)
        caches |= result.caches
        following = stage_after(plan, segment)
        if following is not None and uses_attention(plan, following):
            query = segment_query(b, plan, segment, profile, result, stream.last)
            key = result.caches[segment.stop - 1][0]
        stream = Stream(result.hidden, stream.cos, stream.sin, stream.last)
    logits = add_head(b, spec.decoder, stream.hidden, stream.last)
    embed_bodies(b)
    b.output(logits, "logits")
    add_cache_outputs(b, caches)
    for stage, indices in chosen.items():
        b.output(indices, names.indices(stage))
    for index, last in lengths.items():
        b.output(last, names.last(index))
    return b.build((0, plan.num_layers))


def _embedded(
    b: GraphBuilder, vision: BuiltGraph, spec: ModelSpec, profile: ShapeProfile
) -> tuple[Stream, ir.Value | None]:
    """The inputs, hidden [B,S,C] of prefix, image features and text one after another, and the class token's attention
    [B,V] if the vision graph gives it.
    """
    batch, width, half = profile.batch, spec.decoder.hidden_size, spec.decoder.head_dim // 2
    pixels = b.input("pixel_values", profile.pixel_input(spec.vision.channels), ir.DataType.FLOAT)
    prefix = [b.input("prefix", (batch, profile.prefix_tokens, width))] if profile.prefix_tokens else []
    text = b.input("text", (batch, profile.text_tokens, width))
    cos = b.input("cos", (batch, profile.total_tokens, half))
    sin = b.input("sin", (batch, profile.total_tokens, half))
    last = b.input("last", (batch,), INT32)
    features, *attention = b.splice(vision.model, [pixels], names.VISION)
    stream = Stream(b.concat([*prefix, features, text], 1, "embedded"), cos, sin, last)
    return stream, attention[0] if attention else None
