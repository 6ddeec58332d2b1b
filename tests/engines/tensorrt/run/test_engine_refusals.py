"""Engines that do not run here: what is refused, in which words, and before what."""

from pathlib import Path
from typing import Any

import pytest

from engines.native import libraries
from engines.runners import cuda
from engines.tensorrt import installed
from engines.tensorrt.installed import Library
from engines.tensorrt.prepare.prepared_graphs import Choices
from engines.tensorrt.records import EnginesRecord, PluginRecord
from engines.tensorrt.run.session import explain
from graphs.files.bundle import Bundle
from graphs.records.errors import CheckError, InputError, UnavailableError
from tests.engines.runners.host_cuda import HostCuda
from tests.engines.tensorrt.run import host_tensorrt
from tests.engines.tensorrt.run.engine_folders import CAPABILITY, VERSION, engines, new_process, write_engines

pytestmark = pytest.mark.usefixtures("alone")


def with_engine(record: EnginesRecord, name: str, **changes: Any) -> EnginesRecord:
    graphs = []
    for graph in record.graphs:
        if graph.name == name:
            engine = None if changes == {"engine": None} else graph.engine.model_copy(update=changes)  # type: ignore[union-attr]
            graph = graph.model_copy(update={"engine": engine})
        graphs.append(graph)
    return record.model_copy(update={"graphs": tuple(graphs)})


