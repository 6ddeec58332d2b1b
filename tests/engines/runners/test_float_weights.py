"""Products of btp_ort with float32 weights as they are stored: the definition, whatever the sizes and other rows."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from engines.runners.on_cpu import float_weights
from engines.runners.onnxruntime import OrtLoader
from tests.engines.native import builds
from tests.engines.runners.native_cpu import here

Array = np.ndarray[Any, np.dtype[Any]]


def model_of(node: str, weight: Array, *, inputs: int | None = None, rows: int | str = "M") -> onnx.ModelProto:
    """One product; Gemm as files have it, or the node of btp_ort itself."""
    own = node == float_weights.FLOAT
    made = helper.make_node(node, ["x", "w"], ["y"], domain="btp" if own else "", **({} if own else {"transB": 1}))
    graph = helper.make_graph(
        [made],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, inputs or weight.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, len(weight)])],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("btp", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def product(x: Array, weight: Array, threads: int = 2) -> Array:
    """By the operator, for any number of rows."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(builds.ort_library()))
    model = model_of(float_weights.FLOAT, weight, inputs=x.shape[1]).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})
    return np.asarray(found)


def numbers(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_is_product(found: Array, x: Array, weight: Array) -> None:
    """Within the rounding of chains of sums in float32, of the norms."""
    wide, other = x.astype(np.float64), weight.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1)[:, None] * np.linalg.norm(other, axis=1)
    assert (np.abs(found - wide @ other.T) <= 2e-6 * norms).all()


@here
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 40), inputs=st.integers(1, 40), outputs=st.integers(1, 12), threads=st.integers(1, 3))
def test_is_the_definition(rows: int, inputs: int, outputs: int, threads: int) -> None:
    x, weight = numbers(rows, rows, 16 * inputs), numbers(outputs, 32 * outputs, 16 * inputs)
    assert_is_product(product(x, weight, threads), x, weight)


@here
def test_many_rows_are_taken_in_blocks() -> None:
    """More rows than stay in the cache, more places than are laid out at once, a last part that is narrower."""
    x, weight = numbers(0, 1553, 528), numbers(1, 288, 528)
    found = product(x, weight)
    assert_is_product(found, x, weight)
    np.testing.assert_array_equal(product(x, weight, 1), found)
    np.testing.assert_array_equal(product(x, weight, 3), found)
    np.testing.assert_array_equal(product(x[700:717], weight), found[700:717])
    np.testing.assert_array_equal(product(x[900:1537], weight), found[900:1537])


@here
@pytest.mark.parametrize("inputs", [272, 2064])  # the second is too long for one column after the other
def test_few_rows_do_not_depend_on_each_other(inputs: int) -> None:
    """As many as are taken at once: fours, and all that are left."""
    x, weight = numbers(0, 15, inputs), numbers(1, 160, inputs)
    assert_is_product(product(x, weight), x, weight)
    alone = [product(row[None], weight, 1)[0] for row in x]
    for count in range(2, 16):
        np.testing.assert_array_equal(product(x[:count], weight), alone[:count])


@here
@pytest.mark.parametrize("more", [0, 17])  # to few rows, many
def test_nan_and_infinity_stay_in_their_row_and_column(more: int) -> None:
    x, weight = numbers(0, 13 + more, 64), numbers(1, 32, 64)
    x[7, 5], x[11, 60], weight[3, 9] = np.nan, np.inf, np.nan
    found = product(x, weight)
    lost = np.zeros((13 + more, 32), bool)
    lost[7], lost[:, 3] = True, True
    np.testing.assert_array_equal(np.isnan(found), lost)
    assert np.isinf(found[11, ~lost[11]]).all()
    assert len(product(x[:0], weight)) == 0


@here
@pytest.mark.parametrize(("inputs", "weight"), [(8, (32, 8)), (16, (16, 16)), (16, (32, 32))])
def test_other_sizes_are_refused(inputs: int, weight: tuple[int, int]) -> None:
    with pytest.raises(InvalidArgument, match=r"wanted .M,K. and .N,K., K a multiple of 16 and N one of 32"):
        product(numbers(0, 2, inputs), numbers(0, *weight))


@here
def test_a_session_reads_the_weights_as_they_are_stored(tmp_path: Path) -> None:
    weight = numbers(0, 1024, 1024)
    path = tmp_path / "product.onnx"
    onnx.save(model_of("Gemm", weight, rows=400), path)
    x = numbers(1, 400, 1024)
    found = OrtLoader(threads=2, custom_ops=builds.ort_library())(path).run({"x": x})["y"]
    np.testing.assert_array_equal(found, product(x, weight, 1))
    plain = OrtLoader(threads=1)(path).run({"x": x})["y"]
    np.testing.assert_allclose(found, plain, atol=1e-6 * 1024)


def test_what_is_replaced() -> None:
    wide = np.zeros((1024, 1024), np.float32)
    cases = {
        "many rows": (model_of("Gemm", wide, rows=64), True),
        "a batch of a few": (model_of("Gemm", wide, rows=8), True),
        "more rows": (model_of("Gemm", wide, rows=9), False),
        "not yet many": (model_of("Gemm", wide, rows=63), False),
        "any number of rows": (model_of("Gemm", wide), False),
        "small weights": (model_of("Gemm", wide[:512], rows=64), False),
        "other columns": (model_of("Gemm", np.zeros((1040, 1024), np.float32), rows=64), False),
        "other places": (model_of("Gemm", np.zeros((1024, 1032), np.float32), rows=64), False),
        "float16": (model_of("Gemm", wide.astype(np.float16), rows=64), False),
    }
    scaled = model_of("Gemm", wide, rows=64)
    scaled.graph.node[0].attribute.append(helper.make_attribute("alpha", 2.0))
    for name, (model, replaced) in (cases | {"scaled": (scaled, False)}).items():
        float_weights.for_cpu(model)
        assert [node.op_type for node in model.graph.node] == [float_weights.FLOAT if replaced else "Gemm"], name
