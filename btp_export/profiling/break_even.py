"""From how many image tokens pruning pays on a device, from measured parts.

The time of one decoder layer on S tokens is tau(S) = max(w, a + b S), fitted over the measured segments (layer_fit.py;
the unpruned one among them if it was measured), each divided by its layers. With V image tokens among S0 others, of
which segment i sees the share r_i, pruning saves

    saved(V) = sum_i layers_i (tau(S0 + V) - tau(S0 + r_i V))

and costs the measured time of its selections, C. It pays from the first V* with saved(V*) >= C on. saved(V) never falls
as V grows, because tau is convex, so V* is found by halving.

Assumptions: the plan keeps the same shares for every V; the square of attention is left out, so above the measured
sizes more is saved than this says; the selections cost for fewer tokens what they cost for the measured number, though
they have less to do, so V* is rather too high than too low; steps in tau by the tiles of the kernels are smoothed.
Decoding, whose caches pruning makes shorter, is not part of V*: where the prefill alone loses, `after_new_tokens` says
after how many generated tokens decoding has made up for it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from btp_export.profiling.layer_fit import LayerFit, fit_layer
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
    of it a measured time is off the fit at most.
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
    points = [(tokens, ms / layers) for layers, tokens, ms in segments if layers and ms > 0]
    if not plan.stages:
        return {"reason": "the plan prunes nothing"}
    if len({tokens for tokens, _ in points}) < 2:
        return {"reason": "the prefill was not measured at two lengths: build --assemble segments --unpruned"}
    fit = fit_layer(points, {tokens for _, tokens, _ in at_floor})
    found: dict[str, Any] = {
        "ms_per_token_and_layer": fit.slope,
        "floor_ms_per_layer": fit.flat,
        "corner_tokens": fit.corner,
        "fit_error": fit.error,
    }
    if not fit.slope:
        return found | {"reason": "a layer takes no less time for fewer tokens in the measured range"}
    threshold = _first(lambda tokens: _saved(plan, profile, fit, tokens) >= select_ms)
    low = min(tokens for tokens, _ in points) - profile.tokens_with(0)
    extrapolated = not low <= threshold <= profile.image_tokens
    return found | {"image_tokens": threshold, "extrapolated": extrapolated}


def _saved(plan: PruningPlan, profile: ShapeProfile, fit: LayerFit, image_tokens: int) -> float:
    """Milliseconds that a prefill of so many image tokens takes less with the plan, without its selections."""
    others, share = profile.tokens_with(0), image_tokens / plan.image_tokens
    whole = fit.ms(others + image_tokens)
    return math.fsum(whole - fit.ms(others + kept * share) for kept in plan.tokens_per_layer())


def _first(holds: Callable[[int], bool]) -> int:
    """The least positive number for which `holds` is true; it is for all above it."""
    high = 1
    while not holds(high):
        high *= 2
    low = high // 2  # does not hold, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _after(saved: float, saved_each: float) -> int | None:
    """New tokens after which the whole answer is faster: 0 if the prefill is already, None if never."""
    if saved > 0:
        return 0
    return math.floor(-saved / saved_each) + 1 if saved_each > 0 else None