def test_records_are_checked_before_the_gpu(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gpu() -> Any:
        raise AssertionError("the GPU was asked for")

    monkeypatch.setattr(cuda, "library", no_gpu)
    with pytest.raises(InputError, match=r"no engines at .*engines\.json"):
        engines(bundle, tmp_path / "nowhere")
    folder = tmp_path / "engines"
    record = write_engines(bundle, folder, Choices(opset=18, plugins=False))
    cases = [
        (record.model_copy(update={"bundle_sha256": "0" * 64}), "another export"),
        (with_engine(record, "head", engine=None), "head .* no engine was built"),
        (with_engine(record, "head", file="gone.engine"), r"gone\.engine is missing"),
        (with_engine(record, "head", size=1), "has .* bytes"),
        (with_engine(record, "decode", sha256="0" * 64), "decode.engine was changed or is damaged"),
        (with_engine(record, "decode", graph_sha256="0" * 64), "built from another graph"),
        (record.model_copy(update={"graphs": ()}), "no engines for profile"),
    ]
    for wrong, message in cases:
        wrong.save(folder)
        with pytest.raises(InputError, match=message) as caught:
            engines(bundle, folder)
        assert "btp-export build" in caught.value.do
    (folder / "engines.json").write_text('{"format": "btp-engines/2"}')
    with pytest.raises(InputError, match="not a valid engine record"):
        engines(bundle, folder)


def test_no_gpu_no_driver(bundle: Bundle, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "library", lambda: HostCuda(devices=0))
    with pytest.raises(UnavailableError, match="no CUDA-capable device"):
        engines(bundle, folders["baked"])
    monkeypatch.setattr(cuda, "library", lambda: HostCuda(devices=1))
    with pytest.raises(UnavailableError, match="no GPU 1"):
        engines(bundle, folders["baked"], device="cuda:1")
    for device in ("cpu", "cuda:x", "gpu"):
        with pytest.raises(InputError, match="device"):
            engines(bundle, folders["baked"], device=device)


def test_another_version_or_gpu_by_the_record(
    bundle: Bundle, folders: dict[str, Path], machine: HostCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = host_tensorrt.module(machine, "10.16.1.11")
    monkeypatch.setattr(installed, "load", lambda flavour: Library(flavour, "10.16.1.11", newer))
    with pytest.raises(UnavailableError, match=r"built by TensorRT 10\.3\.0\.26, 10\.16\.1\.11 is installed"):
        engines(bundle, folders["baked"])
    new_process(monkeypatch)
    machine.capability = (8, 9)
    with pytest.raises(UnavailableError, match=r"capability 8\.7, GPU 0 has 8\.9"):
        monkeypatch.setattr(installed, "load", lambda flavour: Library(flavour, VERSION, newer))
        engines(bundle, folders["baked"])


@pytest.mark.parametrize(
    ("built", "kind", "message"),
    [
        ({"version": "10.3.0.30"}, UnavailableError, "not compatible with this version"),
        ({"capability": "8.9"}, UnavailableError, "incompatible device"),
    ],
)
def test_another_version_or_gpu_by_tensorrt(
    built: dict[str, str], kind: type[Exception], message: str, bundle: Bundle, tmp_path: Path, machine: HostCuda
) -> None:
    """Where the record does not tell: what TensorRT answers is passed on."""
    record = write_engines(bundle, tmp_path, Choices(opset=18, plugins=False), **built)
    for graph in record.graphs:
        record = with_engine(record, graph.name, tensorrt_version=VERSION, compute_capability=CAPABILITY)
    record.save(tmp_path)
    loader, graphs = engines(bundle, tmp_path)
    with pytest.raises(kind, match=message):
        loader(graphs["vision"])


def test_a_file_that_is_no_engine(bundle: Bundle, tmp_path: Path, machine: HostCuda) -> None:
    write_engines(bundle, tmp_path, Choices(opset=18, plugins=False))
    loader, graphs = engines(bundle, tmp_path)
    size = graphs["head"].stat().st_size
    graphs["head"].write_bytes(b"x" * size)  # after the check: as a disk does
    with pytest.raises(InputError, match="magicTag"):
        loader(graphs["head"])
    with pytest.raises(InputError, match="no engine"):
        loader(tmp_path / "other.engine")


def test_an_engine_of_other_tensors(bundle: Bundle, tmp_path: Path, machine: HostCuda) -> None:
    record = write_engines(bundle, tmp_path, Choices(opset=18, plugins=False))
    for wrong, message in (
        ({"inputs": ()}, "it has an input"),
        ({"outputs": ()}, "it has an output logits"),
    ):
        graphs = tuple(g.model_copy(update=wrong) if g.name == "head" else g for g in record.graphs)
        record.model_copy(update={"graphs": graphs}).save(tmp_path)
        loader, files = engines(bundle, tmp_path)
        with pytest.raises(InputError, match=message):
            loader(files["head"])
    head = next(graph for graph in record.graphs if graph.name == "head")
    other = (head.outputs[0].model_copy(update={"shape": (1, 3)}),)
    graphs = tuple(g.model_copy(update={"outputs": other}) if g.name == "head" else g for g in record.graphs)
    record.model_copy(update={"graphs": graphs}).save(tmp_path)
    loader, files = engines(bundle, tmp_path)
    with pytest.raises(InputError, match="output logits is float32"):
        loader(files["head"])


def test_too_little_gpu_memory(
    bundle: Bundle, folders: dict[str, Path], machine: HostCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, graphs = engines(bundle, folders["shared"])
    uploaded = machine.used
    machine.total = uploaded + 100
    with pytest.raises(UnavailableError, match="the engines need about"):
        engines(bundle, folders["shared"])
    assert machine.used == uploaded
    machine.integrated = True  # file pages that can be dropped count as free there
    monkeypatch.setattr(cuda, "available_memory", lambda: 200)
    with pytest.raises(UnavailableError, match="engines need about"):
        engines(bundle, folders["shared"])
    with pytest.raises(UnavailableError, match=r"the GPU has no .* MiB more"):
        loader(graphs["decode"])
    assert explain(["CUDA out of memory"], Path("a.engine"), "open", loader.record).exit_code == 3


class TestPlugins:
    """The form the engines were built with is registered, once, and only if it is that very library."""

    @pytest.fixture
    def folder(self, bundle: Bundle, tmp_path: Path) -> Path:
        record = write_engines(bundle, tmp_path / "engines", Choices(opset=18, plugins=False))
        graphs = tuple(g.model_copy(update={"custom_nodes": int(g.name == "select_0")}) for g in record.graphs)
        plugins = PluginRecord(form="library", sha256="1" * 64)
        record.model_copy(update={"graphs": graphs, "plugins": plugins}).save(tmp_path / "engines")
        return tmp_path / "engines"

    def test_missing(
        self, bundle: Bundle, folder: Path, machine: HostCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv(libraries.VARIABLE, str(tmp_path))
        with pytest.raises(UnavailableError, match=r"libbtp_trt_dynamic\.so was not found"):
            engines(bundle, folder)

    def test_another_library(
        self, bundle: Bundle, folder: Path, machine: HostCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        path = tmp_path / "libbtp_trt_dynamic.so"
        path.write_bytes(b"a library")
        monkeypatch.setenv(libraries.VARIABLE, str(tmp_path))
        there = libraries.NativeLibrary("btp_trt_dynamic", path, ("89",))
        monkeypatch.setattr(libraries, "inspect", lambda name, path: there)
        with pytest.raises(UnavailableError, match=r"was built for 89"):
            engines(bundle, folder)
        there = libraries.NativeLibrary("btp_trt_dynamic", path, ("87", "89"))
        with pytest.raises(UnavailableError, match="not the plugin library that the engines were built with"):
            engines(bundle, folder)
        loaded: list[str] = []
        monkeypatch.setattr("engines.native.plugins.register_native", lambda trt, path: loaded.append(path))
        from graphs.files.atomic import sha256

        record = EnginesRecord.load(folder)
        right = record.model_copy(update={"plugins": PluginRecord(form="library", sha256=sha256(path))})
        right.save(folder)
        for _ in range(2):
            engines(bundle, folder)
        assert loaded == [path]
        right.model_copy(update={"plugins": PluginRecord(form="library", sha256="2" * 64)}).save(folder)
        with pytest.raises(CheckError, match="other plugins"):
            engines(bundle, folder)
