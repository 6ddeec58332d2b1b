"""Quotas, balance and the switches: against the plain implementation of the selection, and by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate.place.balance import Recipe, balance, pool_factor, stage_of
from calibrate.place.counts import Shape
from graphs.records.errors import InputError
from tests.graphs.ops import oracle

LLAVA = Shape("llava", 32, 576, (24, 24))
NEXT = Shape("llava_next", 32, 2928, (48, 48), ((24, 24), (48, 49)))


def test_balance_is_an_arithmetic_progression_to_one() -> None:
    assert balance(1) == (1.0,)
    assert balance(3, 0.6) == pytest.approx((0.6, 0.8, 1.0))  # the paper's for LLaVA-1.5
    assert balance(4, 0.4) == pytest.approx((0.4, 0.6, 0.8, 1.0))  # the paper's for Qwen2.5-VL


def test_pool_factors_are_the_released_ones() -> None:
    assert [pool_factor(share) for share in (0.1, 0.3, 0.9, 1.0)] == pytest.approx([3.7, 3.7, 1.5, 1.2])
    assert 1.5 < pool_factor(0.6) < 3.7


@given(st.integers(1, 3000), st.floats(0, 1), st.integers(0, 800), st.booleans(), st.data())
def test_quotas_fit_into_their_stage(keep: int, share: float, seeds: int, rebalance: bool, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(keep + 1, 4000))
    stage = stage_of(1, keep, share, tokens=tokens, seeds=seeds, rebalance=rebalance)
    assert stage.attention_quota + stage.diversity_quota + stage.seeds == keep
    assert abs(stage.attention_quota - share * keep) <= 0.5
    assert stage.attention_quota <= stage.pool <= tokens
    assert stage.seeds <= seeds


def test_spatial_set_and_boundary_are_like_the_released() -> None:
    first, second, *_ = Recipe().stages(LLAVA, (3, 6, 14, 22), (288, 144, 48, 0))
    assert (first.seeds, first.boundary, second.seeds, second.boundary) == (144, 288, 0, 144)


def test_a_picture_of_blocks_has_its_spatial_set_on_all_of_them() -> None:
    plan = Recipe().plan(NEXT, (3, 6, 14, 22), (1464, 732, 244, 0))
    assert plan.blocks == ((24, 24), (48, 49)) and plan.stages[0].seeds == 732
    from graphs.pruning.spatial_set import stage_seeds

    chosen = stage_seeds(plan, 0)
    assert chosen is not None and len(set(chosen.tolist())) == 732
    assert 50 < (chosen < 576).sum() < 400, "both views have a part of it"


def test_without_rebalance_the_best_are_kept_wherever_they_lie() -> None:
    scores = np.linspace(0, 1, 100, dtype=np.float32)  # late tokens are the best
    plain = stage_of(1, 20, 1.0, tokens=100, rebalance=False)
    assert oracle.select_stage(plain, scores, None) == list(range(80, 100))
    rebalanced = stage_of(1, 90, 1.0, tokens=100)
    assert 0 in oracle.select_stage(rebalanced, scores, None), "a wide pool reaches early tokens"
    assert 0 not in oracle.select_stage(stage_of(1, 90, 1.0, tokens=100, rebalance=False), scores, None)


def test_without_the_spatial_set_diversity_has_its_places() -> None:
    with_set, without = (Recipe(spatial=spatial).stages(LLAVA, (3,), (288,))[0] for spatial in (True, False))
    assert with_set.attention_quota == without.attention_quota == 288  # one stage: lambda is 1
    shares = (0.25, 1.0)
    with_set, without = (
        Recipe(spatial=spatial, balance=shares).stages(LLAVA, (3, 9), (288, 100))[0] for spatial in (True, False)
    )
    assert (with_set.seeds, with_set.diversity_quota) == (144, 72)
    assert (without.seeds, without.diversity_quota) == (0, 216)


def test_a_balance_for_other_stages_is_refused() -> None:
    with pytest.raises(InputError, match=r"--balance 0\.5,1 for 3 stages"):
        Recipe(balance=(0.5, 1.0)).stages(LLAVA, (3, 6, 14, 22), (288, 144, 48, 0))
