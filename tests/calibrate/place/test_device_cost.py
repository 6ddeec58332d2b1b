"""Costs on a device, by the arithmetic of its data sheet written out, and what a plan may keep for nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate.place.cost import PrefillCost
from calibrate.place.counts import Shape
from calibrate.place.device_cost import Device, device_cost, spend_what_is_free
from graphs.records.plan import PruningPlan, Stage
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import DecoderSpec

SEVEN_B = DecoderSpec(
    num_layers=32, hidden_size=4096, intermediate_size=11008, num_heads=32, num_kv_heads=32, head_dim=128,
    vocab_size=32064, rms_norm_eps=1e-5, max_positions=4096,
)  # fmt: skip
PROFILE = ShapeProfile(
    name="p", image_size=(336, 336), grid=(24, 24), prefix_tokens=35, image_tokens=576, text_tokens=29, new_tokens=1
)
SHAPE = Shape("llava", 32, 576, (24, 24))
ORIN = Device("orin", 204.8e9, 42.5e12, 5.3e12)
WEIGHTS = 4 * 4096 * 4096 + 3 * 4096 * 11008  # of one layer


def layer_seconds(rows: int, bytes_a_weight: float = 2.0) -> float:
    products = 2 * rows * WEIGHTS + 4 * rows * rows * 4096
    return max(WEIGHTS * bytes_a_weight / 204.8e9, products / 42.5e12)


def test_a_layer_takes_the_longer_of_reading_and_computing() -> None:
    cost = device_cost(PrefillCost(SEVEN_B, PROFILE), ORIN)
    for rows in (1, 64, 200, 300, 640):
        assert cost.layer_seconds(rows) == pytest.approx(layer_seconds(rows))
    plan = SHAPE.plan((Stage(layer=8, keep=0),))
    head = max(4096 * 32064 * 2 / 204.8e9, 2 * 4096 * 32064 / 42.5e12)
    assert cost.of(plan) == pytest.approx(1e3 * (8 * layer_seconds(640) + 24 * layer_seconds(64) + head))


def test_the_corners_of_an_orin() -> None:
    """About 208 rows in float16 and 58 with four-bit weights, a little less for the square of attention."""
    wide = device_cost(PrefillCost(SEVEN_B, PROFILE), ORIN)
    packed = device_cost(PrefillCost(SEVEN_B, PROFILE), Device("orin", 204.8e9, 42.5e12, 5.3e12, "int4"))
    assert 200 <= wide.corner <= 208 and 50 <= packed.corner <= 58
    assert wide.layer_seconds(wide.corner) == pytest.approx(layer_seconds(1))
    assert wide.layer_seconds(wide.corner + 1) > layer_seconds(1)
    assert wide.free_tokens == wide.corner - 64 and packed.free_tokens == 0


def test_what_is_free_is_kept() -> None:
    cost = device_cost(PrefillCost(SEVEN_B, PROFILE), ORIN)
    plan = SHAPE.plan(
        (
            Stage(layer=3, keep=288, diversity_quota=288),
            Stage(layer=8, keep=100, diversity_quota=100),
            Stage(layer=22, keep=0),
        )
    )
    richer = spend_what_is_free(plan, cost.free_tokens)
    assert [stage.keep for stage in richer.stages] == [288, cost.free_tokens], "dropping the rest would save nothing"
    assert cost.of(richer) <= cost.of(plan) + 1e-9
    assert spend_what_is_free(plan, 0) is plan


@given(st.integers(0, 700), st.lists(st.integers(0, 575), max_size=5, unique=True))
def test_spending_never_drops_more_and_gives_a_plan(free: int, counts: list[int]) -> None:
    keeps = sorted(counts, reverse=True)
    plan = SHAPE.plan([Stage(layer=2 + 3 * n, keep=keep, diversity_quota=keep) for n, keep in enumerate(keeps)])
    richer = spend_what_is_free(plan, free)
    assert PruningPlan.from_json(richer.to_json()) == richer
    for tokens, before in zip(richer.tokens_per_layer(), plan.tokens_per_layer(), strict=True):
        assert tokens == max(before, min(free, 576))
