"""BtpSelectTokens: every form against the reference, the reference against the rules in plain Python."""

import functools
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from graphs.ops import select_tokens
from graphs.ops.select_tokens import Case
from graphs.records.errors import InputError
from tests.graphs.ops import models, oracle

OPSETS = (18, 23)
CASES = {case.name: case for case in select_tokens.cases()}
LARGE = {name for name, case in CASES.items() if case.scores.shape[1] > 100}
every_case = pytest.mark.parametrize("name", CASES)


def reference(case: Case) -> Any:
    tensors = [
        None if array is None else torch.from_numpy(array) for array in (case.scores, case.similarity, case.seeds)
    ]
    return select_tokens.reference(*tensors, **case.attributes).numpy()


@functools.cache
def known(name: str) -> Any:
    """The reference of a case, which several tests compare with."""
    return reference(CASES[name])


def test_names_of_cases_are_unique() -> None:
    assert len(CASES) == len(select_tokens.cases())


@every_case
def test_reference_follows_the_rules(name: str) -> None:
    indices = known(name)
    assert indices.dtype == np.int32
    assert indices.tolist() == oracle.select(CASES[name])


@pytest.mark.parametrize(
    "name", ["similarity-ties", "similarity-broken-tokens", "similarity-all-nan", "keep-all-from-nothing",
             "coverage-similarity-ties", "coverage-weighted-scores-odd", "coverage-similarity-negative"],
)  # fmt: skip
def test_first_picks_from_nothing_are_what_fewer_tokens_keep(name: str) -> None:
    case = CASES[name]
    batch, tokens = case.scores.shape
    similarity = torch.from_numpy(case.similarity)
    none = dict.fromkeys(("attention_quota", "diversity_quota", "pool", "boundary"), 0)
    rule = {key: value for key, value in case.attributes.items() if key in ("diversity_rule", "weighted")}
    picks = [
        select_tokens.picks_from_nothing(torch.from_numpy(case.scores[b]), similarity[b], tokens, **rule)
        for b in range(batch)
    ]
    for keep in range(1, tokens + 1):
        fewer = replace(case, seeds=None, attributes=none | rule | {"keep": keep})
        assert [sorted(each[:keep].tolist()) for each in picks] == oracle.select(fewer)


@pytest.mark.parametrize("opset", OPSETS)
@every_case
def test_exact_body_in_onnxruntime(name: str, opset: int) -> None:
    case = CASES[name]
    model = models.select_model(case, opset, "exact")
    models.check(model)
    assert np.array_equal(models.run_onnxruntime(model, case.inputs), known(name))


def generic_serves(case: Case, opset: int) -> bool:
    """Up to opset 22 the generic body takes float32 similarity only."""
    return opset >= 23 or case.similarity is None or case.similarity.dtype == np.float32


@pytest.mark.parametrize("opset", OPSETS)
@every_case
def test_generic_body_in_onnxruntime(name: str, opset: int) -> None:
    case = CASES[name]
    model = models.select_model(case, opset, "generic")
    if generic_serves(case, opset):
        models.check(model)
        assert np.array_equal(models.run_onnxruntime(model, case.inputs), known(name))
    else:
        with pytest.raises(Exception, match=r"inconsistent type tensor\(float16\)"):
            models.run_onnxruntime(model, case.inputs)


@pytest.mark.parametrize("name", sorted(set(CASES) - LARGE))
def test_bodies_in_reference_evaluator(name: str) -> None:
    case = CASES[name]
    for form in ("exact", "generic"):
        model = models.select_model(case, 23, form, padded=form == "generic")
        assert np.array_equal(models.run_evaluator(model, case.inputs), known(name)), form


def test_a_body_of_one_rule_runs_in_the_reference_evaluator_without_the_optional_attributes() -> None:
    """If the second half fails, onnx's evaluator has learned the defaults of function attributes."""
    case = CASES["all-picks"]
    assert not set(models.DEFAULTS) & set(case.attributes)
    model = models.select_model(case, 23, "farthest")
    models.check(model)
    assert np.array_equal(models.run_evaluator(model, case.inputs), reference(case))
    assert np.array_equal(models.run_onnxruntime(model, case.inputs), reference(case))
    with pytest.raises(ValueError, match="Unable to find a value for linked attribute"):
        models.run_evaluator(models.select_model(case, 23, "generic"), case.inputs)


