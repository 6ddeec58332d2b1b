"""Damaged ONNX files: whoever opens one says the same, whatever the library beneath raised."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from btp_export.profiling.roofline import product_flops
from engines.runners.onnxruntime import OrtLoader
from engines.tensorrt.kit.sample_inputs import RecordingLoader, constant_bytes
from engines.tensorrt.prepare.lint import lint
from engines.tensorrt.prepare.prepared_graphs import Choices, prepare
from engines.tensorrt.versions import traits
from engines.verify.streamed_graphs import StreamedRunner
from graphs.files.bundle_checks import check_graphs
from graphs.files.onnx_file import read_graph, read_model
from graphs.records.errors import InputError
from graphs.records.manifest import GraphRecord, TensorRecord


def _graph(name: str = "x") -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(value, TensorProto.FLOAT, [2, 2]) for value in (name, "y")]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2, 2], [1.0] * 4)
    graph = helper.make_graph([helper.make_node("MatMul", [name, "w"], ["y"])], "g", values[:1], values[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _not_utf8() -> bytes:
    return _graph("name").SerializeToString().replace(b"name", b"na\xffe")


def _unknown_type() -> bytes:
    model = _graph()
    model.graph.input[0].type.tensor_type.elem_type = 99
    return model.SerializeToString()


def _no_inputs() -> bytes:
    model = _graph()
    del model.graph.node[0].input[:]
    return model.SerializeToString()


def _no_graph() -> bytes:
    model = _graph()
    model.graph.node[0].input[0] = "nothing"
    return model.SerializeToString()


DAMAGED: dict[str, Callable[[], bytes]] = {
    "cut off": lambda: _graph().SerializeToString()[:-9],
    "no protobuf": lambda: b"\xff" * 100,
    "a name that is not UTF-8": _not_utf8,
    "an unknown type": _unknown_type,
    "a node without inputs": _no_inputs,
    "an input from nowhere": _no_graph,
}
OPENERS: dict[str, Callable[[Path], Any]] = {
    "ONNX Runtime": lambda path: OrtLoader(custom_ops=None)(path),
    "onnx": read_graph,
    "onnx_ir": read_model,
    "flops": product_flops,
    "constants": constant_bytes,
    "recorded": lambda path: RecordingLoader(OrtLoader(custom_ops=None), path.parent)(path),
    "streamed": lambda path: StreamedRunner(path, OrtLoader(custom_ops=None)),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("opener", OPENERS)
def test_it_opens_or_is_refused_by_name(opener: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(DAMAGED[damage]())
    try:
        OPENERS[opener](path)
    except InputError as error:
        assert "graph.onnx" in error.got and error.wanted and error.do
    else:
        assert damage not in ("cut off", "no protobuf") and opener != "ONNX Runtime"


def test_a_whole_graph_opens_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(_graph().SerializeToString())
    for opener in OPENERS.values():
        opener(path)
    assert (product_flops(path), constant_bytes(path)) == (2 * 2 * 2 * 2, 16)


@pytest.mark.parametrize("inside", [True, False])
def test_more_memory_than_any_machine_has_is_the_graph_s_fault(inside: bool, tmp_path: Path) -> None:
    shape = helper.make_tensor("s", TensorProto.INT64, [2], [2**20, 2**20])
    nodes = [helper.make_node("ConstantOfShape", ["s"], ["x" if inside else "y"])]
    if inside:
        nodes.append(helper.make_node("ReduceSum", ["x"], ["y"], keepdims=1))
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1] if inside else [2**20, 2**20])
    graph = helper.make_graph(nodes, "g", [], [out], [shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    (tmp_path / "g.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"requested buff|4096\.0 GiB") as caught:
        OrtLoader(custom_ops=None)(tmp_path / "g.onnx").run({})
    assert "close other programs" not in str(caught.value)


def test_a_weight_of_an_unknown_type_is_refused_at_opening(tmp_path: Path) -> None:
    model = _graph()
    model.graph.initializer[0].data_type = 99
    content = model.SerializeToString()
    (tmp_path / "head.onnx").write_bytes(content)
    tensors = [[TensorRecord(name=name, dtype="float32", shape=(2, 2))] for name in ("x", "y")]
    record = GraphRecord(
        file="head.onnx", size=len(content), sha256="0" * 64, name="head", profile="b1", inputs=tuple(tensors[0]),
        outputs=tuple(tensors[1]), layers=None,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"head\.onnx is no readable ONNX graph"):
        check_graphs(tmp_path, [record], [])


@pytest.mark.parametrize("damage", ["cut off", "no protobuf", "a name that is not UTF-8", "an unknown type"])
def test_building_refuses_a_damaged_vision_graph(damage: str, tiny_bundle: Any, tmp_path: Path) -> None:
    """As of a bundle that was opened before: `build` prepares and lints the captured graph."""
    bundle = tiny_bundle()
    moved = tmp_path / "bundle"
    (moved / "graphs").mkdir(parents=True)
    (moved / "processor").symlink_to(bundle.processor)
    (moved / "graphs" / "weights").symlink_to(bundle.weights)
    file = bundle.graph_path("vision", bundle.profile().name).name
    (moved / "graphs" / file).write_bytes(DAMAGED[damage]())
    version = traits("enterprise", "10.16")
    choices = Choices(opset=version.opset, plugins=False, assemble="segments", weights="baked")
    with pytest.raises(InputError, match=re.escape(file) + "|the graph vision|vision"):
        lint(prepare(replace(bundle, root=moved), choices), version, folder=tmp_path, plugins=False)
