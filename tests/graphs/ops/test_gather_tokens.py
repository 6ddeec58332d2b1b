"""BtpGatherTokens: every form against the reference, the reference against plain slices."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs.ops import gather_tokens
from graphs.ops.gather_tokens import Case
from graphs.records.errors import InputError
from tests.graphs.ops import models

OPSETS = (18, 23)
CASES = {case.name: case for case in gather_tokens.cases()}
every_case = pytest.mark.parametrize("name", CASES)


def tensor(array: Any) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def reference(case: Case) -> torch.Tensor:
    return gather_tokens.reference(tensor(case.tokens), tensor(case.indices), **case.attributes)


def by_slices(case: Case) -> Any:
    start, stop = case.attributes["start"], case.attributes["start"] + case.attributes["count"]
    rows = zip(case.tokens, case.indices, strict=True)
    return np.stack([np.concatenate([x[:start], x[start:stop][index], x[stop:]]) for x, index in rows])


def same_bits(got: Any, wanted: Any) -> bool:
    return bool(got.shape == wanted.shape and got.tobytes() == wanted.tobytes())


@every_case
def test_reference_gathers_rows(name: str) -> None:
    case = CASES[name]
    kept = reference(case)
    assert same_bits(kept.view(torch.uint8).numpy(), by_slices(case).view(np.uint8))


@pytest.mark.parametrize("opset", OPSETS)
@every_case
def test_body_in_onnxruntime(name: str, opset: int) -> None:
    case = CASES[name]
    model = models.gather_model(case, opset)
    models.check(model)
    kept = models.run_onnxruntime(model, case.inputs)
    if case.tokens.dtype.name == "bfloat16":
        kept = torch.utils.dlpack.from_dlpack(kept).view(torch.int16).numpy().view(case.tokens.dtype)
    assert same_bits(kept, by_slices(case))


@pytest.mark.parametrize("opset", OPSETS)
@every_case
def test_body_in_reference_evaluator(name: str, opset: int) -> None:
    case = CASES[name]
    assert same_bits(models.run_evaluator(models.gather_model(case, opset), case.inputs), by_slices(case))


def test_onnxruntime_loads_bodies_without_a_warning(capfd: pytest.CaptureFixture[str]) -> None:
    for case in CASES.values():
        models.run_session(models.session_of(models.gather_model(case, 18)), case.inputs)
    assert capfd.readouterr().err == ""


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    shape = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    batch, rows = shape[:2]
    start = draw(st.integers(0, rows - 1))
    count = draw(st.integers(1, rows - start))
    kept = draw(st.integers(1, 5))
    indices = draw(st.lists(st.integers(0, count - 1), min_size=batch * kept, max_size=batch * kept))
    tokens = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return Case("drawn", tokens, np.array(indices, np.int32).reshape(batch, kept), {"start": start, "count": count})


@settings(max_examples=40, deadline=None)
@given(any_case(), st.sampled_from(OPSETS))
def test_all_forms_on_anything(case: Case, opset: int) -> None:
    wanted = by_slices(case)
    model = models.gather_model(case, opset)
    assert same_bits(reference(case).numpy(), wanted)
    assert same_bits(models.run_onnxruntime(model, case.inputs), wanted)
    assert same_bits(models.run_evaluator(model, case.inputs), wanted)


GOOD = CASES["batch"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (replace(GOOD, attributes={"start": -1, "count": 2}), "start is -1"),
        (replace(GOOD, attributes={"start": 21, "count": 0}), "start is 21"),
        (replace(GOOD, attributes={"start": 10, "count": 11}), "count is 11"),
        (replace(GOOD, attributes={"start": 10, "count": 0}), "5 indices into no rows"),
        (replace(GOOD, indices=GOOD.indices + 12), r"indices hold \["),
        (replace(GOOD, indices=GOOD.indices - 12), r"indices hold \[-"),
        (replace(GOOD, indices=GOOD.indices[:2]), r"indices is \[2, 5\] int32"),
        (replace(GOOD, indices=GOOD.indices[0]), r"indices is \[5\] int32"),
        (replace(GOOD, indices=GOOD.indices.astype(np.float32)), r"indices is \[3, 5\] float32"),
        (replace(GOOD, tokens=GOOD.tokens[:, 0, 0]), r"tokens is \[3\] float32"),
        (replace(GOOD, tokens=GOOD.tokens.astype(np.int32)), r"tokens is \[3, 20, 8\] int32"),
    ],
)
def test_input_that_does_not_fit(case: Case, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        reference(case)
    assert len(caught.value.lines()) == 3


def test_no_body_below_opset_18() -> None:
    with pytest.raises(InputError, match="opset 17"):
        gather_tokens.function(17)