@pytest.mark.parametrize("opset", OPSETS)
def test_released_setting_in_reference_evaluator(opset: int) -> None:
    case = CASES["released-1"]
    model = models.select_model(case, opset, "exact")
    assert np.array_equal(models.run_evaluator(model, case.inputs), reference(case))


@pytest.mark.parametrize("opset", range(18, 25))
def test_every_opset(opset: int) -> None:
    for case in (CASES["all-picks"], CASES["coverage-all-picks"], CASES["coverage-weighted-batch"]):
        for form in ("exact", "generic"):
            model = models.select_model(case, opset, form)
            models.check(model)
            assert np.array_equal(models.run_onnxruntime(model, case.inputs), reference(case)), (case.name, form)


@pytest.mark.parametrize("optimised", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        *("scores-only", "attention-fill", "all-picks", "attention-fill-float16", "all-picks-float16"),
        *(
            "coverage-scores-only",
            "coverage-attention-fill",
            "coverage-weighted-all-picks",
            "coverage-all-picks-float16",
        ),
    ],
)
def test_generic_body_serves_every_set_of_inputs(name: str, padded: bool, optimised: bool) -> None:
    case = CASES[name]
    for opset in OPSETS:
        if generic_serves(case, opset):
            model = models.select_model(case, opset, "generic", padded=padded)
            assert np.array_equal(models.run_onnxruntime(model, case.inputs, optimised=optimised), known(name))


