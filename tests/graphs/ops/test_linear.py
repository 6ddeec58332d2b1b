"""BtpLinear: packing, the reference against its definition, the portable bodies against the reference."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented

from graphs import dtypes, packing
from graphs.ops import linear
from graphs.ops.linear import Case
from graphs.ops.linear.cases import make
from graphs.records.errors import InputError
from tests.graphs.ops import models
from tests.graphs.ops.agreement import assert_agree, rounded_product

CASES = {case.name: case for case in linear.cases()}
every_case = pytest.mark.parametrize("name", CASES)


def reference(case: Case) -> Any:
    tensors = {name: dtypes.torch_of_numpy(array) for name, array in case.inputs.items()}
    inputs = [tensors.get(name) for name in ("x", "qweight", "scales", "zeros", "bias")]
    return dtypes.numpy_of_torch(linear.reference(*inputs, **case.attributes))


# -- packing ---------------------------------------------------------------------------------------------------------


def test_codes_lie_two_in_a_byte_the_first_one_low() -> None:
    codes = np.arange(32).reshape(1, 32) % 16
    packed = packing.pack(codes, 16)
    assert packed.shape == (1, 2, 8)
    assert packed[0, 0].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert packing.words(packed).tolist() == [[0x76543210, 0xFEDCBA98 - 2**32] * 2]
    assert packing.pack_zeros(np.array([[1, 2, 3], [4, 5, 6]])).tolist() == [[0x21, 0x03], [0x54, 0x06]]


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 5), groups=st.integers(1, 9), group=st.sampled_from([16, 32, 64, 128, 256]), seed=st.integers(0)
)
def test_unpacking_gives_back_what_was_packed(n: int, groups: int, group: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    codes, zeros = random.integers(0, 16, (n, groups * group)), random.integers(0, 16, (n, groups))
    packed, packed_zeros = packing.pack(codes, group), packing.pack_zeros(zeros)
    np.testing.assert_array_equal(packing.unpack(packed), codes)
    np.testing.assert_array_equal(packing.unpack_zeros(packed_zeros, groups), zeros)
    assert packing.words(packed).tobytes() == packed.tobytes()
    assert packing.zero_words(packed_zeros).tobytes()[: packed_zeros.size] == packed_zeros.tobytes()
    assert len(packing.zero_words(packed_zeros)) == -(-packed_zeros.size // 4)


def test_words_are_views() -> None:
    packed = packing.pack(np.zeros((4, 64), np.int64), 32)
    assert np.shares_memory(packing.words(packed), packed)


@every_case
def test_numpy_and_torch_give_the_same_weights(name: str) -> None:
    from graphs.ops.linear.torch_reference import dequantised

    case = CASES[name]
    given = (case.qweight, case.scales, case.zeros)
    wanted = dequantised(*(None if array is None else dtypes.torch_of_numpy(array) for array in given))
    assert packing.dequantise(*given).tobytes() == dtypes.numpy_of_torch(wanted).tobytes()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: packing.pack(np.full((2, 32), 16), 16), "codes go from 16 to 16"),
        (lambda: packing.pack(np.full((2, 32), -1), 16), "codes go from -1 to -1"),
        (lambda: packing.pack(np.zeros((2, 40), int), 16), "group is 16 and K is 40"),
        (lambda: packing.pack(np.zeros((2, 40), int), 20), "group is 20"),
        (lambda: packing.pack(np.zeros((2, 32)), 16), r"codes is \[2, 32\] float64"),
        (lambda: packing.pack_zeros(np.full((2, 3), 16)), "zeros go from 16 to 16"),
        (lambda: packing.unpack_zeros(np.zeros((2, 2), np.uint8), 5), r"zeros has shape \[2, 2\]"),
        (lambda: packing.unpack(np.zeros((2, 2), np.int8)), r"qweight is \[2, 2\] int8"),
        (lambda: packing.check_scales(np.array([[1, np.nan]], np.float16)), r"scales holds nan at \[0, 1\]"),
        (lambda: packing.check_scales(np.array([[np.inf]], np.float32)), r"scales holds inf at \[0, 0\]"),
    ],
)
def test_packing_refuses(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


# -- the reference ---------------------------------------------------------------------------------------------------


@every_case
def test_reference_agrees_with_the_definition(name: str) -> None:
    case = CASES[name]
    assert_agree(reference(case), rounded_product(case))


def test_w_is_rounded_once_to_the_type_of_x() -> None:
    """-15 times this scale needs more than the 11 bits of float16; a second group of 15 takes the rest away."""
    scales = np.array([[1.0009765625, 1]], np.float16)
    codes, zeros = np.repeat([[0, 15]], 16, axis=1), np.array([[15, 0]])
    packed = packing.pack(codes, 16), scales, packing.pack_zeros(zeros)
    case = Case("once", np.ones((1, 32), np.float16), *packed, None, {"bits": 4, "group": 16})
    assert packing.dequantise(*packed)[0, 0].item() == -15.015625
    assert reference(case).item() == -0.25  # with unrounded weights it would be -0.234375


GOOD = make("good", 2, 8, 64, 32, bias=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "bits is 8"),
        ({"group": 48}, "group is 48"),
        ({"group": 8}, "group is 8"),
        ({"group": 128}, "group is 128 and K is 64"),
        ({"x": GOOD.x[0]}, r"x has shape \[64\]"),
        ({"qweight": GOOD.qweight[:, :1]}, r"qweight has shape \[8, 1, 16\]\nwanted: \[8, 2, 16\]"),
        ({"qweight": GOOD.qweight.reshape(8, 32)}, r"qweight has shape \[8, 32\]"),
        ({"qweight": GOOD.qweight.view(np.int8)}, "qweight is int8\nwanted: uint8"),
        ({"scales": GOOD.scales[:, :1]}, r"scales has shape \[8, 1\]\nwanted: \[8, 2\]"),
        ({"scales": GOOD.scales.astype(np.float16)}, "scales is float16\nwanted: float32"),
        ({"zeros": GOOD.zeros.repeat(2, axis=1)}, r"zeros has shape \[8, 2\]\nwanted: \[8, 1\]"),
        ({"zeros": GOOD.scales}, "zeros is float32\nwanted: uint8"),
        ({"bias": GOOD.bias[:3]}, r"bias has shape \[3\]\nwanted: \[8\]"),
        ({"bias": GOOD.bias.astype(np.float64)}, "bias is float64\nwanted: float32"),
        ({"x": GOOD.x.astype(np.float64)}, "x is float64\nwanted: float32 or float16 or bfloat16"),
    ],
    ids=str,
)
def test_reference_names_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    arguments = GOOD.inputs | GOOD.attributes | changes
    tensors = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in arguments.items()}
    with pytest.raises(InputError, match=f"^BtpLinear: {message}"):
        linear.reference(**tensors)


# -- portable bodies -------------------------------------------------------------------------------------------------

FORMS = [(18, "exact"), (18, "generic"), (23, "exact")]


@pytest.mark.parametrize(("opset", "form"), FORMS)
@every_case
def test_body_in_onnxruntime(name: str, opset: int, form: str) -> None:
    case = CASES[name]
    model = models.linear_model(case, opset, form)
    models.check(model)
    if case.x.dtype.name == "bfloat16" and form == "generic":
        with pytest.raises(NotImplemented, match="Gemm"):  # if this fails, the generic body serves bfloat16 too
            models.run_onnxruntime(model, case.inputs)
        return
    y = models.run_onnxruntime(model, case.inputs)
    if case.x.dtype.name == "bfloat16":
        y = torch.utils.dlpack.from_dlpack(y).view(torch.int16).numpy().view(case.x.dtype)
    assert_agree(y, reference(case))


@pytest.mark.parametrize(("opset", "form"), FORMS[1:])
@every_case
def test_body_in_reference_evaluator(name: str, opset: int, form: str) -> None:
    case = CASES[name]
    assert_agree(models.run_evaluator(models.linear_model(case, opset, form), case.inputs), reference(case))


def test_onnxruntime_loads_bodies_without_a_warning(capfd: pytest.CaptureFixture[str]) -> None:
    for case in (CASES["plain"], CASES["bias"], CASES["zeros-and-bias"]):
        for form in ("exact", "generic"):
            models.run_session(models.session_of(models.linear_model(case, 18, form)), case.inputs)
    assert capfd.readouterr().err == ""
