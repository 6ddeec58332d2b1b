"""The TensorRT runner against a stand-in for TensorRT on a CUDA in host memory: binding, types, addresses, order.

The stand-in computes with ONNX Runtime what is put on a stream, when the stream is waited for, so results that are
equal to ONNX Runtime's own show that every address, type and order was right. What a GPU does with it is not shown.
"""

import gc
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.chain import Batch
from engines.runners.onnxruntime import OrtLoader
from engines.tensorrt import installed
from engines.tensorrt.messages import Messages
from engines.tensorrt.records import EnginesRecord
from engines.tensorrt.run.session import explain
from graphs.files.bundle import Bundle
from graphs.records.errors import InputError, UnavailableError
from tests.engines.runners.host_cuda import HostCuda
from tests.engines.tensorrt.run import host_tensorrt
from tests.engines.tensorrt.run.conversations import chain, conversation, inputs, onnx_graphs
from tests.engines.tensorrt.run.engine_folders import engines

pytestmark = pytest.mark.usefixtures("alone")


@pytest.mark.parametrize("kind", ["baked", "shared", "whole"])
def test_the_chain_runs_as_in_onnx_runtime(
    kind: str, bundle: Bundle, folders: dict[str, Path], machine: HostCuda
) -> None:
    loader, graphs = engines(bundle, folders[kind])
    mine = chain(bundle, graphs, loader)
    if kind == "baked":
        record = EnginesRecord.load(folders[kind])
        onnx = {graph.name: folders[kind] / graph.onnx.file for graph in record.graphs}
        reference, tolerance = chain(bundle, onnx, OrtLoader(threads=1)), 0.0
    else:  # against the bundle's own graphs: packed products and opset 18 give the same only up to rounding
        reference, tolerance = chain(bundle, onnx_graphs(bundle), OrtLoader(threads=1, custom_ops=None)), 1e-4
    for seed in (0, 1):  # the second conversation meets buffers that the first has used, and a captured decode
        given = inputs(bundle, seed)
        for got, wanted in zip(conversation(mine, given), conversation(reference, given), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * max(1.0, float(np.abs(wanted).max())))


def test_decode_neither_allocates_nor_copies_caches(
    bundle: Bundle, folders: dict[str, Path], machine: HostCuda
) -> None:
    loader, graphs = engines(bundle, folders["shared"])
    model = chain(bundle, graphs, loader)
    model.prefill(Batch(*inputs(bundle)))
    row = np.zeros((1, bundle.spec.decoder.hidden_size), np.float32)
    model.decode(row)
    blocks = dict(machine.blocks)
    pointers = {layer: [cache.pointer for cache in pair] for layer, pair in model.caches.items()}
    machine.calls.clear()
    model.decode(row)
    assert machine.blocks == blocks and "cudaMalloc" not in machine.calls
    assert {layer: [cache.pointer for cache in pair] for layer, pair in model.caches.items()} == pointers
    assert machine.calls.count("cudaMemcpy2DAsync") <= 2 * bundle.plan.num_layers


def test_shared_weights_are_on_the_device_once(bundle: Bundle, folders: dict[str, Path], machine: HostCuda) -> None:
    loader, graphs = engines(bundle, folders["shared"])
    record = EnginesRecord.load(folders["shared"])
    by_name = {weight.name: weight for graph in record.graphs for weight in graph.weight_inputs}
    uses = sum(len(graph.weight_inputs) for graph in record.graphs)
    assert uses > len(by_name) > 0  # prefill and decode have the same matrices
    wanted = sum(int(np.prod(weight.shape)) * 4 for weight in by_name.values())
    assert loader.session.weights.missing_bytes(loader.folder, record.graphs) == 0 == loader.session.weights.nbytes
    assert wanted <= machine.used < wanted + 256 * len(by_name), "one arena, reserved when the engines are opened"
    runners = [loader(path) for path in graphs.values()]
    assert loader.memory()["shared_weight_bytes"] == wanted
    assert loader.session.weights.missing_bytes(loader.folder, record.graphs) == 0
    assert all(not set(by_name) & set(runner.inputs) for runner in runners)
    used = machine.used
    other, _ = engines(bundle, folders["whole"])  # another folder, the same files
    for name in ("prefill", "decode"):
        other(folders["whole"] / f"{name}.engine")
    assert loader.memory()["shared_weight_bytes"] == wanted and machine.used >= used


def test_engines_share_the_memory_they_compute_in(bundle: Bundle, folders: dict[str, Path], machine: HostCuda) -> None:
    loader, graphs = engines(bundle, folders["baked"])
    runners = [loader(path) for path in graphs.values()]
    needs = [host_tensorrt.SCRATCH_PER_INPUT * len(runner.inputs) for runner in runners]
    assert loader.memory()["scratch_bytes"] == max(needs) < sum(needs)


