"""The table of element types against what each library itself says of its types."""

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from onnx import helper

from graphs import dtypes
from graphs.files.checkpoint import open_tensors

TYPES = pytest.mark.parametrize("kind", dtypes.TYPES, ids=lambda kind: kind.name)


@TYPES
def test_onnx_and_onnx_ir_call_it_so(kind: dtypes.ElementType) -> None:
    assert helper.tensor_dtype_to_np_dtype(kind.onnx) == kind.numpy
    assert kind.ir.numpy() == kind.numpy and kind.ir.itemsize == kind.nbytes
    assert dtypes.BY_ONNX[ir.DataType(kind.onnx)] is kind


@TYPES
def test_torch_calls_it_so(kind: dtypes.ElementType) -> None:
    assert kind.torch.itemsize == kind.nbytes
    if kind.numpy != dtypes.BFLOAT16:  # which torch does not take from numpy
        assert torch.from_numpy(np.zeros(2, kind.numpy)).dtype == kind.torch


@TYPES
def test_safetensors_calls_it_so(kind: dtypes.ElementType, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(3, dtype=kind.torch)}, file)
    with safetensors.safe_open(file, "pt") as opened:
        assert opened.get_slice("a").get_dtype() == kind.safetensors
    assert open_tensors(file)["a"].read().dtype == kind.numpy


@TYPES
def test_onnx_runtime_calls_it_so(kind: dtypes.ElementType) -> None:
    value = helper.make_tensor_value_info("a", kind.onnx, [2])
    built = helper.make_tensor_value_info("b", kind.onnx, [2])
    graph = helper.make_graph([helper.make_node("Identity", ["a"], ["b"])], "same", [value], [built])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == kind.onnxruntime


def tensorrt_module() -> str | None:
    return next((name for name in ("tensorrt", "tensorrt_rtx") if importlib.util.find_spec(name)), None)


@pytest.mark.skipif(tensorrt_module() is None, reason="no TensorRT is installed")
@TYPES
def test_tensorrt_calls_it_so(kind: dtypes.ElementType) -> None:
    trt = importlib.import_module(str(tensorrt_module()))
    if kind.tensorrt:
        member = getattr(trt.DataType, kind.tensorrt)
        assert member.itemsize == kind.nbytes
        assert dtypes.name_of_tensorrt(member.name) == kind.name


def test_what_has_no_name_of_ours_keeps_its_own() -> None:
    assert dtypes.name_of_tensorrt("HALF") == "float16"
    assert dtypes.name_of_tensorrt("FP8") == "FP8"
    with pytest.raises(KeyError):
        dtypes.numpy_of("float8")


def test_precisions_are_the_float_types_of_weights() -> None:
    assert [kind.precision for kind in dtypes.TYPES if kind.is_precision] == ["float32", "float16", "bfloat16"]
    with pytest.raises(KeyError):
        _ = dtypes.BY_NAME["int32"].precision


@TYPES
def test_tensors_and_arrays_have_the_same_bits(kind: dtypes.ElementType) -> None:
    bits = np.random.default_rng(0).integers(0, 2, 24 * kind.nbytes, dtype=np.uint8)
    array = bits.view(kind.numpy).reshape(2, 12)
    tensor = dtypes.torch_of_numpy(array)
    assert tensor.dtype == kind.torch and tuple(tensor.shape) == (2, 12)
    assert bytes(tensor.view(torch.uint8).numpy().tobytes()) == bits.tobytes()
    back = dtypes.numpy_of_torch(tensor)
    assert back.dtype == kind.numpy and back.tobytes() == bits.tobytes()
    tensor.zero_()
    assert array.tobytes() == bits.tobytes(), "the tensor is a private copy"


def test_every_type_of_onnx_that_graphs_use_is_known() -> None:
    used = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.INT32)
    assert all(code in dtypes.BY_ONNX for code in (*used, onnx.TensorProto.INT64, onnx.TensorProto.BOOL))
