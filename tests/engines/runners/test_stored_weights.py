"""Products of btp_ort with weights as they are stored: the definition, with rows in int8 for those of four bits."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from engines.runners.on_cpu import linear
from graphs.dtypes import BFLOAT16
from graphs.ops.linear import function
from graphs.records.errors import BtpError
from tests.engines.runners.native_cpu import here
from tests.engines.runners.sessions import opened

Array = np.ndarray[Any, np.dtype[Any]]
OUTPUTS = 84  # a part of 64 columns, one of 16 and four more


def weights(inputs: int, group: int, *, zeros: bool, bias: bool) -> dict[str, Array]:
    """In float32, with scales and bias that float16 holds."""
    rng = np.random.default_rng(inputs + group)
    groups = inputs // group
    made: dict[str, Array] = {
        "qweight": rng.integers(0, 256, (OUTPUTS, groups, group // 2), np.uint8),
        "scales": (rng.random((OUTPUTS, groups)) * 0.1 + 0.01).astype(np.float16).astype(np.float32),
    }
    if zeros:
        made["zeros"] = rng.integers(0, 256, (OUTPUTS, (groups + 1) // 2), np.uint8)
    if bias:
        made["bias"] = rng.standard_normal(OUTPUTS).astype(np.float16).astype(np.float32)
    return made


def rows_of(count: int, inputs: int, dtype: Any = np.float32) -> Array:
    """Rows whose groups are of very different sizes, one of them zeros; no product leaves the range of float16."""
    rng = np.random.default_rng(count)
    x = rng.standard_normal((count, inputs)) * 10.0 ** rng.integers(-3, 3, (count, inputs // 16)).repeat(16, 1)
    x[0, :16] = 0
    return x.astype(dtype)


def model_of(
    given: dict[str, Array], rows: int, group: int, *, half: bool = False, dtype: Any = np.float32
) -> onnx.ModelProto:
    """One BtpLinear; half: its scales are stored in float16 and cast, as those of a float16 checkpoint may be."""
    inputs = given["qweight"].shape[1] * group
    floats = {"scales": np.float16 if half else dtype, "bias": dtype}
    stored = {name: array.astype(floats.get(name, np.uint8)) for name, array in given.items()}
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = []
    if half:
        nodes = [helper.make_node("Cast", ["stored"], ["scales"], to=TensorProto.FLOAT)]
        stored["stored"] = stored.pop("scales")
    names = ["x", "qweight", "scales", *(name if name in given else "" for name in ("zeros", "bias"))]
    nodes.append(helper.make_node("BtpLinear", names, ["y"], domain="btp", bits=4, group=group))
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", element, [rows, inputs])],
        [helper.make_tensor_value_info("y", element, [rows, len(given["qweight"])])],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("btp", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[function(23)])


def multiplied_out(given: dict[str, Array], group: int) -> Array:
    """The weights [N,K] in float64."""
    codes = np.stack([given["qweight"] & 15, given["qweight"] >> 4], -1).reshape(OUTPUTS, -1, group).astype(np.float64)
    zeros: Any = 8
    if "zeros" in given:
        both = np.stack([given["zeros"] & 15, given["zeros"] >> 4], -1).reshape(OUTPUTS, -1)
        zeros = both[:, : codes.shape[1], None]
    return ((codes - zeros) * given["scales"][:, :, None]).reshape(OUTPUTS, -1)


def rounded(x: Array, group: int) -> Array:
    """Rows in int8, in groups of at most 128, as the numbers that they stand for."""
    parts = x.reshape(len(x), -1, min(group, 128))
    most = np.abs(parts).max(-1, keepdims=True)
    by = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    codes = np.rint(parts * by).astype(np.float64)
    return (codes * (most / np.float32(127))).reshape(x.shape)


def run(model: onnx.ModelProto, x: Array, folder: Path, threads: int = 1) -> Array:
    return opened(model, folder, threads=threads, accuracy_level=4).run({"x": x})["y"]


def half_a_place(y: Array, dtype: Any) -> Array:
    """How far rounding to a type may move numbers: nothing for float32, whose sums have errors of their own."""
    return np.spacing(np.abs(y).astype(np.float16)).astype(np.float64) / 2 if dtype == np.float16 else np.zeros(y.shape)


@here
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("rows", [6, 21])  # few, in fours and one by one; more than are rounded together, in two tiles
@pytest.mark.parametrize(
    ("group", "inputs"), [(16, 128), (16, 1152), (32, 384), (32, 1664), (64, 256), (128, 1408), (256, 512), (256, 1792)]
)
def test_is_the_definition_with_rows_in_int8(
    group: int, inputs: int, rows: int, zeros: bool, dtype: Any, tmp_path: Path
) -> None:
    """Rows longer than the parts of 512 places that many rows are multiplied in too, with a last part of any length."""
    half, bias = group in (16, 64) and dtype == np.float32, group != 128
    given = weights(inputs, group, zeros=zeros, bias=bias)
    x = rows_of(rows, inputs, dtype)
    found = run(model_of(given, len(x), group, half=half, dtype=dtype), x, tmp_path, threads=2)
    assert found.dtype == dtype
    x, w, added = x.astype(np.float32), multiplied_out(given, group), given.get("bias", np.zeros(OUTPUTS))
    norm = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(w, axis=1)
    exact = rounded(x, group) @ w.T + added
    assert (np.abs(found - exact) <= 2e-6 * norm + half_a_place(exact, dtype)).all()
    assert (np.abs(found - (x @ w.T + added)) <= 1e-2 * norm).all()


@here
@settings(max_examples=30, deadline=None)
@drawn(
    group=st.sampled_from([16, 32, 64, 128, 256]),
    blocks=st.integers(1, 3),
    rows=st.sampled_from([1, 2, 5, 6, 9, 30]),
    zeros=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_of_float16_are_those_of_float32_rounded_at_the_end(
    group: int, blocks: int, rows: int, zeros: bool, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bit for bit: subnormal numbers, the largest, infinities and NaN in rows, and sums beyond float16, included."""
    inputs = blocks * max(group, 128)
    given = weights(inputs, group, zeros=zeros, bias=True)
    x = np.random.default_rng(seed).integers(0, 2**16, (rows, inputs), np.uint16).view(np.float16)
    x[1:] = np.where(np.isfinite(x[1:]), x[1:], 0)
    folder = tmp_path_factory.mktemp("halves")
    half = run(model_of(given, rows, group, dtype=np.float16), x, folder)
    with np.errstate(over="ignore", invalid="ignore"):
        single = run(model_of(given, rows, group, half=True), x.astype(np.float32), folder).astype(np.float16)
    np.testing.assert_array_equal(half, single)


