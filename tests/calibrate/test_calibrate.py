"""Calibration as a whole, on small random models and on one with an image it does not look at."""

from pathlib import Path

import numpy as np
import pytest

from calibrate.calibrate import Study, calibrate, measure_statistics, threshold_of
from calibrate.data.samples import Sample
from calibrate.measure.accuracy import Score, exact, score, scores_by_kind
from calibrate.measure.divergence import change, divergence
from calibrate.place.balance import Recipe
from calibrate.place.candidates import Budget, Request
from calibrate.place.counts import Shape
from calibrate.reference.streamed_model import StreamedReference
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan
from tests.calibrate.models import checkpoint, make_input, make_llava

LAYERS, SIDE = 8, 8
SHAPE = Shape("llava", LAYERS, SIDE * SIDE, (SIDE, SIDE))


def study_of(reference: StreamedReference, inputs, *, tau=None, model_tau=0.93, seed=0, source=None) -> Study:
    statistics = measure_statistics(reference, inputs, SHAPE, tau=tau, model_tau=model_tau)
    threshold = threshold_of(statistics, SHAPE, tau=tau, model_tau=model_tau)
    return Study(reference, inputs, SHAPE, statistics, threshold, seed=seed, source=source or {})


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("llava")
    model = make_llava(folder, layers=LAYERS, side=SIDE)
    return StreamedReference(checkpoint(folder)), [make_input(model, text=3 + seed, seed=seed)[0] for seed in range(6)]


@pytest.fixture(scope="module")
def study(setup) -> Study:
    return study_of(*setup, source={"pictures": "noise"})


def test_the_plan_reaches_the_compression_and_says_how(study: Study) -> None:
    plan = calibrate(study)
    assert 0.78 <= plan.compression < 0.80
    record = plan.calibration
    assert record["samples"] == 6 and record["requested_compression"] == 0.78
    assert record["source"] == {"pictures": "noise"}
    assert record["threshold"]["value"] == 0.93 and record["threshold"]["reason"]
    assert len(record["changed_tokens"]) == len(record["drop_divergence"]) == LAYERS
    for spread in ("changed_tokens_spread", "drop_divergence_spread", "stage_spread"):
        assert set(record[spread]) == {"16", "64", "256"}
    chosen = record["candidates"][record["chosen"]]
    assert chosen["layers"] == [stage.layer for stage in plan.stages]
    assert chosen["divergence"] == min(one["divergence"] for one in record["candidates"])
    assert record["balance"] == [pytest.approx(0.4 + 0.3 * n) for n in range(3)]
    assert PruningPlan.from_json(plan.to_json()) == plan


def test_the_same_inputs_give_the_same_bytes(setup) -> None:
    request = Request(Budget(compression=0.6))
    first, second = (calibrate(study_of(*setup, seed=3), request) for _ in range(2))
    assert first.to_json() == second.to_json()


def test_the_spread_narrows_with_more_pictures(study: Study) -> None:
    record = calibrate(study).calibration
    drop = record["drop_divergence_spread"]
    for small, large in (("16", "64"), ("64", "256")):
        assert np.all(np.array(drop[large]) <= np.array(drop[small]) + 1e-9) and sum(drop[large]) > 0
    for entry in record["stage_spread"].values():
        assert 0 <= entry["same"] <= 1 and 0 <= entry["chosen_again"] <= 1
        assert all(low <= high for low, high in zip(entry["low"], entry["high"], strict=True))


def test_given_counts_are_kept(study: Study) -> None:
    plan = calibrate(study, Request(Budget(keep=(20, 10, 3, 0))))
    assert [stage.keep for stage in plan.stages] == [20, 10, 3, 0]
    assert plan.calibration["requested_compression"] is None


def test_every_switch_is_in_the_plan_and_its_record(study: Study) -> None:
    recipe = Recipe("mean-text", "manhattan", rebalance=False, spatial=False, balance=(0.2, 0.5))
    plan = calibrate(study, Request(Budget(compression=0.6), layers=(1, 2, 5), recipe=recipe))
    assert (plan.importance, plan.spatial_metric) == ("mean-text", "manhattan")
    assert [stage.layer for stage in plan.stages] == [1, 2, 5] and plan.stages[-1].keep == 0
    for stage, share in zip(plan.stages[:2], (0.2, 0.5), strict=True):
        assert stage.attention_quota == pytest.approx(share * stage.keep, abs=0.5)
        assert stage.pool == stage.attention_quota and stage.seeds == 0
        assert stage.diversity_quota == stage.keep - stage.attention_quota
    assert plan.calibration["switches"] == {
        "rebalance": False, "spatial": False, "balance": [0.2, 0.5], "stages": [1, 2, 5],
    }  # fmt: skip
    assert 0.6 <= plan.compression < 0.65


