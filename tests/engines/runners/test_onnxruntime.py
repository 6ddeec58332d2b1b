"""OrtRunner on real sessions of small graphs: results, dtypes, addresses and messages."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.runners.cuda_stream import Stream
from engines.runners.host import HostBuffer
from engines.runners.onnxruntime import OrtLoader, explain, onnxruntime_device, ort_errors
from graphs import dtypes
from graphs.records.errors import CheckError, InputError, UnavailableError

FLOAT = np.dtype(np.float32)


def save(folder: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], name: str = "graph.onnx") -> Path:
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    )
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / name)
    return folder / name


def adder(folder: Path, element: int = TensorProto.FLOAT) -> Path:
    def value(name: str) -> Any:
        return helper.make_tensor_value_info(name, element, [2, 3])

    return save(folder, [helper.make_node("Add", ["a", "b"], ["c"])], [value("a"), value("b")], [value("c")])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, np.int32, np.int64])
def test_run_computes_in_the_declared_dtype(tmp_path: Path, dtype: Any) -> None:
    runner = OrtLoader(threads=1)(adder(tmp_path, dtypes.BY_NUMPY[np.dtype(dtype)].onnx))
    a, b = np.arange(6, dtype=dtype).reshape(2, 3), np.full((2, 3), 7, dtype)
    result = runner.run({"a": a, "b": b})
    assert list(result) == ["c"]
    assert result["c"].dtype == dtype
    np.testing.assert_array_equal(result["c"], a + b)


def test_bfloat16_goes_in_and_out(tmp_path: Path) -> None:
    def value(name: str, element: int) -> Any:
        return helper.make_tensor_value_info(name, element, [4])

    path = save(
        tmp_path,
        [
            helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("Identity", ["x"], ["same"]),
        ],
        [value("x", TensorProto.BFLOAT16)],
        [value("wide", TensorProto.FLOAT), value("same", TensorProto.BFLOAT16)],
    )
    x = np.array([1.0, -2.5, 3.140625, 1e30], dtype=ml_dtypes.bfloat16)
    result = OrtLoader(threads=1)(path).run({"x": x})
    np.testing.assert_array_equal(result["wide"], x.astype(np.float32))
    np.testing.assert_array_equal(result["same"].view(np.uint16), x.view(np.uint16))


def test_bound_graph_reads_and_writes_in_place(tmp_path: Path) -> None:
    loader = OrtLoader(threads=1)
    runner = loader(adder(tmp_path))
    buffers = {name: loader.allocate(FLOAT, (2, 3)) for name in "abc"}
    addresses = {name: buffer.pointer for name, buffer in buffers.items()}
    bound = runner.bind({"a": buffers["a"], "b": buffers["b"]}, {"c": buffers["c"]})
    for factor in (1, 2, 3):
        buffers["a"].write(np.full((2, 3), factor, np.float32))
        buffers["b"].write_rows(np.full((2, 3), 10 * factor, np.float32)[:, None, :][:, 0], [0, 0][:2])
        bound()
        np.testing.assert_array_equal(buffers["c"].read(), np.full((2, 3), 11 * factor, np.float32))
    assert addresses == {name: buffer.pointer for name, buffer in buffers.items()}
    assert all(address % 64 == 0 for address in addresses.values())


def test_a_chain_shares_a_buffer(tmp_path: Path) -> None:
    loader = OrtLoader(threads=1)
    runner = loader(adder(tmp_path))
    a, b, c, d = (loader.allocate(FLOAT, (2, 3)) for _ in range(4))
    first, second = runner.bind({"a": a, "b": b}, {"c": c}), runner.bind({"a": c, "b": c}, {"c": d})
    a.write(np.ones((2, 3), np.float32))
    first()
    second()
    np.testing.assert_array_equal(d.read(), np.full((2, 3), 2.0, np.float32))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"a": np.zeros((2, 3), np.float32)}, "missing b"),
        ({name: np.zeros((2, 3), np.float32) for name in "abx"}, "unknown x"),
        ({name: np.zeros((3, 2), np.float32) for name in "ab"}, r"a is float32 \[3, 2\]"),
        ({name: np.zeros((2, 3), np.float64) for name in "ab"}, "a is float64"),
    ],
)
def test_wrong_inputs_are_named(tmp_path: Path, inputs: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        OrtLoader(threads=1)(adder(tmp_path)).run(inputs)


def test_files_that_are_no_graphs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no graph"):
        OrtLoader()(tmp_path / "absent.onnx")
    (tmp_path / "noise.onnx").write_bytes(b"\x00\xff" * 100)
    with pytest.raises(InputError, match=r"cannot open noise\.onnx"):
        OrtLoader()(tmp_path / "noise.onnx")


def test_missing_and_truncated_weights(tmp_path: Path) -> None:
    path = adder(tmp_path)
    model = onnx.load(path)
    tensor = helper.make_tensor("b", TensorProto.FLOAT, [2, 3], np.zeros(6, np.float32).tobytes(), raw=True)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("offset", "0"), ("length", "24")):
        tensor.external_data.add(key=key, value=value)
    model.graph.initializer.append(tensor)
    del model.graph.input[1]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"cannot open graph\.onnx"):
        OrtLoader()(path)
    (tmp_path / "w.bin").write_bytes(b"\x00" * 10)
    with pytest.raises(InputError, match=r"cannot open graph\.onnx"):
        OrtLoader()(path)
    (tmp_path / "w.bin").write_bytes(np.ones(6, np.float32).tobytes())
    np.testing.assert_array_equal(OrtLoader()(path).run({"a": np.ones((2, 3), np.float32)})["c"], 2.0)


def test_a_dtype_without_kernels_is_not_available(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="cannot open"):
        OrtLoader()(adder(tmp_path, TensorProto.BFLOAT16))


def test_dynamic_shapes_are_refused(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
    with pytest.raises(InputError, match="x is"):
        OrtLoader()(save(tmp_path, [helper.make_node("Identity", ["x"], ["y"])], [x], [y]))


def test_a_device_is_chosen() -> None:
    """`run`, `bench` and `serve` offer `auto` as `verify` does, which chose for itself."""
    assert OrtLoader(device="auto").device == onnxruntime_device("auto") in ("cpu", "cuda")
    assert OrtLoader(device="cpu").device == "cpu"


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown device"):
        OrtLoader(device="tpu")
    with pytest.raises(InputError, match="0 threads"):
        OrtLoader(threads=0)
    with pytest.raises(InputError, match="no file"):
        OrtLoader(custom_ops=tmp_path / "absent.so")
    (tmp_path / "ops.so").write_bytes(b"not a library")
    with pytest.raises(CheckError, match=r"cannot load ops\.so"):
        OrtLoader(custom_ops=tmp_path / "ops.so")(adder(tmp_path))


def test_cuda_without_cuda_is_not_available() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(UnavailableError, match="has no CUDA"):
        OrtLoader(device="cuda:0")


def test_memory_errors_say_so() -> None:
    error = ort_errors.RuntimeException("Failed to allocate memory for requested buffer of size 99")
    assert isinstance(explain(error, Path("decode.onnx"), "run"), UnavailableError)
    assert isinstance(explain(ort_errors.Fail("odd"), Path("decode.onnx"), "run"), CheckError)
    assert len(explain(ort_errors.Fail("x" * 5000), Path("a.onnx"), "run").got) < 400


def test_host_buffer_rows() -> None:
    rng = np.random.default_rng(0)
    cache = HostBuffer.allocate(FLOAT, (2, 3, 8, 4))
    wanted = np.zeros((2, 3, 8, 4), np.float32)
    rows = rng.standard_normal((2, 3, 2, 4), dtype=np.float32)
    cache.write_rows(rows, [1, 5])
    wanted[0, :, 1:3], wanted[1, :, 5:7] = rows[0], rows[1]
    np.testing.assert_array_equal(cache.read(), wanted)
    same = HostBuffer(rows[:, :, :1])
    cache.write_rows(same, [7, 7])
    wanted[:, :, 7:8] = rows[:, :, :1]
    np.testing.assert_array_equal(cache.read(), wanted)
    for starts in ([7, 7], [-1, 0], [0]):
        with pytest.raises(ValueError, match="do not fit"):
            cache.write_rows(rows, starts)
    with pytest.raises(ValueError, match="do not fit"):
        cache.write_rows(rows[:, :2], [0, 0])
    view = cache.view((2, 3, 4, 4))
    assert view.pointer == cache.pointer
    view.write(np.ones((2, 3, 4, 4), np.float32))
    assert cache.read().reshape(-1)[:96].sum() == 96


def test_cuda_rows_are_strided_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The address arithmetic of CudaBuffer, with memory and copies of the host in place of the device's."""
    from engines.runners import cuda
    from tests.engines.runners.host_cuda import HostCuda

    machine = HostCuda()
    monkeypatch.setattr(cuda, "library", lambda: machine)
    stream = Stream(0)
    for transfers in (None, stream):
        _check_rows(cuda.CudaBuffer, transfers)
    assert {"cudaMemcpy2D", "cudaMemcpy2DAsync"} <= set(machine.calls)


