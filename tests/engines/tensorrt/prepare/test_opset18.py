"""Fused operators in primitives, against ONNX Runtime's own kernels of the fused ones."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from engines.tensorrt.prepare.opset18 import lower_to_primitives
from graphs.records.errors import InputError

RNG = np.random.default_rng(3)
HEADS = [1, 2, 7, 8]


def model_of(node: onnx.NodeProto, inputs: dict[str, tuple[int, list[int]]], shape: list[int]) -> ir.Model:
    values = [helper.make_tensor_value_info(name, kind, dims) for name, (kind, dims) in inputs.items()]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)
    middle = helper.make_tensor_value_info("middle", TensorProto.FLOAT, shape)
    after = helper.make_node("Add", ["middle", "middle"], ["out"], "after")
    graph = helper.make_graph([node, after], "one", values, [out], value_info=[middle])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    return ir.serde.deserialize_model(model)


def run(model: ir.Model, feeds: dict[str, Any]) -> Any:
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feeds)[0]


def drawn(inputs: dict[str, tuple[int, list[int]]]) -> dict[str, Any]:
    collected = {name: RNG.standard_normal(dims).astype(np.float32) for name, (kind, dims) in inputs.items()}
    return {name: x > -0.5 if inputs[name][0] == TensorProto.BOOL else x for name, x in collected.items()}


CASES = {
    "attention": (["q", "k", "v"], {"scale": 0.3}, {}),
    "attention-default-scale": (["q", "k", "v"], {}, {}),
    "attention-bool-mask": (["q", "k", "v", "mask"], {}, {"mask": (TensorProto.BOOL, [7, 7])}),
    "attention-added-mask": (["q", "k", "v", "mask"], {}, {"mask": (TensorProto.FLOAT, [1, 1, 7, 7])}),
}


@pytest.mark.parametrize("case", CASES)
def test_attention(case: str) -> None:
    names, attributes, mask = CASES[case]
    inputs = {name: (TensorProto.FLOAT, HEADS) for name in "qkv"} | mask
    model = model_of(helper.make_node("Attention", names, ["middle"], "a", **attributes), inputs, HEADS)
    lowered = lower_to_primitives(model)
    assert lowered.graph.opset_imports[""] == 18 and "Attention" not in {node.op_type for node in lowered.graph}
    feeds = drawn(inputs)
    if case == "attention-bool-mask":
        feeds["mask"][:, 0] = True  # a row that sees nothing is NaN by either form
    np.testing.assert_allclose(run(lowered, feeds), run(model, feeds), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate: str) -> None:
    inputs = {"x": (TensorProto.FLOAT, [3, 50])}
    node = helper.make_node("Gelu", ["x"], ["middle"], "g", approximate=approximate)
    model = model_of(node, inputs, [3, 50])
    feeds = drawn(inputs)
    np.testing.assert_allclose(run(lower_to_primitives(model), feeds), run(model, feeds), rtol=1e-5, atol=1e-6)


def test_rms_norm() -> None:
    inputs = {"x": (TensorProto.FLOAT, [5, 64]), "scale": (TensorProto.FLOAT, [64])}
    node = helper.make_node("RMSNormalization", ["x", "scale"], ["middle"], "n", axis=-1, epsilon=1e-3)
    model = model_of(node, inputs, [5, 64])
    feeds = drawn(inputs)
    np.testing.assert_allclose(run(lower_to_primitives(model), feeds), run(model, feeds), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("attributes", [{"is_causal": 1}, {"softcap": 2.0}])
def test_forms_that_vision_towers_do_not_have_are_refused(attributes: dict[str, Any]) -> None:
    inputs = {name: (TensorProto.FLOAT, HEADS) for name in "qkv"}
    model = model_of(helper.make_node("Attention", ["q", "k", "v"], ["middle"], "a", **attributes), inputs, HEADS)
    with pytest.raises(InputError, match="--opset 18") as error:
        lower_to_primitives(model)
    assert "Attention" in error.value.got


def test_an_operator_without_a_form_in_primitives_is_refused() -> None:
    node = helper.make_node("Swish", ["x"], ["middle"], "s")
    inputs = {"x": (TensorProto.FLOAT, [2, 4])}
    values = [helper.make_tensor_value_info(name, kind, dims) for name, (kind, dims) in inputs.items()]
    out = helper.make_tensor_value_info("middle", TensorProto.FLOAT, [2, 4])
    graph = helper.make_graph([node], "one", values, [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])
    with pytest.raises(InputError, match="has no form in opset 18"):
        lower_to_primitives(ir.serde.deserialize_model(model))


def test_a_captured_tower_computes_the_same(tiny_bundle: Any, tmp_path: Path) -> None:
    """Against torch's own capture in opset 18."""
    fused, primitive = tiny_bundle(), tiny_bundle(opset=18)
    lowered = lower_to_primitives(ir.load(fused.graph_path("vision")))
    path = fused.root / "graphs" / "lowered.onnx"
    path.write_bytes(ir.serde.serialize_model(lowered).SerializeToString())
    pixels = {"pixel_values": RNG.standard_normal((1, 3, 24, 24)).astype(np.float32)}
    try:
        got = onnxruntime.InferenceSession(str(path)).run(None, pixels)[0]
    finally:
        path.unlink()
    wanted = onnxruntime.InferenceSession(str(primitive.graph_path("vision"))).run(None, pixels)[0]
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-7)
    assert lower_to_primitives(lowered) is lowered
