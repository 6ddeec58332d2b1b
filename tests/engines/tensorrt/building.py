"""What the tests of engine building share: TensorRT for RTX or a skip, small graphs, and jobs for the worker."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.tensorrt import installed
from engines.tensorrt.build.job import Job
from graphs.records.manifest import TensorRecord

NAMES = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.INT32: "int32"}


def need_rtx() -> None:
    """Skip where TensorRT for RTX is not installed."""
    if not installed.is_installed("rtx"):
        pytest.skip("TensorRT for RTX is not installed: pip install 'btp-export[rtx]'")


def records(values: Any) -> tuple[TensorRecord, ...]:
    """Inputs or outputs of an ONNX graph as records."""
    return tuple(
        TensorRecord(
            name=value.name,
            dtype=NAMES[value.type.tensor_type.elem_type],
            shape=tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim),
        )
        for value in values
    )


def job(path: Path, **changes: Any) -> Job:
    """The job of building the graph at `path` for Ada, beside it."""
    model = onnx.load(path, load_external_data=False)
    fields: dict[str, Any] = {
        "graph": path.stem,
        "flavour": "rtx",
        "onnx": path,
        "engine": path.with_suffix(".engine"),
        "compute_capability": "8.9",
        "precision": "float32",
        "plugins": "none",
        "inputs": records(model.graph.input),
        "outputs": records(model.graph.output),
        "custom_nodes": {node.name: node.op_type for node in model.graph.node if node.domain == "btp"},
    }
    return Job(**fields | changes)


def plain(weight: TensorRecord) -> TensorRecord:
    """A weight input as a record of the graph's inputs."""
    return TensorRecord(name=weight.name, dtype=weight.dtype, shape=weight.shape)


def product(folder: Path, operator: str = "MatMul") -> Path:
    """y = x @ w with w [64, 64], saved as `product.onnx`; another operator for wrong graphs."""
    weight = numpy_helper.from_array(np.eye(64, dtype=np.float32), "w")
    node = helper.make_node(operator, ["x", "w"], ["y"], "the_product")
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [8, 64])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "product.onnx")
    return folder / "product.onnx"
