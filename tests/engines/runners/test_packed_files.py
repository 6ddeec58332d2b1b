"""Packed four-bit weights in files that sessions share: the same results, one copy, and what happens to the files."""

import os
import shutil
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.runners import packed_files
from engines.runners.onnxruntime import OrtLoader
from graphs import dtypes
from graphs.files.safetensors_file import tensor_offsets, write_tensors
from graphs.ops import linear
from graphs.packing import pack, pack_zeros

N, K, GROUP = 96, 128, 32


@pytest.fixture(params=["float32", "float16 scales", "zeros"])
def graphs(request: Any, tmp_path: Path) -> list[Path]:
    """Two graphs of one product each, on 1 and on 5 rows, with the same stored weights."""
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.01, 0.1, (N, K // GROUP)).astype(np.float16 if "16" in request.param else np.float32)
    tensors = {"codes": pack(rng.integers(0, 16, (N, K)), GROUP), "scales": scales}
    if request.param == "zeros":
        tensors["zeros"] = pack_zeros(rng.integers(0, 16, (N, K // GROUP)))
    (tmp_path / "weights").mkdir()
    write_tensors(tmp_path / "weights/model.safetensors", tensors)
    return [_graph(tmp_path, tensors, rows) for rows in (1, 5)]


def _graph(folder: Path, tensors: dict[str, np.ndarray], rows: int) -> Path:
    offsets = tensor_offsets(tensors)
    stored = []
    for name, array in tensors.items():
        tensor = TensorProto(name=name, data_type=dtypes.BY_NUMPY[array.dtype].onnx, dims=array.shape, data_location=1)
        entry = {"location": "weights/model.safetensors", "offset": offsets[name], "length": array.nbytes}
        for key, value in entry.items():
            tensor.external_data.add(key=key, value=str(value))
        stored.append(tensor)
    zeros = ["zeros"] * ("zeros" in tensors)
    nodes = [helper.make_node("Cast", ["scales"], ["wide"], to=TensorProto.FLOAT)]
    nodes.append(helper.make_node("BtpLinear", ["x", "codes", "wide", *zeros], ["y"], "product", domain="btp",
                                  bits=4, group=GROUP))  # fmt: skip
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, K])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, N])]
    between = [helper.make_tensor_value_info("wide", TensorProto.FLOAT, [N, K // GROUP])]
    graph = helper.make_graph(nodes, "graph", values, outputs, stored, value_info=between)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("btp", 1)]
    body = linear.body(18, zeros=bool(zeros), bias=False)
    path = folder / f"rows{rows}.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=8).SerializeToString())
    return path


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_a_large_plain_product_is_shared_too(
    stored: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output projection, whatever it is stored in and the graph computes in; only float32 is packed."""
    monkeypatch.setattr(packed_files, "LARGE", 0)
    weight = np.random.default_rng(0).standard_normal((N, K)).astype(stored)
    (tmp_path / "weights").mkdir()
    write_tensors(tmp_path / "weights/model.safetensors", {"w": weight})
    path = _projection(tmp_path, weight, dtypes.BY_NAME[precision].onnx)
    runners = [OrtLoader(threads=1, custom_ops=None, packed=place) for place in (tmp_path / "cache", None)]
    got, wanted = (run(loader, path) for loader in runners)
    np.testing.assert_array_equal(got, wanted)
    (place,) = (tmp_path / "cache").iterdir()
    runner = runners[0](path)
    assert mapped(tmp_path / "cache") == {str(place / packed_files.DATA_FILE)}
    assert runner.path == path


def _projection(folder: Path, weight: np.ndarray, element: int) -> Path:
    """y = x w^T."""
    offset = tensor_offsets({"w": weight})["w"]
    tensor = TensorProto(name="w", data_type=dtypes.BY_NUMPY[weight.dtype].onnx, dims=weight.shape, data_location=1)
    for key, value in {"location": "weights/model.safetensors", "offset": offset, "length": weight.nbytes}.items():
        tensor.external_data.add(key=key, value=str(value))
    cast = tensor.data_type != element
    nodes = [helper.make_node("Cast", ["w"], ["wide"], to=element)] if cast else []
    nodes.append(helper.make_node("Gemm", ["x", "wide" if cast else "w"], ["y"], "product", transB=1))
    graph = helper.make_graph(
        nodes, "graph",
        [helper.make_tensor_value_info("x", element, [1, K])], [helper.make_tensor_value_info("y", element, [1, N])],
        [tensor],
    )  # fmt: skip
    path = folder / "projection.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def run(loader: OrtLoader, path: Path) -> np.ndarray:
    runner = loader(path)
    x = np.random.default_rng(1).standard_normal(runner.inputs["x"].shape).astype(runner.inputs["x"].dtype)
    return runner.run({"x": x})["y"]


def mapped(folder: Path) -> set[str]:
    return {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line}


@pytest.mark.parametrize("level", [1, 4])
def test_sessions_map_the_same_file_and_compute_the_same(
    graphs: list[Path], level: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_files, "SMALLEST", 0)
    folder = tmp_path / "cache"
    shared, alone = (
        OrtLoader(threads=1, custom_ops=None, accuracy_level=level, packed=place) for place in (folder, None)
    )
    for path in graphs:
        np.testing.assert_array_equal(run(shared, path), run(alone, path))
    (place,) = folder.iterdir()
    before = {file: file.stat().st_mtime_ns for file in place.iterdir()}
    runners = [shared(path) for path in graphs]
    assert mapped(folder) == {str(place / packed_files.DATA_FILE)}, "both sessions hold the one file"
    assert before == {file: file.stat().st_mtime_ns for file in place.iterdir()}, "it is made once"
    assert len(runners) == 2


def test_small_matrices_and_full_disks_go_without(
    graphs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    loader = OrtLoader(threads=1, custom_ops=None, packed=folder)
    wanted = run(loader, graphs[0])
    assert not folder.exists(), "too small"
    monkeypatch.setattr(packed_files, "SMALLEST", 0)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda place: usage(2**40, 2**40 - 2**20, 2**20))
        np.testing.assert_array_equal(run(loader, graphs[0]), wanted)
    assert not list(folder.iterdir())


def test_other_weights_get_other_files_and_old_ones_go_as_do_those_of_killed_runs(
    graphs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_files, "SMALLEST", 0)
    folder = tmp_path / "cache"
    killed = folder / ".making-0123abcd"  # nobody holds its lock
    killed.mkdir(parents=True)
    run(OrtLoader(threads=1, custom_ops=None, packed=folder), graphs[0])
    (first,) = folder.iterdir()
    old = time.time() - 86400 * (packed_files.UNUSED_DAYS + 1)
    os.utime(first, (old, old))
    weights = tmp_path / "weights/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    run(OrtLoader(threads=1, custom_ops=None, packed=folder), graphs[0])
    (second,) = folder.iterdir()
    assert second != first
    assert onnx.load(second / packed_files.MODEL_FILE, load_external_data=False).graph.node
