"""From how many image tokens pruning pays on a device, from measured parts.

The time of one decoder layer on S tokens is taken as linear, tau(S) = a + b S, fitted by least squares over the
measured segments (the unpruned one among them if it was measured), each divided by its layers. With V image tokens, of
which segment i sees the share r_i, pruning then saves

    saved(V) = b V sum_i layers_i (1 - r_i)

and costs the measured time of its selections, C. It pays from V* = C / (b sum_i layers_i (1 - r_i)) image tokens on.

Few rows take a layer no less time than its weights take to be read: fewer tokens then save nothing. Where segments were
measured that the device's limits say are bound by memory, tau(S) = max(m, a + b S) with m the median of theirs per
layer and the line fitted to the others; V* is then the least V for which saved(V), the sum of tau's differences, is C.

Assumptions: the plan keeps the same shares for every V; the square of attention is left out, so above the measured
sizes more is saved than this says; the selections cost for fewer tokens what they cost for the measured number, though
they have less to do, so V* is rather too high than too low; steps in tau by the tiles of the kernels are smoothed.
Decoding, whose caches pruning makes shorter, is not part of V*: where the prefill alone loses, `after_new_tokens` says
after how many generated tokens decoding has made up for it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from btp_export.results.profile import BreakEven
from graphs.records.plan import PruningPlan
from graphs.records.shapes import ShapeProfile

Segments = Sequence[tuple[int, int, float]]  # layers, tokens, milliseconds


def break_even(
    plan: PruningPlan,
    profile: ShapeProfile,
    *,
    segments: Segments,
    full: Segments | None,
    select_ms: float,
    decode_ms: float,
    full_decode_ms: float | None,
    at_floor: Segments = (),
) -> BreakEven:
    """V*, and what pruning saves at the measured number of image tokens.

    `at_floor` are those of the segments that are bound by memory. `image_tokens` is None where it cannot be stated, and
    `reason` says why. `extrapolated` tells that V* lies outside the sizes that were measured, `fit_error` by how much
    of it a measured time is off the line at most.
    """
    result: dict[str, Any] = {"select_ms": select_ms}
    if full is not None and segments and full:
        saved = math.fsum(ms for *_, ms in full) - math.fsum(ms for *_, ms in segments) - select_ms
        result |= {"saved_ms": saved, "pays_here": saved > 0}
        if full_decode_ms is not None:
            result["after_new_tokens"] = _after(saved, full_decode_ms - decode_ms)
    return BreakEven(**result | _threshold(plan, profile, [*segments, *(full or ())], at_floor, select_ms))


def _threshold(
    plan: PruningPlan, profile: ShapeProfile, segments: Segments, at_floor: Segments, select_ms: float
) -> dict[str, Any]:
    """V* with its fit, or the reason why there is none."""
    points = [(tokens, ms / layers) for layers, tokens, ms in segments if layers]
    if not plan.stages:
        return {"reason": "the plan prunes nothing"}
    if len({tokens for tokens, _ in points}) < 2:
        return {"reason": "the prefill was not measured at two lengths: build --assemble segments --unpruned"}
    above = [point for point in points if point[0] not in {tokens for _, tokens, _ in at_floor}]
    floor = 0.0
    if at_floor and len({tokens for tokens, _ in above}) > 1:
        floor, points = float(np.median([ms / layers for layers, _, ms in at_floor])), above
    tokens, times = (np.array(values, np.float64) for values in zip(*points, strict=True))
    slope, base = np.polyfit(tokens, times, 1)
    error = float(np.max(np.abs(base + slope * tokens - times) / times))
    fit = {"ms_per_token_and_layer": float(slope), "fit_error": error}
    if slope <= 0:
        return fit | {"reason": "a layer takes no less time for fewer tokens in the measured range"}
    dropped = plan.num_layers * plan.compression  # sum_i layers_i (1 - r_i)
    threshold = select_ms / (float(slope) * dropped)
    if floor:
        fit["floor_ms_per_layer"] = floor
        threshold = _least_tokens(plan, profile, lambda rows: max(floor, base + slope * rows), select_ms, threshold)
    low = min(tokens) - profile.tokens_with(0)
    extrapolated = not bool(low <= threshold <= profile.image_tokens)
    return fit | {"image_tokens": math.ceil(threshold), "extrapolated": extrapolated}


def _least_tokens(
    plan: PruningPlan, profile: ShapeProfile, tau: Callable[[float], float], select_ms: float, least: float
) -> float:
    """The least V that saves `select_ms`, from the lower bound `least` on; saved(V) never falls."""
    text = profile.tokens_with(0)
    shares = [tokens / plan.image_tokens for tokens in plan.tokens_per_layer()]

    def saved(image: float) -> float:
        return math.fsum(tau(text + image) - tau(text + share * image) for share in shares)

    low, high = 0.0, max(least, 1.0)
    while saved(high) < select_ms:
        low, high = high, 2 * high
    while high - low > 0.25:
        middle = (low + high) / 2
        low, high = (low, middle) if saved(middle) >= select_ms else (middle, high)
    return high


def _after(saved: float, saved_each: float) -> int | None:
    """New tokens after which the whole answer is faster: 0 if the prefill is already, None if never."""
    if saved > 0:
        return 0
    return math.floor(-saved / saved_each) + 1 if saved_each > 0 else None
