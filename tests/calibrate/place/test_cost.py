"""Cost shares, counted by hand and fitted to made-up measurements whose law is known."""

from dataclasses import replace

import numpy as np
import pytest

from calibrate.place.cost import (
    MeasuredParts,
    MeasuredPrefills,
    MeasuredSegment,
    PrefillCost,
    fit_line,
    measured_cost,
)
from calibrate.place.counts import Shape
from graphs.records.errors import InputError
from graphs.records.plan import Stage
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import DecoderSpec

DECODER = DecoderSpec(
    num_layers=12, hidden_size=128, intermediate_size=256, num_heads=4, num_kv_heads=2, head_dim=32, vocab_size=200,
    rms_norm_eps=1e-5, max_positions=2048,
)  # fmt: skip
PROFILE = ShapeProfile(
    name="p", image_size=(96, 96), grid=(24, 24), prefix_tokens=10, image_tokens=576, text_tokens=32, new_tokens=1
)
SHAPE = Shape("llava", 12, 576, (24, 24))


def layer(tokens: int) -> float:
    """Multiplications and additions of one layer, written out."""
    projections = 2 * tokens * 128 * (128 + 64 + 64) + 2 * tokens * 128 * 128
    return projections + 4 * tokens * tokens * 128 + 6 * tokens * 128 * 256


def test_the_share_is_counted_layer_by_layer() -> None:
    plan = SHAPE.plan((Stage(layer=5, keep=0),))
    head = 2 * 128 * 200
    wanted = (5 * layer(618) + 7 * layer(42) + head) / (12 * layer(618) + head)
    assert PrefillCost(DECODER, PROFILE).share(plan) == pytest.approx(wanted, rel=1e-12)
    slow_start = PrefillCost(DECODER, PROFILE, fixed=1e12).share(plan)
    assert wanted < slow_start < 1, "what does not depend on the length cannot be saved"


def test_a_batch_has_the_share_of_one_sample() -> None:
    plan = SHAPE.plan((Stage(layer=5, keep=0),))
    batch = PROFILE.model_copy(update={"batch": 4})
    assert PrefillCost(DECODER, batch).of(plan) == pytest.approx(PrefillCost(DECODER, PROFILE).of(plan))


def test_fit_line_is_least_squares_with_a_floor() -> None:
    rng = np.random.default_rng(0)
    work = rng.uniform(1, 9, 20)
    times = 3 + 2 * work + rng.normal(0, 0.1, 20)
    rate, fixed = np.polyfit(work, times, 1)
    assert fit_line(work, times) == pytest.approx((fixed, rate))
    assert fit_line([1.0, 2.0], [1.0, 3.0]) == pytest.approx((0.0, 7 / 5))  # the best line through 0


def bench(fixed: float, rate: float, selection: float, *, batch: int = 1) -> MeasuredPrefills:
    """A bench whose times follow the law exactly."""
    cost = PrefillCost(DECODER, PROFILE)
    plan = SHAPE.plan((Stage(layer=2, keep=200, attention_quota=200, pool=200, boundary=200), Stage(layer=8, keep=0)))
    full, pruned = cost.of(SHAPE.plan(())), PrefillCost(DECODER, PROFILE, selection_rate=0).of(plan)
    work = cost.of(plan) - pruned
    select_ms = selection * work
    return MeasuredPrefills(
        full_ms=batch * (fixed + rate * full),
        pruned_ms=batch * (fixed + rate * pruned + select_ms),
        select_ms=batch * select_ms,
        full=batch * full,
        pruned=batch * pruned,
        selection=batch * work,
        batch=batch,
        machine="cpu, float32",
    )


@pytest.mark.parametrize("batch", [1, 3])
def test_the_law_comes_out_of_a_bench(batch: int) -> None:
    cost = measured_cost(bench(4.0, 2e-8, 9e-7, batch=batch), "bench.json", DECODER, PROFILE)
    assert (cost.fixed, cost.decoder_rate, cost.selection_rate) == pytest.approx((4.0, 2e-8, 9e-7))
    assert cost.unit == "milliseconds" and cost.source == f"measured: cpu, float32, batch {batch}"


def profiled(per_layer: float, rate: float, selection: float, *, batch: int = 1) -> MeasuredParts:
    """A profile of engines whose times follow the law exactly."""
    return MeasuredParts(
        segments=[
            MeasuredSegment(start, stop, tokens, batch * (stop - start) * (per_layer + rate * layer(tokens)))
            for start, stop, tokens in [(0, 2, 618), (2, 8, 242), (8, 12, 42)]
        ],
        head_ms=[batch * (0.5 + rate * 2 * 128 * 200)],
        select_ms=1000 * batch * selection,
        selection=1000 * batch,
        image_tokens=576,
        batch=batch,
        machine="jetson-orin, float16",
    )


@pytest.mark.parametrize("batch", [1, 2])
def test_the_law_comes_out_of_a_profile(batch: int) -> None:
    cost = measured_cost(profiled(0.25, 3e-8, 2e-6, batch=batch), "profile.json", DECODER, PROFILE)
    assert (cost.fixed, cost.decoder_rate, cost.selection_rate) == pytest.approx((12 * 0.25 + 0.5, 3e-8, 2e-6))
    full = 12 * (0.25 + 3e-8 * layer(618)) + 0.5 + 3e-8 * 2 * 128 * 200
    assert cost.of(SHAPE.plan(())) == pytest.approx(full)


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        (replace(profiled(0.2, 1e-8, 0.0), image_tokens=36), "same model"),
        (replace(profiled(0.2, 1e-8, 0.0), segments=profiled(0.2, 1e-8, 0.0).segments[:1]), "same model"),
        (replace(profiled(0.2, 1e-8, 0.0), segments=profiled(0.2, 1e-8, 0.0).segments[2:]), "one length only"),
        (profiled(0.2, -1e-8, 0.0), "no less time"),
        (bench(4.0, -1e-9, 0.0), "fewer operations take less time"),
        (replace(bench(4.0, 2e-8, 0.0), full=1e15, pruned=1e14), "same model"),
        (replace(bench(4.0, 2e-8, 0.1), selection=1.0), "which scores alone take"),
        (replace(profiled(0.2, 1e-8, 0.1), selection=1.0), "which scores alone take"),
        (replace(bench(4.0, 2e-8, 0.0), pruned=bench(4.0, 2e-8, 0.0).full), "two lengths"),
    ],
)
def test_other_measurements_are_refused(measured: MeasuredPrefills | MeasuredParts, words: str) -> None:
    with pytest.raises(InputError, match=words):
        measured_cost(measured, "file.json", DECODER, PROFILE)
