"""The paper's ablations: what each one turns, and that nothing else moves."""

import pytest

from btp_export.families.llava import FAMILY
from calibrate.place.ablations import ablations, balance_of, switched, with_layers
from calibrate.place.balance import Recipe
from calibrate.place.counts import Shape
from calibrate.place.presets import PRESETS, preset
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan, Stage

LLAVA = Shape("llava", 32, 576, (24, 24))
NEXT = Shape("llava_next", 32, 2928, (48, 48), ((24, 24), (48, 49)))
PLAN = Recipe().plan(LLAVA, (3, 6, 14, 22), (288, 144, 48, 0))


def variants(plan: PruningPlan) -> dict[str, PruningPlan]:
    return {variant.name: variant.plan for variant in ablations(plan)}


def test_each_switch_of_the_paper_is_turned() -> None:
    result = variants(PLAN)
    assert list(result) == [
        "full", "no-rebalance", "no-spatial", "manhattan", "equal-stages", "constant-balance", "falling-balance",
        "attention-only", "diversity-only", "mean-text", "similar-text",
    ]  # fmt: skip
    assert result["full"] == PLAN
    assert all(stage.pool == stage.attention_quota for stage in result["no-rebalance"].stages)
    assert result["no-spatial"].stages[0].seeds == 0 < PLAN.stages[0].seeds
    assert result["manhattan"].spatial_metric == "manhattan" and result["mean-text"].importance == "mean-text"
    layers = [stage.layer for stage in result["equal-stages"].stages]
    assert {b - a for a, b in zip([0, *layers], layers, strict=False)} == {layers[0]}
    assert balance_of(result["constant-balance"]) == pytest.approx([0.7] * 3, abs=0.01)
    assert balance_of(result["falling-balance"]) == pytest.approx([1.0, 0.7, 0.4], abs=0.01)
    assert balance_of(result["attention-only"]) == (1, 1, 1) and balance_of(result["diversity-only"]) == (0, 0, 0)


@pytest.mark.parametrize(
    "shape", [LLAVA, NEXT, Shape("qwen2_5_vl", 28, 1296, (36, 36))], ids=lambda shape: shape.model_type
)
def test_all_keep_the_average_tokens(shape: Shape) -> None:
    plan = Recipe().plan(shape, (3, 6, 14, 22), (*(shape.image_tokens // part for part in (2, 4, 12)), 0))
    for name, variant in variants(plan).items():
        assert variant.average_tokens == pytest.approx(plan.average_tokens, rel=0.01), name
        assert variant.blocks == plan.blocks
        if name != "equal-stages":
            assert [(s.layer, s.keep) for s in variant.stages] == [(s.layer, s.keep) for s in plan.stages]


def test_each_rule_of_a_mixture_is_turned() -> None:
    first = Stage(layer=0, keep=165, importance="norm", diversity="coverage", features="centred", weights="scores")
    later = Stage(layer=6, keep=88, attention_quota=88, pool=88, boundary=88)
    stages = {"method": "stages", "samples": 24, "divergence": 0.1, "layers": [3, 6, 9, 11], "keep": [200, 80, 10, 0]}
    others = [stages | {"divergence": 0.2}, stages | {"method": "vtw", "divergence": 0.0}, stages | {"samples": 12}]
    plan = Shape("llava", 12, 576, (24, 24)).plan((first, later), calibration={"candidates": [stages, *others]})
    result = variants(plan)
    assert result["farthest"].stages[0] == first.model_copy(update={"diversity": "farthest", "weights": "none"})
    assert result["raw-features"].stages[0].features == "raw" and result["unweighted"].stages[0].weights == "none"
    assert [(stage.layer, stage.keep) for stage in result["before-the-decoder"].stages] == [(0, 126)]
    assert [stage.keep for stage in result["inside-the-decoder"].stages] == [200, 80, 10, 0]
    assert result["mean-text"].importance_of(1) == "mean-text" and result["mean-text"].importance_of(0) == "norm"
    assert "manhattan" not in result and "attention-only" not in result, "it has no spatial set, and no layer before 0"
    assert all(variant.stages[1:] == (later,) for name, variant in result.items() if name in ("farthest", "unweighted"))


@pytest.mark.parametrize("name", PRESETS)
def test_other_plans_have_those_ablations_that_change_them(name: str) -> None:
    plan = preset(
        name, model_type="llava", num_layers=32, image_tokens=576, grid=(24, 24), released=FAMILY.released,
        class_token=True,
    )  # fmt: skip
    result = variants(plan)
    digests = {variant.model_copy(update={"calibration": {}}).digest() for variant in result.values()}
    assert len(digests) == len(result)
    for variant in result.values():
        assert PruningPlan.from_json(variant.to_json()) == variant


def test_switches_of_one_plan() -> None:
    plan = switched(PLAN, rebalance=False, spatial=False, metric="manhattan", balance=(0.1, 0.2, 0.3))
    assert balance_of(plan) == pytest.approx([0.1, 0.2, 0.3], abs=0.02)
    assert plan.spatial_metric == "manhattan" and plan.stages[0].seeds == 0
    assert switched(PLAN) == PLAN
    moved = switched(PLAN, layers=(2, 8, 16, 24), importance="mean-text")
    assert moved.average_tokens == pytest.approx(PLAN.average_tokens, rel=0.01) and moved.importance == "mean-text"
    assert with_layers(PLAN, (3, 6)) is None
    with pytest.raises(InputError, match="at which 129"):
        switched(PLAN, layers=(10, 12, 14, 22))
    with pytest.raises(InputError, match="for 3 stages that keep tokens"):
        switched(PLAN, balance=(0.5, 1.0))


def test_a_rule_of_layer_0_goes_no_further_unless_another_is_chosen() -> None:
    """Every preset at layers that its rule of scoring may not suit: an error of the user's, or a plan that is read."""
    stage = Stage(layer=0, keep=120, attention_quota=120, pool=120, boundary=120)
    first = LLAVA.plan([stage, Stage(layer=22, keep=0)], importance="norm")
    with pytest.raises(InputError, match=r"do not fit the plan: .*scores by norm, which is for layer 0"):
        switched(first, layers=(1, 20))
    moved = switched(first, layers=(1, 20), importance="last-token")
    assert [stage.layer for stage in moved.stages] == [1, 20] and moved.importance == "last-token"
    assert moved.average_tokens == pytest.approx(first.average_tokens, rel=0.02)
