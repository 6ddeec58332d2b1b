"""BtpLinear: the CUDA kernels (their source, emulated) and the ONNX Runtime operator agree with the reference."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs import dtypes
from graphs.ops.common.trt_python import Tensor
from graphs.ops.linear.cases import Case, cases, make
from graphs.ops.linear.trt_python import Linear
from graphs.records.errors import InputError
from tests.engines.native.ort_host import gpu_host
from tests.graphs.ops.agreement import assert_agree
from tests.graphs.ops.linear_backends import custom_op, emulated, kernels
from tests.graphs.ops.test_linear import reference

CASES = {case.name: case for case in cases()}
every_case = pytest.mark.parametrize("name", CASES)


@every_case
def test_the_kernels_agree_with_the_reference(name: str) -> None:
    assert_agree(emulated(CASES[name]), reference(CASES[name]))


@every_case
def test_the_custom_operator_agrees_with_the_reference(name: str) -> None:
    assert_agree(custom_op(CASES[name]), reference(CASES[name]))


@pytest.mark.parametrize("name", ["zeros-and-bias", "odd-groups-16", "odd-bfloat16", "prefill-float16"])
def test_words_are_the_same_bytes(name: str) -> None:
    assert emulated(CASES[name], as_words=True).tobytes() == emulated(CASES[name]).tobytes()


@pytest.mark.parametrize("name", ["rows-17", "few-rows-float16", "long-k-rows-float16"])
def test_the_kernels_give_the_same_bits_again(name: str) -> None:
    """The emulation runs blocks and threads in another order every time. The last one is summed in parts."""
    assert emulated(CASES[name]).tobytes() == emulated(CASES[name]).tobytes()


@st.composite
def products(draw: Any) -> Case:
    """Any legal call that the emulation runs in a second. N is large enough for a row's norm to mean something."""
    group = draw(st.sampled_from([16, 32, 64, 128, 256]))
    dtype = draw(st.sampled_from([np.float32, np.float16, dtypes.BFLOAT16]))
    return make(
        f"drawn-{draw(st.integers(0, 10**6))}",
        draw(st.integers(1, 40)),
        draw(st.integers(8, 70)),
        group * draw(st.integers(1, 512 // group)),
        group,
        zeros=draw(st.booleans()),
        bias=draw(st.booleans()),
        dtype=dtype,
    )


@settings(max_examples=60, deadline=None)
@given(case=products())
def test_the_kernels_agree_on_drawn_calls(case: Case) -> None:
    assert_agree(emulated(case), reference(case))


@settings(max_examples=40, deadline=None)
@given(case=products())
def test_the_custom_operator_agrees_on_drawn_calls(case: Case) -> None:
    assert_agree(custom_op(case), reference(case))


def test_weights_are_rounded_once_in_every_form() -> None:
    """-15 times this scale has more bits than float16; a second group takes the rest away (test_linear.py)."""
    scales = np.array([[1.0009765625, 1]], np.float16)
    qweight = np.array([[[0x00] * 8, [0xFF] * 8]], np.uint8)
    zeros = np.array([[0x0F]], np.uint8)
    for rows in (1, 9):  # both kernels
        case = Case("once", np.ones((rows, 32), np.float16), qweight, scales, zeros, None, {"bits": 4, "group": 16})
        assert (emulated(case) == -0.25).all()
        assert (custom_op(case) == -0.25).all()


def test_halves_at_their_ends_go_through_the_custom_operator() -> None:
    """Subnormal, largest and infinite results are rounded as numpy rounds them."""
    x = np.diag(np.float16([6e-8, 3e-6, 1.5e-5, 1.0, 2.0, 0, 0, 0] + [0] * 8))
    scales = np.full((1, 1), 1e-3, np.float16)
    case = make("ends", 16, 1, 16, 16, dtype=np.float16)
    for scale in (scales, scales * np.float16(6e4)):
        ends = Case("ends", x, case.qweight, scale, case.zeros, None, case.attributes)
        np.testing.assert_array_equal(custom_op(ends), reference(ends))


@pytest.mark.parametrize("m", [1, 8, 9, 16, 17, 33, 64, 70, 150, 640])
@pytest.mark.parametrize(("n", "k"), [(16, 64), (512, 3584), (4096, 4096), (3584, 18944), (13824, 5120)])
def test_both_forms_of_the_plugin_ask_for_the_same_workspace(m: int, n: int, k: int) -> None:
    shapes = {"x": (m, k), "qweight": (n, k // 8), "scales": (n, k // 64)}
    for dtype in ("float16", "float32"):
        kinds = {"x": dtype, "qweight": "int32", "scales": dtype}
        tensors = [Tensor(0, shapes[name], kinds[name]) for name in shapes]
        asked = Linear(4, 64).workspace(tensors)
        assert asked == kernels().workspace("linear", tensors, bits=4, group=64)
        assert asked <= 16 << 20


GOOD = make("good", 2, 8, 64, 32, bias=True)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"bits": 8, "group": 32}, "bits is 8, wanted 4"),
        ({"bits": 4, "group": 48}, "group is 48, wanted 16, 32, 64, 128 or 256"),
        ({"bits": 4, "group": 128}, r"\(K\) is 64, wanted a multiple of group 128"),
    ],
    ids=str,
)
def test_wrong_attributes_are_refused(attributes: dict[str, int], message: str) -> None:
    case = Case("wrong", GOOD.x, GOOD.qweight, GOOD.scales, GOOD.zeros, GOOD.bias, attributes)
    for run in (emulated, custom_op):
        with pytest.raises((InputError, RuntimeError), match=f"BtpLinear: .*{message}"):
            run(case)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": GOOD.x[0]}, "Invalid|rank|x has shape"),
        ({"qweight": GOOD.qweight[:, :1]}, r"qweight has shape \[8,1,16\], wanted \[8,2,16\]"),
        ({"scales": GOOD.scales[:, :1]}, r"scales has shape \[8,1\], wanted \[8,2\]"),
        ({"zeros": GOOD.zeros[:3]}, r"zeros has shape \[3,1\], wanted \[8,1\]"),
        ({"bias": GOOD.bias[:3]}, r"bias has shape \[3\], wanted \[8\]"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_the_custom_operator_refuses_wrong_shapes(changes: dict[str, Any], message: str) -> None:
    given = {name: np.ascontiguousarray(array) for name, array in (GOOD.inputs | changes).items()}
    with pytest.raises(RuntimeError, match=message):
        custom_op(Case("wrong", *(given[name] for name in GOOD.inputs), GOOD.attributes))


@pytest.mark.parametrize("name", ["zeros-and-bias", "bias", "odd-float16", "few-rows-bfloat16", "long-k-rows-float16"])
def test_onnx_runtime_on_cuda_agrees_and_gives_its_memory_back(name: str) -> None:
    case = CASES[name]
    aligned = {key: np.ascontiguousarray(array) for key, array in case.inputs.items()}
    assert_agree(gpu_host().linear(aligned, case.attributes), reference(case))
    assert gpu_host().without_stream == 0
    assert not gpu_host().scratch, "all of it was given back"
