"""What a plan costs: operations in matrix products, and bytes of the caches.

One product of [m,k] and [k,n] is 2 m k n operations. With the letters of graphs/interfaces.md, I the width of the MLP
and S tokens in a layer, one layer of one sample takes

    projections   2 S C (H D + 2 K D) + 2 S H D C       query, key, value and output
    attention     2 S S H D + 2 S S H D                 scores and weighted values, the full square
    MLP           3 * 2 S C I                           gate, up and down

The square is counted whole, as torch's counter and publications do, so plans and their `flops_ratio` compare with
those. What is *needed* is less, as a token looks at itself and those before it: 2 S (S + 1) H D. Runtimes stop there
(ONNX Runtime's causal node, fused attention on GPUs), so limits on times are given as ratios of `Cost.needed` too:
where there is little else to compute, as in the demo, the squares would allow speed-ups (4.65 x) that skipped
operations cannot give (4.03 x).

Selection is the similarity product 2 V_i V_i C where a stage needs it, the importance scores 2 H D S_i for each query
row that a stage looks from, and 2 n V_i C for n pivots. The output projection is 2 C vocab for the one row it is
computed on. Norms, rotary rows, softmax and the greedy selection itself are left out: they are no matrix products and
are small beside them. Vision is no part of it, as pruning does not change it.
"""

from dataclasses import dataclass

from graphs import dtypes
from graphs.dtypes import Precision
from graphs.pruning.spatial_set import stage_pivots
from graphs.pruning.torch_scores import query_rows, uses_attention
from graphs.records.plan import PruningPlan, Segment
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import DecoderSpec


@dataclass(frozen=True)
class Cost:
    """Operations of one batch.

    segments: of each segment's prefill. selection: of each stage. head: the output projection after the prefill.
    needed: segments and head without what lies above the diagonals of attention.
    decode: one token through all layers, over caches of their whole static capacity.
    cache_bytes: of all key and value caches.
    """

    segments: tuple[int, ...]
    selection: tuple[int, ...]
    head: int
    needed: int
    decode: int
    cache_bytes: int

    @property
    def decoder(self) -> int:
        """Prefill without selection."""
        return sum(self.segments) + self.head

    @property
    def prefill(self) -> int:
        """Everything from the embedded sequence to the first logits."""
        return self.decoder + sum(self.selection)


def cost(decoder: DecoderSpec, plan: PruningPlan, profile: ShapeProfile, precision: Precision = "float32") -> Cost:
    """The cost of a plan on one profile, for its whole batch."""
    segments, batch = plan.segments(), profile.batch
    row = (
        2 * decoder.num_kv_heads * decoder.head_dim * dtypes.BY_NAME[precision].nbytes
    )  # a token's key and value in one layer
    rows = sum(_layers(segment) * profile.capacity_with(segment.image_tokens) for segment in segments)
    head = 2 * decoder.head_elements
    tokens = [(_layers(segment), profile.tokens_with(segment.image_tokens)) for segment in segments]
    return Cost(
        segments=tuple(batch * layers * layer(decoder, count) for layers, count in tokens),
        selection=tuple(batch * selection(decoder, plan, n, profile) for n in range(len(plan.stages))),
        head=batch * head,
        needed=batch * (head + sum(layers * needed(decoder, count) for layers, count in tokens)),
        # A new token looks at the cache and at itself.
        decode=batch
        * (head + sum(_layers(s) * layer(decoder, 1, profile.capacity_with(s.image_tokens) + 1) for s in segments)),
        cache_bytes=batch * row * rows,
    )


def layer(decoder: DecoderSpec, tokens: int, context: int | None = None) -> int:
    """One layer on `tokens` tokens that look at `context` tokens (the same ones if None), for one sample."""
    width = decoder.num_heads * decoder.head_dim
    attention = 2 * (2 * tokens * (tokens if context is None else context) * width)
    return 2 * tokens * decoder.layer_elements + attention


def needed(decoder: DecoderSpec, tokens: int) -> int:
    """One layer on `tokens` tokens that look at themselves and those before them, for one sample."""
    above = tokens * (tokens - 1) // 2
    return layer(decoder, tokens) - 2 * 2 * above * decoder.num_heads * decoder.head_dim


def selection(decoder: DecoderSpec, plan: PruningPlan, stage: int, profile: ShapeProfile) -> int:
    """One stage for one sample."""
    kept, tokens = plan.stages[stage], plan.tokens_before(stage)
    if kept.keep == 0:
        return 0
    partners = tokens if kept.needs_similarity else 0
    if plan.importance_of(stage) == "pivot-distance":
        partners += len(stage_pivots(plan, stage))
    rows = 0
    if uses_attention(plan, stage):
        rows = 1 if query_rows(plan, stage) == "last" else profile.text_tokens
    scores = 2 * rows * profile.tokens_with(tokens) * decoder.num_heads * decoder.head_dim
    return 2 * partners * tokens * decoder.hidden_size + scores


def _layers(segment: Segment) -> int:
    return segment.stop - segment.start
