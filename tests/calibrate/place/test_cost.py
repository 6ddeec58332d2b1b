"""Cost shares, counted by hand and fitted to made-up measurements whose law is known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibrate.place.cost import PrefillCost, fit_line, measured_cost
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


def bench(fixed: float, rate: float, selection: float, *, batch: int = 1) -> dict[str, Any]:
    """The document of a bench whose times follow the law exactly."""
    cost = PrefillCost(DECODER, PROFILE)
    plan = SHAPE.plan((Stage(layer=2, keep=200, attention_quota=200, pool=200, boundary=200), Stage(layer=8, keep=0)))
    full, pruned = cost.of(SHAPE.plan(())), PrefillCost(DECODER, PROFILE, selection_rate=0).of(plan)
    work = cost.of(plan) - pruned
    select_ms = selection * work
    return {
        "prefill": {
            "full_ms": batch * (fixed + rate * full),
            "pruned_ms": batch * (fixed + rate * pruned + select_ms),
        },
        "select_ms": [batch * select_ms, 0.0],
        "flops": {"full": batch * full, "pruned": batch * pruned, "selection": batch * work},
        "batch": batch, "precision": "float32", "device": "cpu",
    }  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
def test_the_law_comes_out_of_a_bench(batch: int, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(bench(4.0, 2e-8, 9e-7, batch=batch)))
    cost = measured_cost(path, DECODER, PROFILE)
    assert (cost.fixed, cost.decoder_rate, cost.selection_rate) == pytest.approx((4.0, 2e-8, 9e-7))
    assert cost.unit == "milliseconds"
    path.write_text(json.dumps({"bench": bench(4.0, 2e-8, 9e-7), "plan": {}}))  # within the whole job's document
    assert measured_cost(path, DECODER, PROFILE).fixed == pytest.approx(4.0)


def profiled(per_layer: float, rate: float, selection: float, *, batch: int = 1) -> dict[str, Any]:
    """The document of a profile of engines whose times follow the law exactly."""
    parts = [
        {"kind": "prefill", "layers": [start, stop], "tokens": tokens, "flops": 0,
         "ms": batch * (stop - start) * (per_layer + rate * layer(tokens))}
        for start, stop, tokens in [(0, 2, 618), (2, 8, 242), (8, 12, 42)]
    ]  # fmt: skip
    parts += [{"kind": "select", "layers": None, "tokens": 576, "flops": 1000 * batch, "ms": 1000 * batch * selection}]
    parts += [{"kind": "head", "layers": None, "tokens": 1, "flops": 0, "ms": batch * (0.5 + rate * 2 * 128 * 200)}]
    return {
        "parts": parts, "unpruned": None, "batch": batch, "image_tokens": 576, "target": "jetson-orin",
        "precision": "float16",
    }  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2])
def test_the_law_comes_out_of_a_profile(batch: int, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profiled(0.25, 3e-8, 2e-6, batch=batch)))
    cost = measured_cost(path, DECODER, PROFILE)
    assert (cost.fixed, cost.decoder_rate, cost.selection_rate) == pytest.approx((12 * 0.25 + 0.5, 3e-8, 2e-6))
    full = 12 * (0.25 + 3e-8 * layer(618)) + 0.5 + 3e-8 * 2 * 128 * 200
    assert cost.of(SHAPE.plan(())) == pytest.approx(full)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("nothing", "cannot read"),
        ("[1]", "holds a list"),
        ('{"samples": 3}', "no prefill times"),
        (json.dumps(profiled(0.2, 1e-8, 0.0) | {"image_tokens": 36}), "same model"),
        (json.dumps({**profiled(0.2, 1e-8, 0.0), "parts": profiled(0.2, 1e-8, 0.0)["parts"][:1]}), "same model"),
        (json.dumps({**profiled(0.2, 1e-8, 0.0), "parts": profiled(0.2, 1e-8, 0.0)["parts"][2:]}), "one length only"),
        (json.dumps(profiled(0.2, -1e-8, 0.0)), "no less time"),
        (json.dumps(bench(4.0, -1e-9, 0.0)), "fewer operations take less time"),
        (json.dumps(bench(4.0, 2e-8, 0.0) | {"flops": {"full": 1e15, "pruned": 1e14, "selection": 0}}), "same model"),
    ],
)
def test_other_files_are_refused(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(InputError, match=words):
        measured_cost(path, DECODER, PROFILE)
    with pytest.raises(InputError, match="cannot read"):
        measured_cost(tmp_path / "missing.json", DECODER, PROFILE)
