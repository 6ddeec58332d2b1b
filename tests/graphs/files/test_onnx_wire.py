"""ONNX files read without onnx say what onnx says of them."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphs.building.graph_parts import wide_weights
from graphs.files.onnx_wire import GraphFile
from graphs.records.errors import InputError


def of_values(values: Any) -> list[tuple[str, int, tuple[int, ...]]]:
    """What onnx says of inputs, outputs or values."""
    return [
        (
            value.name,
            value.type.tensor_type.elem_type,
            tuple(d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim),
        )
        for value in values
    ]


def compare(path: Path) -> None:
    found, wanted = GraphFile(path), onnx.load(str(path), load_external_data=False)
    graph = wanted.graph
    for mine, theirs in (
        (found.inputs, graph.input),
        (found.outputs, graph.output),
        (found.values, graph.value_info),
    ):
        assert [(value.name, value.element, value.shape) for value in mine] == of_values(theirs)
    assert [tensor.name for tensor in found.initializers] == [tensor.name for tensor in graph.initializer]
    assert found.wide_weights() == wide_weights(wanted)
    for mine, theirs in zip(found.nodes, graph.node, strict=True):
        assert (mine.operator, mine.domain) == (theirs.op_type, theirs.domain)
        assert (mine.inputs, mine.outputs) == (tuple(theirs.input), tuple(theirs.output))
        assert mine.integers == {one.name: one.i for one in theirs.attribute if one.type == onnx.AttributeProto.INT}
    external = {
        (tensor.name, entry.value)
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert {(tensor.name, tensor.location) for tensor in found.outside()} == external


def test_the_graphs_of_a_bundle(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    for record in bundle.graphs():
        compare(bundle.root / record.file)


def hidden(name: str, location: str = "elsewhere") -> TensorProto:
    tensor = numpy_helper.from_array(np.zeros(3, np.float32), name)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def test_tensors_are_found_wherever_they_hide(tmp_path: Path) -> None:
    """In attributes, inner graphs, functions and sparse tensors."""
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=hidden("inner"))], "inner", [], [])
    branch = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    listed = helper.make_node("Other", [], ["z"], tensors=[hidden("listed")])
    body = helper.make_function(
        "d",
        "f",
        [],
        ["o"],
        [helper.make_node("Constant", [], ["o"], value=hidden("body"))],
        [helper.make_opsetid("", 18)],
    )
    sparse = helper.make_sparse_tensor(hidden("values"), hidden("indices"), [3])
    graph = helper.make_graph([branch, listed], "g", [], [], initializer=[hidden("own")], sparse_initializer=[sparse])
    path = tmp_path / "graph.onnx"
    path.write_bytes(helper.make_model(graph, functions=[body]).SerializeToString())
    found = GraphFile(path).outside()
    assert {tensor.name for tensor in found} == {"inner", "listed", "body", "values", "indices", "own"}
    assert {tensor.location for tensor in found} == {"elsewhere"}


def read_all(path: Path) -> GraphFile:
    """Everything that a file can be asked for."""
    read = GraphFile(path)
    assert len(read.values) + len(read.nodes) + len(read.shapes) + len(read.outside()) >= 0
    assert read.wide_weights() >= 0 or read.matrices(1)
    read.has(1)
    return read


@given(content=st.binary(max_size=200))
def test_no_content_is_more_than_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "content.onnx"
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        read_all(path)


@given(data=st.data())
def test_no_flipped_bit_is_more_than_refused(
    data: st.DataObject, tiny_bundle: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What is read when it is asked for, too: values between nodes, nodes, tensors elsewhere."""
    content = bytearray(tiny_bundle().graph_path("decode").read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.getbasetemp() / "flipped.onnx"
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        read_all(path)


@pytest.mark.parametrize("cut", [1, 100, 1000])
def test_a_cut_file_is_an_input_error(cut: int, tiny_bundle: Any, tmp_path: Path) -> None:
    content = tiny_bundle().graph_path("head").read_bytes()
    (tmp_path / "graph.onnx").write_bytes(content[:-cut])
    with pytest.raises(InputError, match="no readable ONNX graph"):
        GraphFile(tmp_path / "graph.onnx")