def test_importance_decides_what_is_kept(study: Study) -> None:
    """The rules see other rows of the attention, so that candidates are judged differently under each of them."""
    collected = {
        rule: calibrate(study, Request(recipe=Recipe(rule))).calibration["candidates"]
        for rule in ("last-token", "mean-text", "similar-text")
    }
    divergences = [tuple(one["divergence"] for one in candidates) for candidates in collected.values()]
    assert len(set(divergences)) == 3


def test_one_bound_on_dropping_all(study: Study) -> None:
    strict, loose = (calibrate(study, Request(Budget(compression=0.4), drop_bounds=(bound,))) for bound in (1e-6, 1e3))
    assert strict.calibration["drop_bounds"] == [1e-6]
    assert {candidate["drop_bound"] for candidate in strict.calibration["candidates"]} == {1e-6}
    finals = [{candidate["layers"][-1] for candidate in plan.calibration["candidates"]} for plan in (strict, loose)]
    divergence = strict.calibration["drop_divergence"]
    assert all(value <= 1e-6 for value in divergence[max(finals[0]) :]) or finals[0] == {LAYERS - 1}
    assert min(finals[1]) <= min(finals[0])


def test_the_threshold_is_raised_where_nothing_changes_and_says_so(setup) -> None:
    threshold = calibrate(study_of(*setup, model_tau=-0.9)).calibration["threshold"]
    assert threshold["value"] == 0.95 and "raised from -0.9" in threshold["reason"]
    given = calibrate(study_of(*setup, tau=-0.9))
    assert given.calibration["threshold"] == {"value": -0.9, "reason": "given"}
    assert "hardly any image token changes" in given.calibration["notes"][0]
    assert given.compression >= 0.78


def test_a_model_that_does_not_see_gets_a_plan_and_a_note(tmp_path: Path) -> None:
    model = make_llava(tmp_path, layers=LAYERS, side=SIDE)
    for layer in model.model.language_model.layers:
        layer.self_attn.o_proj.weight.data.zero_()  # no token hears of another
    model.save_pretrained(tmp_path)
    inputs = [make_input(model, seed=seed)[0] for seed in range(4)]
    plan = calibrate(study_of(StreamedReference(checkpoint(tmp_path)), inputs))
    assert plan.compression >= 0.78
    assert any("no candidate changes" in note for note in plan.calibration["notes"])


def test_what_cannot_be_is_refused_before_any_work(study: Study) -> None:
    blind = Study(None, [], SHAPE, study.statistics, study.threshold)  # type: ignore[arg-type]  # nothing may be run
    for request, words in [
        (Request(Budget(compression=0.95), recipe=Recipe(spatial=False)), r"at most 0\.875"),
        (Request(Budget(compression=0.99)), "less than one image token"),
        (Request(Budget(keep=(10, 20))), "falling counts"),
        (Request(Budget(compression=0.5, keep=(10, 0))), "more than one budget"),
        (Request(layers=(3, 3, 5)), "rising layers"),
        (Request(layers=(7, 9)), "rising layers from 1 to 7"),
        (Request(layers=(3, 5)), "cannot save 0.78"),
        (Request(Budget(keep=(10, 0)), layers=(1, 2, 3)), "a count for each layer"),
        (Request(Budget(keep=(10, 0)), recipe=Recipe(balance=(0.1, 0.2))), "1 shares of attention"),
        (Request(Budget(share=0.3)), "the cost of the model's layers"),
    ]:
        with pytest.raises(InputError, match=words):
            calibrate(blind, request)


def test_divergence() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    wanted = 0.5 * np.log(2) - 0.25 * np.log(2)
    assert divergence(np.log(p) + 3, np.log(q)) == pytest.approx(wanted)
    assert divergence(np.log(p), np.log(p)) == 0.0
    answer, other = np.log(np.stack([p, q])), np.log(np.stack([q, q]))
    result = change(answer, other)
    assert result.divergence == pytest.approx(wanted / 2) and (result.agreement, result.exact) == (0.5, False)


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
