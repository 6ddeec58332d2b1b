"""BtpGatherTokens: the CUDA kernel (its source, emulated) and the ONNX Runtime operator equal the reference."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs.ops import gather_tokens
from graphs.ops.gather_tokens.cases import Case, cases
from graphs.records.errors import InputError
from tests.graphs.ops.native_backends import BACKENDS, Array, backend


def raw(array: Array) -> Array:
    """The bits as integers, so that NaN equals itself and torch knows the type."""
    return array.view({2: np.int16, 4: np.int32, 8: np.int64}[array.dtype.itemsize])


def assert_equals_the_reference(case: Case, name: str) -> None:
    # Whatever the elements are, the operator moves bits: the reference moves them as float32 or float64 of that size.
    kinds = {2: torch.float16, 4: torch.float32, 8: torch.float64}
    tokens = torch.from_numpy(raw(case.tokens).copy()).view(kinds[case.tokens.dtype.itemsize])
    wanted = gather_tokens.reference(tokens, torch.from_numpy(case.indices), **case.attributes)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[case.tokens.dtype.itemsize]
    got = backend(name).gather(case.inputs, case.attributes)
    assert got.dtype == case.tokens.dtype
    np.testing.assert_array_equal(raw(got), wanted.view(bits).numpy())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_equals_the_reference(case: Case, name: str) -> None:
    assert_equals_the_reference(case, name)


@st.composite
def gathers(draw: Any) -> Case:
    """Any legal call: rows of every size in bytes, also those no wide read fits."""
    start, count, after = draw(st.integers(0, 5)), draw(st.integers(1, 9)), draw(st.integers(0, 5))
    shape = (
        draw(st.integers(1, 3)),
        start + count + after,
        *draw(st.sampled_from([(), (1,), (3,), (8,), (5, 3), (260,)])),
    )
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16, np.float64]))
    indices = random.integers(0, count, (shape[0], draw(st.integers(1, count)))).astype(np.int32)
    return Case("drawn", random.standard_normal(shape).astype(dtype), indices, {"start": start, "count": count})


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(case=gathers())
def test_equals_the_reference_on_drawn_calls(case: Case, name: str) -> None:
    assert_equals_the_reference(case, name)


TOKENS, INDICES = np.zeros((2, 8, 4), np.float32), np.zeros((2, 3), np.int32)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"start": -1, "count": 4}, "start is -1, wanted 0 to 8"),
        ({"start": 9, "count": 0}, "start is 9, wanted 0 to 8"),
        ({"start": 3, "count": 6}, "count is 6, wanted 0 to 5"),
        ({"start": 3, "count": 0}, "the number of indices is 3, wanted 0"),
    ],
    ids=str,
)
def test_refuses_settings_that_do_not_fit(name: str, attributes: dict[str, int], message: str) -> None:
    with pytest.raises((InputError, RuntimeError), match=message):
        backend(name).gather({"tokens": TOKENS, "indices": INDICES}, attributes)


def test_the_custom_op_refuses_wrong_shapes_and_indices() -> None:
    ort = backend("ort-custom-op")
    with pytest.raises(RuntimeError, match=r"indices has shape \[1,3\], wanted \[2,k\]"):
        ort.gather({"tokens": TOKENS, "indices": INDICES[:1]}, {"start": 2, "count": 4})
    with pytest.raises(RuntimeError, match="index 4 is outside 0 to 3"):
        ort.gather({"tokens": TOKENS, "indices": INDICES + 4}, {"start": 2, "count": 4})


def test_the_kernel_keeps_wrong_indices_inside_the_tensor() -> None:
    tokens = np.arange(6, dtype=np.float32).reshape(1, 6)
    got = backend("cuda-kernel-emulated").gather(
        {"tokens": tokens, "indices": np.int32([[-9, 99]])}, {"start": 1, "count": 4}
    )
    assert got.tolist() == [[0.0, 1.0, 4.0, 5.0]]
