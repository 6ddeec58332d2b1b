"""Candidates for a budget: compression, share of the cost, given layers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.place.balance import Recipe
from calibrate.place.candidates import Budget, Evidence, Request, largest_within, propose
from calibrate.place.cost import PrefillCost
from calibrate.place.counts import Shape
from calibrate.place.stages import Placement
from graphs.records.errors import InputError
from tests.calibrate.place.test_cost import DECODER, PROFILE, SHAPE

COST = PrefillCost(DECODER, PROFILE)
COUNTS = np.array([10, 20, 300, 250, 60, 30, 10, 5, 0, 0, 0, 0], dtype=float)
DIVERGENCE = np.array([3, 3, 2, 1, 0.5, 0.3, 0.15, 0.05, 0.01, 0, 0, 0], dtype=float)
EVIDENCE = Evidence(COUNTS, DIVERGENCE)


@settings(deadline=None, max_examples=40)
@given(st.floats(0.15, 0.9))
def test_a_share_is_met_and_nearly_used(share: float) -> None:
    """Unless the last stage comes so early that no counts use all of it."""
    for candidate in propose(EVIDENCE, SHAPE, Request(Budget(share=share)), COST, limit=2):
        result = COST.share(candidate.plan)
        assert result <= share + 1e-9
        most = candidate.plan.stages[-1].layer / 12
        assert result > share - 0.02 or result > 0.9 * most


def test_a_share_of_measured_time_needs_fewer_tokens() -> None:
    """What a prefill takes whatever its length cannot be saved, so that the tokens have to go instead."""
    slow = PrefillCost(DECODER, PROFILE, fixed=0.1 * COST.of(SHAPE.plan(())), unit="milliseconds")
    request = Request(Budget(share=0.4))
    counted, measured = (propose(EVIDENCE, SHAPE, request, cost)[0].plan for cost in (COST, slow))
    assert measured.average_tokens < counted.average_tokens


def test_a_share_out_of_reach_names_the_least() -> None:
    with pytest.raises(InputError, match=r"--latency-share 0\.02: the least found is 0\.1"):
        propose(EVIDENCE, SHAPE, Request(Budget(share=0.02)), COST)


def test_given_layers_get_counts_for_the_budget() -> None:
    request = Request(Budget(compression=0.7), layers=(2, 4, 8))
    candidates = propose(EVIDENCE, SHAPE, request)
    assert len(candidates) == 2, "counts that fall, and flat ones"
    for candidate in candidates:
        assert [stage.layer for stage in candidate.plan.stages] == [2, 4, 8]
        assert 0.7 <= candidate.plan.compression < 0.7 + 1 / 576


def test_given_layers_and_counts_are_the_plan() -> None:
    request = Request(Budget(keep=(300, 30)), layers=(2, 9))
    (candidate,) = propose(EVIDENCE, SHAPE, request)
    assert [(stage.layer, stage.keep) for stage in candidate.plan.stages] == [(2, 300), (9, 30)]


@pytest.mark.parametrize("shares", [(0.5,), (0.2, 0.9), (0.1, 0.4, 0.7, 1.0)])
def test_a_given_balance_decides_how_many_stages_there_are(shares: tuple[float, ...]) -> None:
    for candidate in propose(EVIDENCE, SHAPE, Request(Budget(compression=0.5), recipe=Recipe(balance=shares))):
        keeping = [stage for stage in candidate.plan.stages if stage.keep]
        assert [stage.attention_quota / stage.keep for stage in keeping] == pytest.approx(list(shares), abs=0.05)


@settings(deadline=None, max_examples=40)
@given(st.floats(0.2, 0.8), st.tuples(st.integers(2, 500), st.integers(2, 500), st.integers(2, 500)))
def test_the_largest_counts_within_a_cost(share: float, keeps: tuple[int, int, int]) -> None:
    """One token more in every stage would cost too much."""
    falling = sorted({*keeps}, reverse=True)
    placement = Placement((2, 5, 7)[: len(falling)], tuple(falling), 0.0)
    ceiling = share * COST.of(SHAPE.plan(()))
    result = largest_within(placement, SHAPE, Recipe(), COST, ceiling)
    if result is None:
        assert share < 0.35
        return
    assert COST.of(Recipe().plan(SHAPE, result.layers, result.keeps)) <= ceiling
    more = tuple(min(keep + 2, 575 - n) for n, keep in enumerate(result.keeps))
    assert result.keeps[0] > 570 or COST.of(Recipe().plan(SHAPE, result.layers, more)) > ceiling


def test_shapes_of_blocks_have_candidates_too() -> None:
    shape = Shape("llava_next", 12, 1752, (24, 48), ((24, 24), (24, 49)))
    for candidate in propose(EVIDENCE, shape, Request()):
        assert candidate.plan.blocks == shape.blocks and candidate.plan.compression >= 0.78
