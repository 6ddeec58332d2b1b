"""BtpLinear as ONNX Runtime's MatMulNBits: agreement at both accuracy levels, what is left of the graph, the loader."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, numpy_helper

from engines.runners.onnxruntime import OrtLoader
from graphs import dtypes, ops
from graphs.ops import linear
from graphs.ops.linear import Case
from graphs.ops.linear.cases import make
from graphs.records.errors import InputError
from tests.graphs.ops import models
from tests.graphs.ops.agreement import assert_agree, product, rounded_product
from tests.graphs.ops.test_linear import reference

CASES = {case.name: case for case in linear.cases()}
every_case = pytest.mark.parametrize("name", CASES)


def prepared(case: Case, level: int) -> ModelProto:
    """The model with its weights as initialisers, as our graphs have them, and then with ONNX Runtime's nodes."""
    model = with_weights(models.linear_model(case, 18, "exact"), case)
    ops.for_onnxruntime(model, accuracy_level=level)
    models.check(model)
    return model


def with_weights(model: ModelProto, case: Case) -> ModelProto:
    for value in list(model.graph.input)[1:]:
        model.graph.initializer.append(numpy_helper.from_array(case.inputs[value.name], value.name))
        model.graph.input.remove(value)
    return model


def run(model: ModelProto, case: Case) -> Any:
    y = models.run_onnxruntime(model, {value.name: case.inputs[value.name] for value in model.graph.input})
    if case.x.dtype == dtypes.BFLOAT16:
        return torch.utils.dlpack.from_dlpack(y).view(torch.int16).numpy().view(case.x.dtype)
    return y


def assert_close(got: Any, wanted: Any, limit: float) -> None:
    norm = np.linalg.norm(wanted.astype(np.float64), axis=1, keepdims=True)
    assert (np.abs(got.astype(np.float64) - wanted.astype(np.float64)) <= limit * norm).all()


@every_case
def test_level_1_agrees_with_the_reference(name: str) -> None:
    """For 16-bit types on the CPU w is not rounded: that result is the definition's without its one rounding of w."""
    case = CASES[name]
    got = run(prepared(case, 1), case)
    if case.x.dtype == np.float32:
        assert_agree(got, reference(case))
    else:
        assert_agree(got, rounded_product(case, round_w=False))
        assert_close(got, reference(case), 2.0 ** -(9 if case.x.dtype == np.float16 else 6))


@every_case
def test_level_4_rounds_x_to_eight_bits_and_no_more(name: str) -> None:
    case = CASES[name]
    assert_close(run(prepared(case, 4), case), reference(case), 0.02)


def test_level_4_differs_from_level_1() -> None:
    """If both were the same, the level would not reach the kernel and nobody would notice."""
    case = CASES["rows-8"]
    assert np.abs(run(prepared(case, 4), case) - run(prepared(case, 1), case)).max() > 1e-4


@pytest.mark.parametrize("name", ["odd-groups", "zeros-and-bias", "decode-float16"])
def test_nothing_is_left_but_the_product_and_its_packed_weights(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(prepared(case, 1).SerializeToString(), options)
    graph = onnx.load(tmp_path / "optimised.onnx").graph
    assert [(node.domain, node.op_type) for node in graph.node] == [("com.microsoft", "MatMulNBits")]
    stored = {tensor.name: numpy_helper.to_array(tensor).tobytes() for tensor in graph.initializer}
    assert stored == {key: array.tobytes() for key, array in case.inputs.items() if key != "x"}


@pytest.mark.parametrize("name", ["odd", "prefill"])
def test_bfloat16_is_cast_around_the_product(name: str) -> None:
    model = prepared(CASES[f"{name}-bfloat16"], 1)
    assert [node.op_type for node in model.graph.node if node.op_type != "Cast"] == ["MatMulNBits"]
    assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.BFLOAT16


def test_weights_may_be_inputs_of_the_graph() -> None:
    case = CASES["zeros-and-bias"]
    model = models.linear_model(case, 18, "exact")
    ops.for_onnxruntime(model, accuracy_level=1)
    assert_agree(run(model, case), reference(case))


@pytest.mark.parametrize("level", [1, 4])
def test_the_loader_puts_it_in_and_leaves_the_file_alone(level: Any, tmp_path: Path) -> None:
    case = make("loader", 2, 64, 1024, 128, bias=True)
    path = tmp_path / "graph.onnx"
    onnx.save(
        with_weights(models.linear_model(case, 18, "exact"), case),
        path,
        save_as_external_data=True,
        location="weights",
        size_threshold=0,
    )
    before = path.read_bytes()
    y = OrtLoader(threads=1, custom_ops=None, accuracy_level=level)(path).run({"x": case.x})["y"]
    assert path.read_bytes() == before
    if level == 1:
        assert_agree(y, reference(case))
    else:
        error = np.abs(y - product(case)).max() / np.linalg.norm(product(case))
        assert 1e-4 < error < 0.02


def test_the_loader_leaves_other_graphs_as_they_are() -> None:
    assert ops.wants_onnxruntime_nodes(models.linear_model(CASES["plain"], 18, "exact").SerializeToString())
    assert not ops.wants_onnxruntime_nodes(models.gather_model(ops.gather_tokens.cases()[0], 18).SerializeToString())


def test_a_damaged_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_bytes(b"\xff BtpLinear \xff")
    with pytest.raises(InputError, match=r"graph\.onnx is no readable ONNX graph"):
        OrtLoader(custom_ops=None)(tmp_path / "graph.onnx")


def test_wrong_levels_and_shapes_are_refused() -> None:
    model = with_weights(models.linear_model(CASES["plain"], 18, "exact"), CASES["plain"])
    with pytest.raises(InputError, match="accuracy level 3"):
        ops.for_onnxruntime(model, accuracy_level=3)
    model.graph.initializer[1].dims[1] = 3
    with pytest.raises(InputError, match=r"scales has shape \[16, 3\]"):
        ops.for_onnxruntime(model, accuracy_level=1)
    model.graph.initializer[0].name = "other"
    with pytest.raises(InputError, match=r"qweight has shape \[\]"):
        ops.for_onnxruntime(model, accuracy_level=1)
