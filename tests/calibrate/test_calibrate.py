"""Calibration as a whole, on small random models and on one with an image it does not look at."""

from pathlib import Path

import numpy as np
import pytest

from calibrate.budget import Shape
from calibrate.calibrate import calibrate, divergence
from calibrate.data import Sample
from calibrate.evaluation import Score, exact, score, scores_by_kind
from calibrate.reference import StreamedReference
from graphs.errors import InputError
from graphs.plan import PruningPlan
from tests.calibrate.models import checkpoint, make_input, make_llava

LAYERS, SIDE = 8, 8
SHAPE = Shape("llava", LAYERS, SIDE * SIDE, (SIDE, SIDE))


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("llava")
    model = make_llava(folder, layers=LAYERS, side=SIDE)
    return StreamedReference(checkpoint(folder)), [make_input(model, text=3 + seed, seed=seed)[0] for seed in range(6)]


def test_the_plan_reaches_the_compression_and_says_how(setup) -> None:
    reference, inputs = setup
    plan = calibrate(reference, inputs, SHAPE, source={"pictures": "noise"})
    assert 0.78 <= plan.compression < 0.80
    record = plan.calibration
    assert record["samples"] == 6 and record["requested_compression"] == 0.78
    assert record["source"] == {"pictures": "noise"}
    assert record["threshold"]["value"] == 0.93 and record["threshold"]["reason"]
    assert len(record["changed_tokens"]) == len(record["drop_divergence"]) == LAYERS
    assert set(record["changed_tokens_spread"]) == {"16", "64", "256"}
    chosen = record["candidates"][record["chosen"]]
    assert chosen["layers"] == [stage.layer for stage in plan.stages]
    assert chosen["divergence"] == min(one["divergence"] for one in record["candidates"])
    assert PruningPlan.from_json(plan.to_json()) == plan


def test_the_same_inputs_give_the_same_bytes(setup) -> None:
    reference, inputs = setup
    first, second = (calibrate(reference, inputs, SHAPE, compression=0.6, seed=3) for _ in range(2))
    assert first.to_json() == second.to_json()


def test_given_counts_are_kept(setup) -> None:
    reference, inputs = setup
    plan = calibrate(reference, inputs, SHAPE, keep=(20, 10, 3, 0))
    assert [stage.keep for stage in plan.stages] == [20, 10, 3, 0]
    assert plan.calibration["requested_compression"] is None


def test_the_threshold_is_raised_where_nothing_changes_and_says_so(setup) -> None:
    reference, inputs = setup
    plan = calibrate(reference, inputs, SHAPE, model_tau=-0.9)
    threshold = plan.calibration["threshold"]
    assert threshold["value"] == 0.95 and "raised from -0.9" in threshold["reason"]
    given = calibrate(reference, inputs, SHAPE, tau=-0.9)
    assert given.calibration["threshold"] == {"value": -0.9, "reason": "given"}
    assert "hardly any image token changes" in given.calibration["notes"][0]
    assert given.compression >= 0.78


def test_a_model_that_does_not_see_gets_a_plan_and_a_note(tmp_path: Path) -> None:
    model = make_llava(tmp_path, layers=LAYERS, side=SIDE)
    for layer in model.model.language_model.layers:
        layer.self_attn.o_proj.weight.data.zero_()  # no token hears of another
    model.save_pretrained(tmp_path)
    inputs = [make_input(model, seed=seed)[0] for seed in range(4)]
    plan = calibrate(StreamedReference(checkpoint(tmp_path)), inputs, SHAPE)
    assert plan.compression >= 0.78
    assert any("no candidate changes" in note for note in plan.calibration["notes"])


def test_a_compression_out_of_reach_is_refused_before_any_work(setup) -> None:
    reference, _ = setup
    with pytest.raises(InputError, match=r"at most 0\.875"):
        calibrate(reference, [], SHAPE, compression=0.95)


def test_divergence() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    wanted = 0.5 * np.log(2) - 0.25 * np.log(2)
    assert divergence(np.log(p) + 3, np.log(q)) == pytest.approx(wanted)
    assert divergence(np.log(p), np.log(p)) == 0.0


# Scores


def test_exact_match() -> None:
    assert exact("Top  left.", "top left") and exact(" yes", "Yes") and not exact("left", "top left")


def test_scores_by_kind_and_wilson_interval() -> None:
    from PIL import Image

    picture = Image.new("RGB", (2, 2))
    samples = [Sample(picture, "?", str(n), answer, kind) for n, (answer, kind) in enumerate(
        [("red", "colour"), ("two", "count"), ("blue", "colour"), ("three", "count")])]  # fmt: skip
    answers = ["red", "one", "blue", "three"]
    assert score(samples, answers) == Score(3, 4)
    assert scores_by_kind(samples, answers) == {"colour": Score(2, 2), "count": Score(1, 2)}
    low, high = Score(81, 263).interval()  # a published example: Newcombe, Statistics in Medicine 17 (1998)
    assert (low, high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert Score(0, 0).interval() == (0.0, 1.0)
