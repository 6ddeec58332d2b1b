"""The search: its objective against a plain implementation, its constraint, and when its result is taken."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.place import search as tuning
from calibrate.place.balance import Recipe
from calibrate.place.cost import PrefillCost
from calibrate.place.counts import Shape
from calibrate.place.search import Measurement, Search, Setting, Space, measure_plans, tune
from calibrate.reference.streamed_model import StreamedReference
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import DecoderSpec
from tests.calibrate.models import PREFIX, VOCABULARY, checkpoint, make_input, make_llava
from tests.calibrate.naive import prefill

LAYERS, SIDE = 6, 6
SHAPE = Shape("llava", LAYERS, SIDE * SIDE, (SIDE, SIDE))
COST = PrefillCost(
    DecoderSpec(
        num_layers=LAYERS, hidden_size=64, intermediate_size=128, num_heads=4, num_kv_heads=2, head_dim=16,
        vocab_size=VOCABULARY, rms_norm_eps=1e-6, max_positions=512,
    ),
    ShapeProfile(
        name="p", image_size=(24, 24), grid=(SIDE, SIDE), prefix_tokens=PREFIX, image_tokens=SIDE * SIDE,
        text_tokens=16, new_tokens=1,
    ),
)  # fmt: skip
DEFAULT = Recipe().plan(SHAPE, (1, 3, 5), (20, 10, 0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("llava")
    model = make_llava(folder, layers=LAYERS, side=SIDE)
    inputs = [make_input(model, text=3 + seed % 4, seed=seed)[0] for seed in range(14)]
    return model, StreamedReference(checkpoint(folder)), inputs


def test_the_objective_is_that_of_a_plain_implementation(model) -> None:
    """Whole model in memory, no sharing: hidden states at the end of each stage's layers, rows matched by position."""
    whole, reference, inputs = model
    other = Recipe().plan(SHAPE, (1, 3, 5), (20, 12, 0))  # shares its past with DEFAULT until layer 3
    measured = measure_plans(reference, inputs[:2], [DEFAULT, other])
    tokens = SHAPE.image_tokens
    for plan, result in zip((DEFAULT, other), measured, strict=True):
        for number, sample in enumerate(inputs[:2]):
            with torch.no_grad():
                full_logits, _, full = prefill(whole, sample.input_ids, sample.image_features, SHAPE.plan(()), PREFIX)
                logits, kept, pruned = prefill(whole, sample.input_ids, sample.image_features, plan, PREFIX)
            error = 0.0
            for alive, end in zip(kept, (2, 4, 5), strict=True):
                at = [PREFIX + token for token in alive] + list(range(PREFIX + tokens, len(sample.input_ids)))
                wanted, got = full[end][0, at], pruned[end][0, PREFIX:]
                error += float(((got - wanted).norm(dim=1) / wanted.norm(dim=1)).mean())
            assert result.error[number] == pytest.approx(error, rel=1e-4)
            p, q = full_logits.double().log_softmax(0), logits.double().log_softmax(0)
            assert result.divergence[number] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3, abs=1e-6)
    assert measured[0].error[0] > 0.01 and measured[0].error[0] != measured[1].error[0]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-2, 2), min_size=4, max_size=4))
def test_no_move_costs_more_than_the_default(move: list[float]) -> None:
    space = Space(DEFAULT, Recipe(), COST, counts=True, shares=True)
    plan = space.plan(space.moved(space.start, np.array(move)))
    if plan is None:
        return
    assert COST.of(plan) <= COST.of(DEFAULT) and plan.average_tokens <= DEFAULT.average_tokens
    assert COST.of(plan) >= 0.93 * COST.of(DEFAULT), "and what it saves is at most a token or two a stage"
    assert [stage.layer for stage in plan.stages] == [1, 3, 5]


def test_the_default_itself_is_where_the_search_starts() -> None:
    space = Space(DEFAULT, Recipe(), COST, counts=True, shares=True)
    plan = space.plan(space.start)
    assert plan is not None and plan.stages == DEFAULT.stages


def test_only_what_may_change_does() -> None:
    start = Space(DEFAULT, Recipe(), COST, counts=True, shares=True).start
    rng = np.random.default_rng(0)
    counts_only = Space(DEFAULT, Recipe(), COST, counts=True, shares=False).polls(start, 1.0, rng)
    assert {setting.shares for setting in counts_only} == {start.shares} and len(
        {setting.keeps for setting in counts_only}
    ) > 2
    shares_only = Space(DEFAULT, Recipe(), COST, counts=False, shares=True)
    polled = shares_only.polls(start, 1.0, rng)
    assert {setting.keeps for setting in polled} == {start.keeps} and len({setting.shares for setting in polled}) > 2
    for setting in polled:
        plan = shares_only.plan(setting)
        assert plan is None or [stage.keep for stage in plan.stages] == [20, 10, 0]


