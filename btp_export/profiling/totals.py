"""Sums and comparisons of profiled parts: by kind, pruned against unpruned, baked against shared weights."""

import math
from collections.abc import Sequence
from typing import Final, get_args

from btp_export.profiling.break_even import Segments, break_even
from btp_export.results.profile import (
    BreakEven,
    ByWeights,
    Faster,
    Kind,
    Profile,
    ProfiledPart,
    Speedup,
    Totals,
    WeightsComparison,
    WeightsMs,
)
from engines.tensorrt.records import EngineWeights
from graphs.records.plan import PruningPlan
from graphs.records.shapes import ShapeProfile

SAME: Final = ("tensorrt", "profile", "assemble", "precision")  # what two profiles that compare have in common


def totals(parts: Sequence[ProfiledPart]) -> Totals:
    """Milliseconds by kind. `prefill_ms` are the decoder's segments; `first_token_ms` is all but decoding."""
    sums = {kind: _sum(parts, kind) for kind in get_args(Kind)}
    chain = sums["prefill"] + sums["select"] + sums["head"]
    if any(part.kind == "whole" for part in parts):
        return Totals(
            vision_ms=None,
            prefill_ms=None,
            select_ms=None,
            head_ms=None,
            select_share=None,
            first_token_ms=sums["whole"],
            decode_ms=sums["decode"],
        )
    return Totals(
        vision_ms=sums["vision"],
        prefill_ms=sums["prefill"],
        select_ms=sums["select"],
        head_ms=sums["head"],
        select_share=sums["select"] / chain if chain else None,
        first_token_ms=sums["vision"] + chain,
        decode_ms=sums["decode"],
    )


def speedup(pruned: Sequence[ProfiledPart], full: Sequence[ProfiledPart] | None) -> Speedup | None:
    """How many times faster than without pruning; `prefill` counts selection and head, and not vision."""
    if full is None:
        return None
    pruned_totals, full_totals = totals(pruned), totals(full)
    return Speedup(
        prefill=_ratio(_chain_ms(full_totals), _chain_ms(pruned_totals)),
        first_token=_ratio(full_totals.first_token_ms, pruned_totals.first_token_ms),
        decode=_ratio(full_totals.decode_ms, pruned_totals.decode_ms),
    )


def break_even_of(
    plan: PruningPlan,
    profile: ShapeProfile,
    pruned: Sequence[ProfiledPart],
    full: Sequence[ProfiledPart] | None,
) -> BreakEven:
    """From how many image tokens pruning pays, see btp_export/profiling/break_even.py."""
    return break_even(
        plan,
        profile,
        segments=_segments(pruned),
        full=None if full is None else _segments(full),
        select_ms=_sum(pruned, "select"),
        decode_ms=_sum(pruned, "decode"),
        full_decode_ms=None if full is None else _sum(full, "decode"),
        at_floor=_segments([part for part in (*pruned, *(full or ())) if part.bound == "memory"]),
    )


def compared(document: Profile, earlier: Profile | None, *, takes: EngineWeights) -> WeightsComparison | None:
    """Baked against shared weights, if the other kind was profiled before with the same shapes and version.

    `takes` is what the target's file chooses.
    """
    if earlier is None or any(getattr(earlier, key) != getattr(document, key) for key in SAME):
        return None
    baked, shared = (document, earlier) if document.weights == "baked" else (earlier, document)
    baked_ms, shared_ms = ({part.name: part.ms for part in profile.parts} for profile in (baked, shared))
    first = ByWeights(baked=baked.totals.first_token_ms, shared=shared.totals.first_token_ms)
    decode = ByWeights(baked=baked.totals.decode_ms, shared=shared.totals.decode_ms)
    return WeightsComparison(
        parts=tuple(
            WeightsMs(name=part.name, baked_ms=baked_ms[part.name], shared_ms=shared_ms[part.name])
            for part in document.parts
            if part.name in baked_ms and part.name in shared_ms
        ),
        first_token_ms=first,
        decode_ms=decode,
        faster=Faster(first_token=_faster(first), decode=_faster(decode)),
        target_takes=takes,
        same_system=earlier.system == document.system,
    )


def _faster(times: ByWeights) -> EngineWeights:
    return "baked" if times.baked <= times.shared else "shared"


def _sum(parts: Sequence[ProfiledPart], kind: Kind) -> float:
    return math.fsum(part.ms for part in parts if part.kind == kind)


def _chain_ms(sums: Totals) -> float | None:
    parts = [ms for ms in (sums.prefill_ms, sums.select_ms, sums.head_ms) if ms is not None]
    return math.fsum(parts) if len(parts) == 3 else None


def _ratio(full: float | None, pruned: float | None) -> float | None:
    return None if full is None or not pruned else full / pruned


def _segments(parts: Sequence[ProfiledPart]) -> Segments:
    return [
        (part.layers[1] - part.layers[0], part.tokens, part.ms)
        for part in parts
        if part.kind == "prefill" and part.layers is not None
    ]