def _check_rows(kind: Any, transfers: Any) -> None:
    rng = np.random.default_rng(1)
    cache = kind.allocate(np.dtype(np.float16), (2, 3, 8, 4), device=0, transfers=transfers)
    host = HostBuffer.allocate(np.dtype(np.float16), (2, 3, 8, 4))
    rows = rng.standard_normal((2, 3, 2, 4)).astype(np.float16)
    device_rows = kind.allocate(rows.dtype, rows.shape, device=0, transfers=transfers)
    device_rows.write(rows)
    for given, starts in ((rows, [1, 6]), (device_rows, [4, 0]), (rows[:, :, :1], [3, 3])):
        cache.write_rows(given, starts)
        host.write_rows(given.read() if given is device_rows else given, starts)
        np.testing.assert_array_equal(cache.read(), host.read())
    passing = rows.copy()
    cache.view((2, 3, 2, 4), offset=48).write(passing)
    passing[:] = 0  # the caller's own array may change at once
    np.testing.assert_array_equal(cache.read().reshape(-1)[48:96], rows.reshape(-1))
    hidden = kind.allocate(FLOAT, (2, 5, 4), device=0, transfers=transfers)
    hidden.write_rows(np.ones((2, 2, 4), np.float32), [3, 3])
    np.testing.assert_array_equal(hidden.read()[:, 3:], 1.0)
    np.testing.assert_array_equal(hidden.read()[:, :3], 0.0)
    for shape, offset in (((2, 5, 4), 1), ((1,), -1)):
        with pytest.raises(ValueError, match="needs more memory"):
            hidden.view(shape, offset=offset)