def landscape(plans: Sequence[PruningPlan], *, samples: int = 10, best: float = 0.9) -> list[Measurement]:
    """Made-up objective: the first stage's share of attention should be `best`, and its count 26."""
    collected = []
    for plan in plans:
        first = plan.stages[0]
        distance = abs(first.attention_quota / first.keep - best) + abs(first.keep - 26) / 26
        collected.append(Measurement(np.full(samples, 1.0 + distance), np.full(samples, 0.1 + distance)))
    return collected


def test_the_search_finds_the_optimum_of_a_known_landscape() -> None:
    search = Search(Space(DEFAULT, Recipe(), COST, counts=True, shares=True), landscape, seed=0)
    best, result, base = search.run(DEFAULT)
    assert abs(best.stages[0].attention_quota / best.stages[0].keep - 0.9) < 0.1
    assert abs(best.stages[0].keep - 26) <= 3
    assert result.scores(base).mean() < 0.75 and search.passes <= tuning.PASSES
    again = Search(Space(DEFAULT, Recipe(), COST, counts=True, shares=True), landscape, seed=0).run(DEFAULT)[0]
    assert again == best, "the same seed searches the same way"


def measurements(unseen_best: float, sizes: list[int]) -> Any:
    """Measuring on the landscape; on unseen samples the optimum is another one. `sizes`: of the passes."""

    def measure(reference, inputs, plans, *, progress=None):
        sizes.append(len(inputs))
        seen = len(inputs) > 6
        return landscape(plans, samples=len(inputs), best=0.9 if seen else unseen_best)

    return measure


def test_a_plan_that_holds_on_unseen_samples_is_taken() -> None:
    sizes: list[int] = []
    measure = measurements(0.9, sizes)
    plan, record = tune(None, list(range(18)), DEFAULT, Recipe(), COST, measure=measure)  # type: ignore[arg-type,list-item]
    assert record["taken"] and plan != DEFAULT and record["better_in"] == 1.0
    assert (record["samples"], record["held_out"]) == (12, 6) and sizes[-1] == 6 and set(sizes[:-1]) == {12}
    assert record["tuned"]["held_out"]["objective"] < record["default"]["held_out"]["objective"] == 1.0
    assert record["cost"]["tuned"] <= record["cost"]["default"]
    assert record["tuned"]["keep"] == [stage.keep for stage in plan.stages]


def test_a_plan_that_does_not_hold_is_not_taken_and_it_is_said() -> None:
    measure = measurements(0.1, [])
    plan, record = tune(None, list(range(18)), DEFAULT, Recipe(), COST, measure=measure)  # type: ignore[arg-type,list-item]
    assert plan == DEFAULT and not record["taken"]
    assert record["tuned"]["held_out"]["objective"] > 1.0 and record["reason"]


def test_tuning_a_model_never_costs_more_and_says_what_it_did(model) -> None:
    _, reference, inputs = model
    steps: list[tuple[int, int]] = []
    plan, record = tune(
        reference, inputs, DEFAULT, Recipe(), COST, seed=1, progress=lambda done, total: steps.append((done, total))
    )
    assert COST.of(plan) <= COST.of(DEFAULT)
    assert record["taken"] == (plan.stages != DEFAULT.stages)
    if record["taken"]:
        assert record["tuned"]["held_out"]["objective"] < 1.0 and record["better_in"] >= 0.95
    assert record["plans"] > 10 and record["passes"] <= tuning.PASSES
    assert [done for done, _ in steps] == sorted(done for done, _ in steps) and steps[-1][0] <= steps[-1][1]
    again = tune(reference, inputs, DEFAULT, Recipe(), COST, seed=1)
    assert again == (plan, record)


def test_what_cannot_be_tuned_is_refused(model) -> None:
    _, reference, inputs = model
    with pytest.raises(InputError, match="--tune with 5 samples"):
        tune(reference, inputs[:5], DEFAULT, Recipe(), COST)
    with pytest.raises(InputError, match="--keep and --balance"):
        tune(reference, inputs, DEFAULT, Recipe(), COST, counts=False, shares=False)
    drop = Recipe().plan(SHAPE, (3,), (0,))
    plan, record = tune(reference, inputs, drop, Recipe(), COST)
    assert plan == drop and not record["taken"] and "nothing to search" in record["reason"]


def test_moves_that_helped_are_made_together() -> None:
    at = Setting((20, 10), (0.4, 1.0))
    together = tuning.combined(at, [Setting((26, 10), (0.4, 1.0)), Setting((20, 10), (0.6, 1.0))])
    assert together == Setting((26, 10), (0.6, 1.0))
