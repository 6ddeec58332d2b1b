"""Plans of other kinds: each within its budget, as near to it as whole counts allow, and what a choice refuses."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btp_export.families.llava import Llava
from calibrate.calibrate import choose
from calibrate.place.alternatives import alternatives, covering
from calibrate.place.candidates import Budget, Candidate, Evidence, Request, propose
from calibrate.place.counts import Shape, tokens_within
from calibrate.place.presets import PRESETS, preset
from graphs.records.errors import CheckError, InputError
from graphs.records.plan import PruningPlan, Stage

SHAPE = Shape("llava", 32, 576, (24, 24), class_token=True)
EVIDENCE = Evidence(np.linspace(300, 0, 32), np.where(np.arange(32) < 22, 1.0, 0.0))


@settings(deadline=None, max_examples=60)
@given(st.floats(0.3, 0.97), st.sampled_from([(12, 576, (24, 24)), (32, 576, (24, 24)), (28, 1036, (28, 37))]))
def test_every_kind_keeps_within_the_budget(compression: float, size: tuple[int, int, tuple[int, int]]) -> None:
    layers, tokens, grid = size
    shape = Shape("llava", layers, tokens, grid, class_token=True)
    budget = tokens_within(compression, layers, tokens)
    for alternative in alternatives(shape, final=max(2, layers * 2 // 3), released=Llava.released):
        plan = alternative.make(budget)
        if plan is None:
            continue
        used = sum(plan.tokens_per_layer())
        assert used <= budget, alternative.method
        full = plan.stages and plan.stages[0].keep == tokens - 1  # the budget is more than such a plan can use
        if alternative.method in ("mixture", "remainder", "coverage") and not full:
            assert budget - used < layers, alternative.method
        assert PruningPlan.from_json(plan.to_json()) == plan


def test_all_kinds_are_there() -> None:
    methods = [alternative.method for alternative in alternatives(SHAPE, final=22, released=Llava.released)]
    assert {
        "coverage x norm",
        "coverage x vision-cls",
        "coverage",
        "mixture",
        "remainder",
        "btp-paper",
        "divprune",
        "vtw",
    } <= set(methods)
    assert set(PRESETS) - {"none"} <= set(methods)
    without = {alternative.method for alternative in alternatives(SHAPE, final=22)}
    assert without == set(methods) - {"btp-paper", "btp-paper-corrected"}
    blind = replace(SHAPE, class_token=False)
    collected = [(each.method, each.make(5000)) for each in alternatives(blind, final=22, released=Llava.released)]
    assert {method for method, _ in collected} == set(methods) - {"coverage x vision-cls"}
    assert dict(collected)["visionzip-select"] is None, "a tower without a class token cannot do it"


def test_a_free_request_tries_them_and_a_chosen_one_does_not() -> None:
    free = propose(EVIDENCE, SHAPE, Request(Budget(compression=0.89)))
    assert {"stages", "mixture", "coverage x norm", "divprune"} <= {candidate.method for candidate in free}
    bound = propose(EVIDENCE, SHAPE, Request(Budget(compression=0.78), layers=(3, 8, 11, 22)))
    assert {candidate.method for candidate in bound} == {"stages"}
    tiny = propose(EVIDENCE, SHAPE, Request(Budget(compression=0.98)))
    assert tiny and all(candidate.plan.stages[0].layer == 0 for candidate in tiny)


def test_scope_is_coverage_weighed_by_the_norm() -> None:
    plan = preset("scope", model_type="llava", num_layers=32, image_tokens=576, grid=(24, 24))
    assert plan.stages == (covering(64, "norm"),) and plan.format == "btp-plan/2"


def test_visionzip_select_is_the_published_share() -> None:
    """54 dominant and 10 contextual tokens of 576; without a class token it is refused."""
    plan = preset(
        "visionzip-select", model_type="llava", num_layers=32, image_tokens=576, grid=(24, 24), class_token=True
    )
    (stage,) = plan.stages
    assert (stage.layer, stage.keep, stage.attention_quota, stage.pool) == (0, 64, 54, 54)
    assert plan.needs_class_attention and stage.needs_similarity
    with pytest.raises(InputError, match="visionzip-select"):
        preset("visionzip-select", model_type="qwen2_5_vl", num_layers=28, image_tokens=576, grid=(24, 24))


def test_the_corrected_paper_keeps_an_eighth_to_the_end() -> None:
    collected = {
        name: preset(name, model_type="llava", num_layers=32, image_tokens=576, grid=(24, 24), released=Llava.released)
        for name in ("btp-paper", "btp-paper-corrected")
    }
    paper, corrected = (collected[name].stages for name in ("btp-paper", "btp-paper-corrected"))
    assert paper[:2] == corrected[:2] and paper[-1] == Stage(layer=22, keep=0)
    assert (corrected[-1].layer, corrected[-1].keep) == (14, 72)


def candidate(method: str, divergence: list[float]) -> Candidate:
    values = np.array(divergence)
    return Candidate(SHAPE.plan((Stage(layer=9, keep=0),)), method, None, values, values < 1, values < 1)


def test_a_plan_that_loses_a_kind_of_picture_is_refused() -> None:
    """Its mean is the best: ten scenes that lose nothing hide two pages that do."""
    kinds = ["scenes"] * 10 + ["pages"] * 2
    careless, careful = candidate("vtw", [0.0] * 10 + [2.0, 2.4]), candidate("mixture", [0.5] * 12)
    assert careless.mean < careful.mean
    best, notes = choose([careless, careful], kinds, 1.0)
    assert best == 1 and notes == ["vtw was refused: pages, 2.2 nats a token"]
    assert choose([careless, careful], kinds, 3.0) == (0, [])
    with pytest.raises(CheckError, match=r"no plan within the budget.* pages, 2\.2 nats") as error:
        choose([careless, candidate("random", [3.0] * 12)], kinds, 1.0)
    assert "--kind-bound 2.4" in str(error.value.do)


def test_only_what_ran_on_most_samples_can_be_chosen() -> None:
    lucky, steady = candidate("random", [0.0] * 4), candidate("mixture", [0.1] * 12)
    assert choose([lucky, steady], ["scenes"] * 12) == (1, [])
