"""max(w, b S) from measured times with noise: both sides, one side alone, and what follows for break-even."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from btp_export.profiling.break_even import break_even
from btp_export.profiling.layer_fit import fit_layer
from graphs.records.plan import Stage
from graphs.records.shapes import ShapeProfile
from tests.plans import tiny_plan

PROFILE = ShapeProfile(
    name="p", image_size=(56, 56), grid=(6, 6), prefix_tokens=5, image_tokens=36, text_tokens=16, new_tokens=4
)

FLAT, SLOPE = 0.6, 0.003  # milliseconds; the corner is at 200 tokens
BELOW, ABOVE = (40, 90, 150), (260, 400, 640)


def times(sizes: Sequence[int], *, noise: float, seed: int) -> list[tuple[int, float]]:
    """A layer's times at these sizes, each measured twice, wrong by a normal error of that standard deviation."""
    errors = 1 + noise * np.random.default_rng(seed).standard_normal(2 * len(sizes))
    return [(size, max(FLAT, SLOPE * size) * float(e)) for size, e in zip([*sizes, *sizes], errors, strict=True)]


@pytest.mark.parametrize(("noise", "seed"), list(itertools.product([0.0, 0.01, 0.03], range(5))))
def test_both_sides(noise: float, seed: int) -> None:
    fit = fit_layer(times(BELOW + ABOVE, noise=noise, seed=seed))
    assert fit.flat == pytest.approx(FLAT, rel=1e-9 + 2 * noise) and fit.slope and fit.corner is not None
    for size in (*BELOW, *ABOVE):
        assert fit.ms(size) == pytest.approx(max(FLAT, SLOPE * size), rel=1e-9 + 3 * noise)
    assert 150 < fit.corner < 260 and fit.error <= 5 * noise + 1e-9


@pytest.mark.parametrize(("noise", "seed"), list(itertools.product([0.0, 0.01], range(5))))
def test_one_side_alone_makes_no_corner(noise: float, seed: int) -> None:
    rising = fit_layer(times(ABOVE, noise=noise, seed=seed))
    assert rising.flat is None and rising.corner is None
    for size in ABOVE:
        assert rising.ms(size) == pytest.approx(SLOPE * size, rel=1e-9 + 3 * noise)
    flat = fit_layer(times(BELOW, noise=noise, seed=seed))
    assert flat.slope is None and flat.flat == pytest.approx(FLAT, rel=1e-9 + 2 * noise)


def test_a_straight_line_would_be_far_off() -> None:
    """Between the measured sizes: the line through both sides against the fit."""
    points = times((40, 400), noise=0.0, seed=0)
    fit = fit_layer(points)
    line = np.polyfit(*map(np.array, zip(*points, strict=True)), 1)
    assert abs(np.polyval(line, 200) / FLAT - 1) > 0.3
    assert fit.ms(40) == pytest.approx(FLAT) and fit.ms(400) == pytest.approx(1.2)


PLAN = tiny_plan(Stage(layer=2, keep=12, attention_quota=6, pool=12, boundary=12), Stage(layer=4, keep=0))


def test_break_even_is_where_the_saving_pays_the_selection() -> None:
    """Against trying every number of image tokens, on both sides of the corner."""
    others = PROFILE.tokens_with(0)

    def tau(tokens: float) -> float:
        return max(0.1, 0.002 * tokens)  # the corner is at 50 tokens

    def saved(image_tokens: int) -> float:
        kept = [image_tokens * count / PLAN.image_tokens for count in PLAN.tokens_per_layer()]
        return sum(tau(others + image_tokens) - tau(others + count) for count in kept)

    sizes = (20, 40, 80, 160)
    for select_ms in (0.01, 0.05, 0.3, 2.0):
        found = break_even(
            PLAN, PROFILE, segments=[(3, size, 3 * tau(size)) for size in sizes], full=None,
            select_ms=select_ms, decode_ms=1.0, full_decode_ms=None,
        )  # fmt: skip
        assert found.image_tokens == next(tokens for tokens in itertools.count(1) if saved(tokens) >= select_ms)
        assert found.floor_ms_per_layer == pytest.approx(0.1) and found.corner_tokens == pytest.approx(50)


def test_where_only_one_side_was_measured() -> None:
    common = {"full": None, "select_ms": 0.2, "decode_ms": 1.0, "full_decode_ms": None}
    flat = break_even(PLAN, PROFILE, segments=[(2, 40, 1.2), (2, 80, 1.2)], **common)  # type: ignore[arg-type]
    assert flat.image_tokens is None and "no less time" in (flat.reason or "")
    assert (flat.floor_ms_per_layer, flat.corner_tokens) == (pytest.approx(0.6), None)
    rising = break_even(PLAN, PROFILE, segments=[(2, 40, 0.16), (2, 80, 0.32)], **common)  # type: ignore[arg-type]
    assert rising.floor_ms_per_layer is None and rising.image_tokens is not None
