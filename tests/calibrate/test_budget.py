"""Counts, quotas and balance."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.budget import EXPONENTS, Shape, balance, balanced_stages, counts_for, pool_factor, refitted, stage_of
from calibrate.presets import PRESETS, preset
from graphs.errors import InputError

LLAVA = Shape("llava", 32, 576, (24, 24))


def test_the_released_counts_come_out_of_their_own_average() -> None:
    counts = counts_for((3, 6, 14), EXPONENTS, budget=129 * 32, num_layers=32, image_tokens=576, final=22)
    assert counts == (288, 144, 48)


def test_balance_is_an_arithmetic_progression_to_one() -> None:
    assert balance(1) == (1.0,)
    assert balance(3, 0.6) == pytest.approx((0.6, 0.8, 1.0))  # the paper's for LLaVA-1.5
    assert balance(4, 0.4) == pytest.approx((0.4, 0.6, 0.8, 1.0))  # the paper's for Qwen2.5-VL


def test_pool_factors_are_the_released_ones() -> None:
    assert [pool_factor(share) for share in (0.1, 0.3, 0.9, 1.0)] == pytest.approx([3.7, 3.7, 1.5, 1.2])
    assert 1.5 < pool_factor(0.6) < 3.7


@given(st.integers(1, 3000), st.floats(0, 1), st.integers(0, 800), st.data())
def test_quotas_fit_into_their_stage(keep: int, share: float, seeds: int, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(keep + 1, 4000))
    stage = stage_of(1, keep, share, tokens=tokens, seeds=seeds)
    assert stage.attention_quota + stage.diversity_quota + stage.seeds == keep
    assert abs(stage.attention_quota - share * keep) <= 0.5
    assert stage.attention_quota <= stage.pool <= tokens
    assert stage.seeds <= seeds


def test_spatial_set_and_boundary_are_like_the_released() -> None:
    first, second, *_ = balanced_stages((3, 6, 14, 22), (288, 144, 48, 0), LLAVA)
    assert (first.seeds, first.boundary, second.seeds, second.boundary) == (144, 288, 0, 144)


@given(st.floats(0.55, 0.9))
def test_another_budget_at_the_same_layers(compression: float) -> None:
    plan = LLAVA.plan(balanced_stages((3, 6, 14, 22), (288, 144, 48, 0), LLAVA))
    other = refitted(plan, compression)
    assert [stage.layer for stage in other.stages] == [3, 6, 14, 22]
    assert compression <= other.compression < compression + 1 / 576
    assert refitted(plan, plan.compression) is plan


def test_a_budget_that_the_layers_cannot_meet_is_refused() -> None:
    plan = LLAVA.plan(balanced_stages((3, 6, 14, 22), (288, 144, 48, 0), LLAVA))
    with pytest.raises(InputError, match="cannot be met"):
        refitted(plan, 0.93)


# Presets


def make(name: str, shape: Shape = LLAVA, **budget: float):
    return preset(
        name, model_type=shape.model_type, num_layers=shape.num_layers, image_tokens=shape.image_tokens,
        grid=shape.grid, **budget,
    )  # fmt: skip


def test_btp_paper_is_the_released_settings() -> None:
    plan = make("btp-paper")
    rows = [(s.layer, s.keep, s.attention_quota, s.pool, s.boundary, s.diversity_quota, s.seeds) for s in plan.stages]
    assert rows == [
        (3, 288, 86, 318, 288, 86, 144),
        (6, 144, 129, 193, 144, 14, 0),
        (14, 48, 48, 57, 48, 0, 0),
        (22, 0, 0, 0, 0, 0, 0),
    ]
    assert plan.average_tokens == 129.0
    assert plan.compression == pytest.approx(0.776, abs=1e-3)


def test_btp_paper_for_qwen2_5_vl_is_its_own() -> None:
    plan = make("btp-paper", Shape("qwen2_5_vl", 28, 1296, (36, 36)))
    assert [(s.layer, s.keep) for s in plan.stages] == [(3, 648), (6, 324), (15, 162), (22, 0)]
    assert [s.attention_quota for s in plan.stages] == [64, 129, 162, 0]
    assert plan.average_tokens / 1296 == pytest.approx(0.272, abs=0.001)  # 27.2 % in the paper


@pytest.mark.parametrize("name", PRESETS)
@settings(deadline=None)
@given(layers=st.integers(2, 60), side=st.integers(2, 40), extra=st.integers(0, 30), share=st.floats(0.1, 0.9))
def test_every_preset_is_a_plan_for_every_model(name: str, layers: int, side: int, extra: int, share: float) -> None:
    shape = Shape("llava", layers, side * side + extra, (side, side))
    assert make(name, shape).num_layers == layers
    try:
        plan = make(name, shape, average_tokens=share * shape.image_tokens)
    except InputError:
        assert share * layers < 3 or shape.image_tokens < 100, "only tiny shapes have budgets out of reach"
        return
    if name in ("none", "vtw"):
        return
    assert plan.average_tokens <= share * shape.image_tokens + 1e-6 or plan.stages[0].keep == 1
    most = 0.5 if name == "btp-paper" else 0.9  # the layer that drops all is fixed: it cannot see more than that
    if shape.image_tokens >= 400 and 4 / layers < share <= most:
        assert plan.average_tokens >= 0.97 * share * shape.image_tokens


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"none", "vtw"}))
def test_equal_average_tokens_within_one_percent(name: str) -> None:
    for shape in (LLAVA, Shape("llava", 12, 576, (24, 24)), Shape("qwen2_5_vl", 28, 1296, (36, 36))):
        wanted = 0.22 * shape.image_tokens
        assert make(name, shape, average_tokens=wanted).average_tokens == pytest.approx(wanted, rel=0.01)


def test_unknown_presets_and_two_budgets_are_refused() -> None:
    with pytest.raises(InputError, match="pyramiddrop"):
        make("pyramid")
    with pytest.raises(InputError):
        make("fastv", average_tokens=100, compression=0.5)
    with pytest.raises(InputError):
        make("fastv", compression=1.0)