def test_everything_is_freed(bundle: Bundle, folders: dict[str, Path], machine: HostCuda) -> None:
    """Without waiting for the collector: verification opens one graph after another, once its chain is gone."""
    loader, graphs = engines(bundle, folders["shared"])
    gc.collect()
    gc.disable()
    try:
        model = chain(bundle, graphs, loader)
        conversation(model, inputs(bundle), 3)
        used = machine.used
        del model
        kept = machine.used
        assert kept < used
        runner = loader(graphs["decode"])
        runner.run({name: np.zeros(spec.shape, spec.dtype) for name, spec in runner.inputs.items()})
        assert machine.used > kept
        del runner
        assert machine.used == kept
        del loader
        assert machine.used == 0 and not machine.streams and not machine.graphs
    finally:
        gc.enable()


def test_run_keeps_its_buffers(bundle: Bundle, folders: dict[str, Path], machine: HostCuda) -> None:
    loader, graphs = engines(bundle, folders["baked"])
    runner = loader(graphs["head"])
    reference = OrtLoader(threads=1)(folders["baked"] / "graphs" / "head.onnx")
    rng = np.random.default_rng(5)
    for _ in range(2):
        given = {
            "hidden": rng.standard_normal(runner.inputs["hidden"].shape, dtype=np.float32),
            "last": np.array([7], np.int32),
        }
        np.testing.assert_array_equal(runner.run(given)["logits"], reference.run(given)["logits"])
        count = machine.calls.count("cudaMalloc")
    runner.run(given)
    assert machine.calls.count("cudaMalloc") == count
    with pytest.raises(InputError, match="missing last"):
        runner.run({"hidden": given["hidden"]})
    with pytest.raises(InputError, match="float64"):
        runner.run(given | {"hidden": given["hidden"].astype(np.float64)})


def test_two_bindings_of_one_engine_do_not_mix(bundle: Bundle, folders: dict[str, Path], machine: HostCuda) -> None:
    loader, graphs = engines(bundle, folders["baked"])
    runner = loader(graphs["head"])
    reference = OrtLoader(threads=1)(folders["baked"] / "graphs" / "head.onnx")
    rng = np.random.default_rng(6)
    made = []
    for _ in range(2):
        buffers = {n: loader.allocate(s.dtype, s.shape) for n, s in (runner.inputs | runner.outputs).items()}
        given = {"hidden": rng.standard_normal(runner.inputs["hidden"].shape, dtype=np.float32)}
        given["last"] = np.array([3], np.int32)
        for name, value in given.items():
            buffers[name].write(value)
        bound = runner.bind({n: buffers[n] for n in runner.inputs}, {n: buffers[n] for n in runner.outputs})
        made.append((bound, buffers, reference.run(given)["logits"]))
    for bound, buffers, wanted in [*made, *made]:
        bound()
        np.testing.assert_array_equal(buffers["logits"].read(), wanted)
    off = loader.allocate(np.dtype(np.int32), (65,)).view((1,), offset=1)
    with pytest.raises(ValueError, match="aligned"):
        runner.bind({"hidden": made[0][1]["hidden"], "last": off}, {"logits": made[0][1]["logits"]})


@pytest.fixture(scope="module")
def real() -> Any:
    """TensorRT for RTX's module."""
    try:
        return installed.load("rtx").module
    except UnavailableError as error:
        pytest.skip(error.got)


def test_the_real_library_reads_a_mapped_file_and_says_what_is_wrong(
    real: Any, bundle: Bundle, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Our log class and the mapped file as the real bindings take them; no GPU is needed to refuse a file."""
    path = tmp_path / "head.engine"
    path.write_bytes(b"no engine " * 100)
    log = Messages(real, echo=False)
    runtime = real.Runtime(log.logger)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        assert runtime.deserialize_cuda_engine(data) is None
    error = explain(log.errors, path, "open", EnginesRecord.load(folders["baked"]))
    assert isinstance(error, InputError) and "magicTag" in error.got


def test_the_stand_in_has_no_names_of_its_own(real: Any) -> None:
    """Every class, method and member that the stand-in offers, TensorRT for RTX has too."""
    module = host_tensorrt.module(HostCuda())
    pairs = [
        (module.Runtime, real.Runtime),
        (host_tensorrt.Engine, real.ICudaEngine),
        (host_tensorrt.Context, real.IExecutionContext),
        (host_tensorrt.Inspector, real.EngineInspector),
        (host_tensorrt.ILogger, real.ILogger),
    ]
    for mine, theirs in pairs:
        public = {name for name, value in vars(mine).items() if not name.startswith("_") and value is not None}
        assert public <= set(dir(theirs)), (mine, public - set(dir(theirs)))
    for kind in (
        "DataType",
        "TensorIOMode",
        "TensorLocation",
        "ExecutionContextAllocationStrategy",
        "LayerInformationFormat",
    ):
        assert set(getattr(module, kind).__members__) <= set(getattr(real, kind).__members__)
    log = real.ILogger.Severity
    assert {"INTERNAL_ERROR", "ERROR"} <= set(log.__members__)
