"""Break-even where few rows take a layer no less time than reading its weights does: found by trying every V."""

import math

import pytest

from btp_export.profiling.break_even import Segments, break_even
from btp_export.results.profile import BreakEven
from graphs.records.plan import PruningPlan, Stage
from graphs.records.shapes import ShapeProfile

PLAN = PruningPlan(
    model_type="llava", num_layers=32, image_tokens=576, grid=(24, 24),
    stages=(Stage(layer=4, keep=288, pool=288, boundary=0, attention_quota=288),
            Stage(layer=12, keep=48, pool=48, boundary=0, attention_quota=48), Stage(layer=24, keep=0)),
)  # fmt: skip
PROFILE = ShapeProfile(
    name="one",
    batch=1,
    image_size=(336, 336),
    grid=(24, 24),
    image_tokens=576,
    prefix_tokens=35,
    text_tokens=64,
    new_tokens=8,
)
BASE, SLOPE = 0.1, 0.01


def tau(rows: float, floor: float) -> float:
    return max(floor, BASE + SLOPE * rows)


def times(plan: PruningPlan, floor: float) -> Segments:
    collected = []
    for segment in plan.segments():
        rows, layers = PROFILE.tokens_with(segment.image_tokens), segment.stop - segment.start
        collected.append((layers, rows, layers * tau(rows, floor)))
    return collected


def found(floor: float, select_ms: float) -> BreakEven:
    segments, full = times(PLAN, floor), times(PLAN.without_stages(), floor)
    low = [one for one in segments if BASE + SLOPE * one[1] < floor]
    return break_even(PLAN, PROFILE, segments=segments, full=full, select_ms=select_ms, decode_ms=1.0,
                      full_decode_ms=None, at_floor=low)  # fmt: skip


def by_trying(floor: float, select_ms: float) -> int:
    """The first V whose prefill, with the plan's shares, is faster by what selecting takes."""
    text = PROFILE.tokens_with(0)
    for image in range(1, 100_000):
        rows = [text + image * tokens / 576 for tokens in PLAN.tokens_per_layer()]
        if 32 * tau(text + image, floor) - math.fsum(tau(row, floor) for row in rows) >= select_ms:
            return image
    raise AssertionError


@pytest.mark.parametrize("floor", [0.0, 1.5, 3.0])
@pytest.mark.parametrize("select_ms", [0.5, 5.0, 40.0])
def test_it_is_the_first_number_of_tokens_that_pays(floor: float, select_ms: float) -> None:
    even = found(floor, select_ms)
    assert even.image_tokens == pytest.approx(by_trying(floor, select_ms), abs=1)
    assert even.floor_ms_per_layer == (pytest.approx(floor) if floor else None)
    assert even.ms_per_token_and_layer == pytest.approx(SLOPE)


def test_below_the_corner_pruning_saves_nothing() -> None:
    """576 tokens take less than the weights: only more of them pay."""
    straight, corner = found(0.0, 0.5), found(3.0, 0.5)
    assert straight.image_tokens is not None and corner.image_tokens is not None
    assert straight.image_tokens < 20
    assert corner.image_tokens > (3.0 - BASE) / SLOPE - PROFILE.tokens_with(0)