@here
@pytest.mark.parametrize("inputs", [256, 4352])  # the second is too long for one column after the other
def test_one_of_few_rows_does_not_depend_on_the_others(inputs: int, tmp_path: Path) -> None:
    given, x = weights(inputs, 32, zeros=True, bias=False), rows_of(8, inputs)
    alone = [run(model_of(given, 1, 32), x[place : place + 1], tmp_path)[0] for place in range(8)]
    for count in range(2, 9):
        np.testing.assert_array_equal(run(model_of(given, count, 32), x[:count], tmp_path, threads=2), alone[:count])


@here
@pytest.mark.parametrize(("zeros", "group"), [(True, 16), (False, 32), (True, 128), (False, 256)])
def test_one_of_many_rows_does_not_depend_on_the_others(group: int, zeros: bool, tmp_path: Path) -> None:
    """Tiles of 5 to 12 rows, several of them, and rows in two blocks, in any order of threads, to the last bit."""
    given, x = weights(1280, group, zeros=zeros, bias=True), rows_of(800, 1280)
    whole = run(model_of(given, 800, group), x, tmp_path, threads=2)
    for first, count in ((0, 9), (40, 12), (395, 13), (399, 39), (700, 100)):
        some = run(model_of(given, count, group), x[first : first + count], tmp_path)
        np.testing.assert_array_equal(some, whole[first : first + count])


