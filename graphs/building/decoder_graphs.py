"""All decoder graphs of one plan and one shape profile, in the order they run (names: graphs/interfaces.md)."""

import onnx_ir as ir

from graphs import names
from graphs.building.decoder import Stream, add_cache_outputs, add_decode, add_head, add_segment
from graphs.building.graph_builder import BuiltGraph, GraphBuilder, serialize
from graphs.building.portable_bodies import embed_bodies
from graphs.building.selection import add_selection, segment_query, stage_after
from graphs.building.whole_graph import assemble_whole
from graphs.dtypes import Precision
from graphs.files.checkpoint import Checkpoint
from graphs.pruning.torch_scores import query_rows, uses_attention
from graphs.records.match_plan import check_fits
from graphs.records.plan import PruningPlan, Segment
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import ModelSpec

__all__ = ["BuiltGraph", "assemble_whole", "build_decoder_graphs", "serialize"]

INT32 = ir.DataType.INT32


def build_decoder_graphs(
    spec: ModelSpec,
    checkpoint: Checkpoint,
    plan: PruningPlan,
    profile: ShapeProfile,
    *,
    opset: int = 23,
    precision: Precision = "float32",
) -> list[BuiltGraph]:
    """prefill_0, select_0, prefill_1, ..., head, decode. No weight is read or copied.

    Raises InputError if plan, profile and model do not belong together, or the checkpoint does not fit the spec.
    """
    check_fits(spec, plan, profile)

    def builder(name: str) -> GraphBuilder:
        return GraphBuilder(name, opset=opset, precision=precision, checkpoint=checkpoint)

    graphs: list[BuiltGraph] = []
    for segment in plan.segments():
        if segment.stage is not None:
            graphs.append(_select_graph(builder(names.select(segment.stage)), spec, plan, segment.stage, profile))
        graphs.append(_segment_graph(builder(names.prefill(segment.index)), spec, plan, segment, profile))
    graphs.append(_head_graph(builder(names.HEAD), spec, plan, profile))
    decode = builder(names.DECODE)
    add_decode(decode, spec.decoder, plan, profile)
    embed_bodies(decode)
    return [*graphs, decode.build()]


def stream_inputs(b: GraphBuilder, spec: ModelSpec, profile: ShapeProfile, image_tokens: int) -> Stream:
    """hidden, cos, sin and last as graph inputs for a sequence with that many image tokens."""
    batch, tokens, half = profile.batch, profile.tokens_with(image_tokens), spec.decoder.head_dim // 2
    return Stream(
        b.input("hidden", (batch, tokens, spec.decoder.hidden_size)),
        b.input("cos", (batch, tokens, half)),
        b.input("sin", (batch, tokens, half)),
        b.input("last", (batch,), INT32),
    )


def _segment_graph(
    b: GraphBuilder, spec: ModelSpec, plan: PruningPlan, segment: Segment, profile: ShapeProfile
) -> BuiltGraph:
    stream = stream_inputs(b, spec, profile, segment.image_tokens)
    result = add_segment(b, spec.decoder, segment, stream)
    query = None
    if stage_after(plan, segment) is not None:
        query = segment_query(b, plan, segment, profile, result, stream.last)
    embed_bodies(b)
    b.output(result.hidden, "hidden_out")
    add_cache_outputs(b, result.caches)
    if query is not None:
        b.output(query, "query")
    return b.build((segment.start, segment.stop))


def _select_graph(
    b: GraphBuilder, spec: ModelSpec, plan: PruningPlan, number: int, profile: ShapeProfile
) -> BuiltGraph:
    image_tokens = plan.tokens_before(number)
    stream = stream_inputs(b, spec, profile, image_tokens)
    query = key = None
    if uses_attention(plan, number):
        d = spec.decoder
        rows = 1 if query_rows(plan, number) == "last" else profile.text_tokens
        query = b.input("query", (profile.batch, d.num_heads, rows, d.head_dim))
        key = b.input("key", (profile.batch, d.num_kv_heads, profile.tokens_with(image_tokens), d.head_dim))
    attention = _class_attention(b, plan, number, profile)
    selection = add_selection(b, plan, number, profile, stream, query=query, key=key, class_attention=attention)
    embed_bodies(b)
    b.output(selection.stream.hidden, "hidden_out")
    b.output(selection.stream.cos, "cos_out")
    b.output(selection.stream.sin, "sin_out")
    b.output(selection.stream.last, "last_out")
    if selection.indices is not None and selection.scores is not None:
        b.output(selection.indices, "indices")
        b.output(selection.scores, "scores")
    return b.build()


def _class_attention(b: GraphBuilder, plan: PruningPlan, number: int, profile: ShapeProfile) -> ir.Value | None:
    """class_attention [B,V] as an input of stage `number`, if it scores by it."""
    if not plan.uses_class_attention(number):
        return None
    return b.input(names.CLASS_ATTENTION, (profile.batch, profile.image_tokens), ir.DataType.FLOAT)


def _head_graph(b: GraphBuilder, spec: ModelSpec, plan: PruningPlan, profile: ShapeProfile) -> BuiltGraph:
    tokens = profile.tokens_with(plan.segments()[-1].image_tokens)
    hidden = b.input("hidden", (profile.batch, tokens, spec.decoder.hidden_size))
    last = b.input("last", (profile.batch,), INT32)
    logits = add_head(b, spec.decoder, hidden, last)
    embed_bodies(b)
    b.output(logits, "logits")
    return b.build()