@pytest.mark.parametrize("form", ["exact", "generic"])
@pytest.mark.parametrize("opset", OPSETS)
def test_onnxruntime_loads_bodies_without_a_warning(opset: int, form: str, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("released-1", "batch", "attention-fill", "scores-only", "one-token", "coverage-batch"):
        session = models.session_of(models.select_model(CASES[name], opset, form))
        models.run_session(session, CASES[name].inputs)
    assert capfd.readouterr().err == ""


def test_body_of_symbolic_shapes() -> None:
    for case, opset in product((CASES["batch"], CASES["coverage-weighted-batch"]), OPSETS):
        for form in ("exact", "generic"):
            model = models.select_model(case, opset, form)
            for value, letters in zip(model.graph.input, ("BV", "BVV", "m"), strict=True):
                for dim, letter in zip(value.type.tensor_type.shape.dim, letters, strict=True):
                    dim.dim_param = letter
            assert np.array_equal(models.run_onnxruntime(model, case.inputs), reference(case)), (opset, form)


@pytest.mark.parametrize("name", ["coverage-weighted-batch", "coverage-576-63"])
def test_the_number_of_threads_changes_nothing(name: str) -> None:
    case = CASES[name]
    model = models.select_model(case, 23, "exact")
    for threads in (1, 2):
        assert np.array_equal(models.run_onnxruntime(model, case.inputs, threads=threads), reference(case)), threads


# Anything the contract allows, with many ties, NaN and infinities.

special = st.sampled_from([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 0.5, 1.0])
numbers = st.one_of(special, st.floats(width=32), st.floats(-1, 1, width=16))


rules = st.sampled_from(
    [{}, {"diversity_rule": "farthest", "weighted": 1}]
    + [{"diversity_rule": "coverage"} | more for more in ({}, {"weighted": 0}, {"weighted": 1})]
)


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    tokens, batch = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    wide = draw(st.sampled_from([None, np.float32, np.float16]))
    similarity, seeds, diversity = None, None, 0
    if wide is not None:
        values = special if wide is np.float16 else numbers
        similarity = draw(hnp.arrays(np.float32, (batch, tokens, tokens), elements=values)).astype(wide)
        listed = draw(st.none() | st.lists(st.integers(0, tokens - 1), max_size=tokens + 2))
        seeds = None if listed is None else np.array(listed, np.int32)
        diversity = draw(st.integers(0, tokens))
    attention = draw(st.integers(0, tokens))
    return Case(
        "drawn",
        draw(hnp.arrays(np.float32, (batch, tokens), elements=numbers)),
        similarity,
        seeds,
        {
            "keep": draw(st.integers(1, tokens)),
            "attention_quota": attention,
            "diversity_quota": diversity,
            "pool": draw(st.integers(attention, tokens + 2)),
            "boundary": draw(st.integers(0, tokens + 2)),
            **draw(rules),
        },
    )


@settings(max_examples=300, deadline=None)
@given(any_case())
@example(CASES["similarity-infinite"])
def test_reference_follows_the_rules_on_anything(case: Case) -> None:
    indices = reference(case)
    assert indices.shape == (len(case.scores), case.attributes["keep"])
    assert np.all(np.diff(indices, axis=1) > 0)
    assert indices.min() >= 0
    assert indices.max() < case.scores.shape[1]
    assert indices.tolist() == oracle.select(case)
    assert np.array_equal(indices, reference(case))


@settings(max_examples=60, deadline=None)
@given(any_case(), st.sampled_from(OPSETS), st.sampled_from(["exact", "generic"]))
def test_bodies_on_anything(case: Case, opset: int, form: str) -> None:
    if form == "exact" or generic_serves(case, opset):
        model = models.select_model(case, opset, form)
        assert np.array_equal(models.run_onnxruntime(model, case.inputs), reference(case))


@settings(max_examples=15, deadline=None)
@given(any_case())
def test_reference_evaluator_on_anything(case: Case) -> None:
    model = models.select_model(case, 18, "exact")
    assert np.array_equal(models.run_evaluator(model, case.inputs), reference(case))


# Four each, so that one session and one evaluator of a body serve all. Of the 30 tokens they name none, 5, or 5 twice.
SEEDS = [[-4, -4, -4, -4], [30, 2**30, -1, 30], [30, 5, -(2**31), 31], [30, 5, 5, -1]]


@pytest.mark.parametrize("rule", [{}, {"diversity_rule": "coverage"}, {"diversity_rule": "coverage", "weighted": 1}])
@pytest.mark.parametrize("quotas", [(0, 0), (0, 3), (2, 0)])
def test_bodies_leave_out_seeds_that_name_no_token(quotas: tuple[int, int], rule: Any) -> None:
    """As if they were not there: with both quotas 0 and no seed left the fill starts from nothing."""
    attention, diversity = quotas
    counts = {"attention_quota": attention, "diversity_quota": diversity, "pool": attention}
    case = replace(CASES["batch"], attributes=CASES["batch"].attributes | counts | rule)
    calls = [replace(case, seeds=np.array(seeds, np.int32)) for seeds in SEEDS]
    inside = [[seed for seed in seeds if 0 <= seed < 30] for seeds in SEEDS]
    wanted = [reference(replace(case, seeds=np.array(seeds, np.int32))) for seeds in inside]
    for form, opset in product(("exact", "generic"), OPSETS):
        model = models.select_model(calls[0], opset, form, padded=form == "generic")
        for call, kept in zip(calls, wanted, strict=True):
            assert np.array_equal(models.run_onnxruntime(model, call.inputs), kept), (form, opset, call.seeds)
            assert np.array_equal(models.run_evaluator(model, call.inputs), kept), (form, opset, call.seeds)


# What follows from the rules.


def test_pure_farthest_point_sets_are_nested() -> None:
    case = CASES["diversity-only"]
    small = replace(case, similarity=case.similarity[:, :40, :40], scores=case.scores[:, :40])
    kept = [set(reference(replace(small, attributes=small.attributes | {"keep": k}))[0]) for k in range(1, 41)]
    assert all(fewer < more for fewer, more in pairwise(kept))


def test_coverage_from_nothing_is_nested() -> None:
    case = CASES["coverage-576-63"]
    small = replace(case, similarity=case.similarity[:, :40, :40], scores=case.scores[:, :40])
    kept = [set(reference(replace(small, attributes=small.attributes | {"keep": k}))[0]) for k in range(1, 41)]
    assert all(fewer < more for fewer, more in pairwise(kept))


def test_coverage_by_hand() -> None:
    """Token 2 is like 0, 1 and 3; after it only token 4 adds much; scores make token 0 count, and a 0 token 4 not."""
    similarity = np.eye(5, dtype=np.float32)
    similarity[2, [0, 1, 3]] = similarity[[0, 1, 3], 2] = 0.8
    case = Case("by-hand", np.array([[9, 1, 1, 1, 0]], np.float32), similarity[None], None, dict(COVERAGE))
    assert reference(case).tolist() == [[2, 4]]
    weighted = replace(case, attributes=COVERAGE | {"weighted": 1})
    assert reference(weighted).tolist() == [[0, 2]]


COVERAGE = {
    "keep": 2,
    "attention_quota": 0,
    "diversity_quota": 0,
    "pool": 0,
    "boundary": 0,
    "diversity_rule": "coverage",
}


def test_renumbering_tokens_renumbers_the_selection() -> None:
    case = CASES["quotas-full"]
    case = replace(case, attributes=case.attributes | {"boundary": 24})
    new = np.random.default_rng(3).permutation(24)
    similarity = case.similarity[:, new][:, :, new]
    moved = reference(replace(case, scores=case.scores[:, new], similarity=similarity))[0]
    assert sorted(new[moved]) == reference(case)[0].tolist()


def test_only_the_order_of_scores_matters() -> None:
    case = CASES["all-picks"]
    assert np.array_equal(reference(replace(case, scores=np.log(case.scores))), reference(case))


def test_batch_rows_are_independent() -> None:
    case = CASES["batch"]
    rows = [
        reference(replace(case, scores=case.scores[b : b + 1], similarity=case.similarity[b : b + 1]))
        for b in range(len(case.scores))
    ]
    assert np.array_equal(np.concatenate(rows), reference(case))


def test_float16_similarity_is_compared_in_float32() -> None:
    case = CASES["released-1-float16"]
    assert np.array_equal(reference(replace(case, similarity=case.similarity.astype(np.float32))), reference(case))


def test_nan_scores_rank_behind_minus_infinity() -> None:
    scores = torch.tensor([[float("nan"), float("-inf"), float("nan"), 1.0, float("-inf")]])
    settings_ = {"attention_quota": 0, "diversity_quota": 0, "pool": 0, "boundary": 0}
    kept = [select_tokens.reference(scores, None, None, keep=k, **settings_)[0].tolist() for k in range(1, 6)]
    assert kept == [[3], [1, 3], [1, 3, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4]]


# Wrong input.

GOOD = CASES["all-picks"]
PLAIN = CASES["scores-only"]


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        (GOOD, {"keep": 25}, "keep is 25"),
        (GOOD, {"keep": 0}, "keep is 0"),
        (GOOD, {"attention_quota": 12, "pool": 11}, "attention_quota is 12 but the pool"),
        (GOOD, {"attention_quota": 25, "pool": 25}, "attention_quota is 25"),
        (GOOD, {"attention_quota": -1}, "attention_quota is -1"),
        (GOOD, {"diversity_quota": 25}, "diversity_quota is 25"),
        (GOOD, {"diversity_quota": -1}, "diversity_quota is -1"),
        (GOOD, {"boundary": -1}, "boundary is -1"),
        (GOOD, {"diversity_rule": "nearest"}, 'diversity_rule is "nearest"'),
        (GOOD, {"diversity_rule": "coverage", "weighted": 2}, "weighted is 2"),
        (PLAIN, {"diversity_quota": 1}, "diversity_quota is 1, and there is no similarity"),
    ],
)
def test_attributes_that_do_not_fit(case: Case, changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        reference(replace(case, attributes=case.attributes | changes))
    assert len(caught.value.lines()) == 3


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (replace(GOOD, similarity=None, attributes=GOOD.attributes | {"diversity_quota": 0}), "there are seeds"),
        (replace(GOOD, seeds=np.array([1, 24])), r"seeds hold \[24\]"),
        (replace(GOOD, seeds=np.array([-1])), r"seeds hold \[-1\]"),
        (replace(GOOD, seeds=np.array([1.0])), r"seeds is \[1\] float64"),
        (replace(GOOD, scores=GOOD.scores[0]), r"scores is \[24\] float32"),
        (replace(GOOD, scores=GOOD.scores.astype(np.float16)), r"scores is \[1, 24\] float16"),
        (replace(GOOD, similarity=GOOD.similarity[:, :23]), r"similarity is \[1, 23, 24\] float32"),
        (replace(GOOD, similarity=GOOD.similarity.astype(np.float64)), r"similarity is \[1, 24, 24\] float64"),
    ],
)
def test_tensors_that_do_not_fit(case: Case, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        reference(case)
    assert len(caught.value.lines()) == 3


def test_bodies_that_cannot_be() -> None:
    with pytest.raises(InputError, match="opset 17"):
        select_tokens.function(17)
    with pytest.raises(InputError, match="seeds and no similarity"):
        select_tokens.body(18, similarity=False, seeds=True)