@here
@pytest.mark.parametrize("outputs", [4, 8, 60, 68, 76])
def test_columns_that_fill_no_register(outputs: int, tmp_path: Path) -> None:
    """The first columns of a larger matrix, with and without the others; what lies behind it is not touched."""
    given, x = weights(640, 32, zeros=True, bias=True), rows_of(20, 640, np.float16)
    whole = run(model_of(given, 20, 32, dtype=np.float16), x, tmp_path)
    fewer = {name: array[:outputs] for name, array in given.items()}
    np.testing.assert_array_equal(run(model_of(fewer, 20, 32, dtype=np.float16), x, tmp_path), whole[:, :outputs])


@here
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_nan_stays(dtype: Any, tmp_path: Path) -> None:
    """Rounding must not make a number of it, wherever it is in a group."""
    given = weights(128, 32, zeros=False, bias=False)
    x = rows_of(128, 128, dtype)
    x[np.arange(128), np.arange(128)] = np.nan
    assert np.isnan(run(model_of(given, 128, 32, dtype=dtype), x, tmp_path)).all()


@pytest.mark.parametrize(
    ("inputs", "dtype", "replaced"),
    [(128, np.float32, True), (128, np.float16, True), (160, np.float16, False), (128, BFLOAT16, False)],
)
def test_what_is_replaced(inputs: int, dtype: Any, replaced: bool) -> None:
    """All but rows of a length or a type that the operator does not take; scales are those of the file."""
    half = dtype == np.float32
    model = model_of(weights(inputs, 32, zeros=False, bias=True), 2, 32, half=half, dtype=dtype)
    linear.for_cpu(model, int8=True)
    (kept,) = (node for node in model.graph.node if node.op_type != "Cast")
    assert kept.op_type == (linear.INT8 if replaced else linear.LINEAR)
    assert kept.input[2] == ("stored" if half else "scales")


@here
def test_scales_of_another_type_are_refused(tmp_path: Path) -> None:
    """Rows of float16 come with scales of float16; a graph that says otherwise is no graph of ours."""
    model = model_of(weights(128, 32, zeros=False, bias=False), 2, 32, dtype=np.float16)
    linear.for_cpu(model, int8=True)
    (scales,) = (tensor for tensor in model.graph.initializer if tensor.name == "scales")
    scales.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scales).astype(np.float32), "scales"))
    with pytest.raises(BtpError, match="scales are of another type, wanted that of x or float16"):
        run(model, rows_of(2, 128, np.float16), tmp_path)


def half_model(rows: int, weight: Array, dtype: Any = np.float32) -> onnx.ModelProto:
    """y = x w^T of a matrix in float16, which the graph casts for rows of float32."""
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)]
    if dtype == np.float32:
        nodes[0].input[1] = "wide"
        nodes.insert(0, helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT))
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "half",
        [helper.make_tensor_value_info("x", element, [rows, weight.shape[1]])],
        [helper.make_tensor_value_info("y", element, [rows, len(weight)])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


@here
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(7, 19), (130, 4099)])  # parts of vectors and of columns; several threads
def test_few_rows_with_weights_of_float16(shape: tuple[int, int], dtype: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal(shape).astype(np.float16), rng.standard_normal((6, shape[1])).astype(dtype)
    found = run(half_model(6, weight, dtype), x, tmp_path, threads=2)
    assert found.dtype == dtype
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    assert (np.abs(found - exact) <= 1e-6 * shape[1] + half_a_place(exact, dtype)).all()
    x = np.concatenate([x, x[::-1]])
    alone = [run(half_model(1, weight, dtype), row[None], tmp_path)[0] for row in x[:11]]
    for count in range(2, 12):
        np.testing.assert_array_equal(
            run(half_model(count, weight, dtype), x[:count], tmp_path, threads=2), alone[:count]
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_many_rows_with_weights_of_float16_stay(dtype: Any) -> None:
    for rows, replaced in ((linear.FEW, True), (linear.FEW + 1, False)):
        model = half_model(rows, np.zeros((8, 16), np.float16), dtype)
        left = [node.op_type for node in model.graph.node]
        linear.for_cpu(model, halves=True)
        assert [node.op_type for node in model.graph.node] == ([linear.HALF] if replaced else left)


def test_products_of_float32_weights_stay() -> None:
    model = half_model(1, np.zeros((8, 16), np.float32), np.float32)
    model.graph.node[1].input[1] = "w"
    linear.for_cpu(model, halves=True)
    assert "Gemm" in [node.op_type for node in model.graph.node]
