"""Counts, quotas and balance."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btp_export.families import family_for
from calibrate.place.balance import Recipe
from calibrate.place.counts import EXPONENTS, Shape, counts_for, refitted
from calibrate.place.presets import PRESETS, preset
from calibrate.place.stages import placements
from graphs.records.errors import InputError

LLAVA = Shape("llava", 32, 576, (24, 24), class_token=True)


def test_the_released_counts_come_out_of_their_own_average() -> None:
    counts = counts_for((3, 6, 14), EXPONENTS, budget=129 * 32, num_layers=32, image_tokens=576, final=22)
    assert counts == (288, 144, 48)


@given(st.floats(0.55, 0.9))
def test_another_budget_at_the_same_layers(compression: float) -> None:
    plan = LLAVA.plan(Recipe().stages(LLAVA, (3, 6, 14, 22), (288, 144, 48, 0)))
    other = refitted(plan, compression)
    assert [stage.layer for stage in other.stages] == [3, 6, 14, 22]
    assert compression <= other.compression < compression + 1 / 576
    assert refitted(plan, plan.compression) is plan


def test_a_budget_that_the_layers_cannot_meet_is_refused() -> None:
    plan = LLAVA.plan(Recipe().stages(LLAVA, (3, 6, 14, 22), (288, 144, 48, 0)))
    with pytest.raises(InputError, match="cannot be met"):
        refitted(plan, 0.93)


# Presets


def make(name: str, shape: Shape = LLAVA, **budget: float):
    return preset(
        name, model_type=shape.model_type, num_layers=shape.num_layers, image_tokens=shape.image_tokens,
        grid=shape.grid, blocks=shape.blocks, released=family_for({"model_type": shape.model_type}).released,
        class_token=shape.class_token, **budget,
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
    shape = Shape("llava", layers, side * side + extra, (side, side), class_token=True)
    assert make(name, shape).num_layers == layers
    try:
        plan = make(name, shape, compression=1 - share)
    except InputError:
        assert share * layers < 3 or shape.image_tokens < 100, "only tiny shapes have budgets out of reach"
        return
    if name == "none":
        return
    assert plan.average_tokens <= share * shape.image_tokens + 1e-6 or plan.stages[0].keep == 1
    most = 0.5 if name == "btp-paper" else 0.9  # the layer that drops all is fixed: it cannot see more than that
    if shape.image_tokens >= 400 and 4 / layers < share <= most:
        assert plan.average_tokens >= 0.97 * share * shape.image_tokens


# The demo, LLaVA-1.5 7B and 13B, LLaVA-1.6 at three picture shapes, Qwen2.5-VL at two.
SHAPES = [
    Shape("llava", 12, 576, (24, 24), class_token=True),
    LLAVA,
    Shape("llava", 40, 576, (24, 24), class_token=True),
    Shape("llava_next", 32, 2928, (48, 48), ((24, 24), (48, 49)), class_token=True),
    Shape("llava_next", 32, 1752, (24, 48), ((24, 24), (24, 49)), class_token=True),
    Shape("llava_next", 32, 2144, (32, 48), ((24, 24), (32, 49)), class_token=True),
    Shape("qwen2_5_vl", 28, 1296, (36, 36)),
    Shape("qwen2_5_vl", 28, 576, (24, 24)),
]


@pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda shape: f"{shape.model_type}-{shape.num_layers}-{shape.image_tokens}"
)
@pytest.mark.parametrize("compression", [0.78, 0.89])
def test_every_method_has_equal_average_tokens_within_one_percent(shape: Shape, compression: float) -> None:
    """All of them at the average of the calibrated plan, which is within 1 % of what was asked for itself."""
    counts = np.full(shape.num_layers, 100.0)
    placed, *_ = placements(counts, round(0.6 * shape.num_layers), shape, compression)
    own = Recipe().plan(shape, placed.layers, placed.keeps)
    assert own.average_tokens == pytest.approx((1 - compression) * shape.image_tokens, rel=0.01)
    for name in sorted(set(PRESETS) - {"none"} - (set() if shape.class_token else {"visionzip-select"})):
        result = make(name, shape, average_tokens=own.average_tokens).average_tokens
        assert result == pytest.approx(own.average_tokens, rel=0.01), name


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"none"}))
@settings(deadline=None)
@given(layers=st.integers(12, 60), tokens=st.integers(100, 4000), share=st.floats(0.1, 0.5))
def test_equal_average_tokens_within_half_a_token_or_one_percent(
    name: str, layers: int, tokens: int, share: float
) -> None:
    shape = Shape("llava", layers, tokens, (1, tokens), class_token=True)
    if share * layers < 1.5 and name in ("fastv", "pyramiddrop", "btp-paper"):
        return  # their first stage comes after a layer that sees everything: nearly all of the budget
    wanted = share * tokens
    result = make(name, shape, average_tokens=wanted).average_tokens
    assert abs(result - wanted) <= max(0.5 + 1e-6, 0.01 * wanted)


def test_vtw_between_two_layers_withdraws_a_fixed_part_early() -> None:
    plan = make("vtw", average_tokens=129.0)
    assert [(stage.layer, stage.keep) for stage in plan.stages] == [(7, 96), (8, 0)]  # 7 * 576 + 96 = 129 * 32
    assert plan.importance == "random" and not plan.stages[0].needs_similarity
    whole = make("vtw", average_tokens=144.0)
    assert [(stage.layer, stage.keep) for stage in whole.stages] == [(8, 0)]
    assert [(stage.layer, stage.keep) for stage in make("vtw").stages] == [(16, 0)]  # its own setting


def test_btp_paper_needs_released_settings() -> None:
    with pytest.raises(InputError, match="btp-paper for another"):
        preset("btp-paper", model_type="another", num_layers=32, image_tokens=576, grid=(24, 24))


def test_unknown_presets_and_two_budgets_are_refused() -> None:
    with pytest.raises(InputError, match="pyramiddrop"):
        make("pyramid")
    with pytest.raises(InputError):
        make("fastv", average_tokens=100, compression=0.5)
    with pytest.raises(InputError):
        make("fastv", compression=1.0)
