"""Prepare here, copy, build.sh there, `build` there, run there: with stand-ins for trtexec and TensorRT's module."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from btp_export.cli import main
from engines.tensorrt import installed
from engines.tensorrt.build import builder
from engines.tensorrt.build.job import Built, Job
from engines.tensorrt.installed import Library
from graphs.records.errors import CheckError
from tests.engines.runners.host_cuda import HostCuda
from tests.engines.tensorrt.building import job, product
from tests.engines.tensorrt.jetson_device import Device, prepare
from tests.engines.tensorrt.run import host_tensorrt
from tests.engines.tensorrt.run.engine_folders import CAPABILITY, STAGES, TARGET, VERSION
from tests.plans import tiny_plan


@pytest.fixture(scope="module")
def prepared(tiny_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the kit that a machine without TensorRT writes."""
    return prepare(tiny_bundle(tiny_plan(*STAGES)), tmp_path_factory.mktemp("host") / "bundle")


@pytest.fixture(scope="module")
def prepared_whole(tiny_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as two engines."""
    root = tmp_path_factory.mktemp("host") / "bundle"
    return prepare(tiny_bundle(tiny_plan(*STAGES)), root, "--assemble", "whole")


@pytest.fixture
def device(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Device:
    return Device(prepared, tmp_path, monkeypatch, capsys)


def answer(root: Path, picture: Path, capture: Any, *more: str) -> Any:
    assert main(["run", str(root), "--image", str(picture), "--prompt", "what color is it ?", "--json", *more]) == 0
    return json.loads(capture.readouterr().out)


def test_from_here_to_an_answer_there(
    prepared_whole: Path,
    tmp_path: Path,
    pictures: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Engines are loaded in child processes, as on the device; two, so that it takes no longer than it must."""
    picture = tmp_path / "a.png"
    pictures[0].save(picture)
    here = answer(prepared_whole, picture, capsys)
    device = Device(prepared_whole, tmp_path, monkeypatch, capsys)
    device.build_sh()
    command = ["run", str(device.root), "--image", str(picture), "--prompt", "?", "--target", TARGET]
    assert main(command) == 2
    assert "by build.sh is not taken over yet" in (said := capsys.readouterr().err) and "btp-export build" in said
    before = {path.name: path.read_bytes() for path in device.engines.glob("*.engine")}
    result = device.build("--assemble", "whole")
    assert result["built"] == [] and sorted(result["kept"]) == sorted(before)
    for graph in device.record().graphs:
        assert graph.engine is not None and graph.engine.made_by == "build.sh"
        assert graph.engine.tensorrt_version == VERSION and graph.engine.graph_sha256 == graph.onnx.sha256
        assert f"--onnx={graph.onnx.file}" in graph.engine.options and "--stronglyTyped" in graph.engine.options
        assert "--noTF32" in graph.engine.options  # a float32 bundle
    assert {path.name: path.read_bytes() for path in device.engines.glob("*.engine")} == before
    there = answer(device.root, picture, capsys, "--target", TARGET)
    assert (here["text"], here["token_ids"]) == (there["text"], there["token_ids"])
    assert device.build("--assemble", "whole")["kept"] == result["kept"]
    assert device.build_sh().count("up to date") == len(before)


def test_build_sh_builds_again_what_has_changed(device: Device) -> None:
    """By hashes, not by dates: a copy may be older than the engines of the graphs before it."""
    device.build_sh()
    graph = device.engines / "graphs" / "head.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content + b"\n")
    os.utime(graph, (0, 0))
    said = device.build_sh()
    assert "head: building" in said and said.count("up to date") == len(device.record().graphs) - 1
    (device.engines / "decode.engine.json").unlink()  # ended between the engine and its record
    assert "decode: building" in device.build_sh("decode")
    path = device.engines / "decode.engine"
    path.write_bytes(path.read_bytes() + b" ")
    assert "decode: building" in device.build_sh("decode")


def change_file(engine: Path) -> None:
    engine.write_bytes(engine.read_bytes().replace(b'"graph"', b'"Graph"'))


def change_record(engine: Path, /, **changes: Any) -> None:
    record = engine.with_name(f"{engine.name}.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | changes))


def write_other(engine: Path, old: str, new: str) -> None:
    """Another engine, with a record that fits it."""
    engine.write_bytes(engine.read_bytes().replace(old.encode(), new.encode()))
    sha = hashlib.sha256(engine.read_bytes()).hexdigest()
    change_record(engine, size=engine.stat().st_size, sha256=sha)


# What is wrong with each engine, and the reason that is given.
WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "vision": (change_file, "not as its record says"),
    "prefill_0": (lambda engine: write_other(engine, CAPABILITY, "9.0"), "does not load the engine.*incompatible dev"),
    "select_0": (lambda engine: write_other(engine, "select_0.onnx", "head.onnx"), "inputs of the engine: "),
    "prefill_1": (lambda engine: change_record(engine, engine="head.engine"), "speaks of head.engine"),
    "select_1": (lambda engine: engine.with_name("select_1.engine.json").unlink(), "wrote no select_1.engine.json"),
    "prefill_2": (lambda engine: engine.with_name("prefill_2.engine.json").write_text("{"), "not a valid record"),
    "head": (lambda engine: change_record(engine, bundle_sha256="0" * 64), "another bundle"),
    "decode": (lambda engine: change_record(engine, plugin_sha256="1" * 64), "another plugin library"),
}


def test_what_does_not_fit_is_not_taken_and_not_deleted(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is built anew; what was there lies in set-aside/, also after --force."""
    device.build_sh()
    there = {name: device.engines / f"{name}.engine" for name in WRONG}
    assert [graph.name for graph in device.record().graphs] == list(there)
    for name, (change, _) in WRONG.items():
        change(there[name])
    contents = {name: path.read_bytes() for name, path in there.items()}
    built = list[str]()

    def build_in_child(job: Job, scratch: Path, log: Path, report: Any) -> Built:
        built.append(job.graph)
        size = len(host_tensorrt.write_engine(job.engine, job.onnx, version=VERSION, capability=CAPABILITY))
        said = {"tensorrt_version": VERSION, "seconds": 0.1, "peak_memory_bytes": None, "layers_from": "log"}
        return Built(size=size, layers=(), **said)  # type: ignore[arg-type]

    monkeypatch.setattr("engines.tensorrt.build.build.build_in_child", build_in_child)
    device.check_here(monkeypatch)
    result = device.build()
    assert built == list(there) and result["kept"] == []
    for name, (_, message) in WRONG.items():
        (note,) = [note for note in result["notes"] if note.startswith(f"{name}.engine was not made by this command")]
        assert re.search(message, note)
    aside = device.engines / "set-aside"
    for _ in range(2):
        assert {name: (aside / f"{name}.1.engine").read_bytes() for name in there} == contents
        assert len(list(aside.iterdir())) == 2 * len(there) - 1
        device.build("--force")


def test_a_machine_without_tensorrt_leaves_them(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    device.build_sh("head", "decode")
    monkeypatch.setattr(installed, "is_installed", lambda flavour: False)
    result = device.build()
    assert any(note.startswith("decode.engine, head.engine: not made here") for note in result["notes"])
    unpruned = device.engines / "unpruned"  # of a kit before, built by a script there
    unpruned.mkdir()
    for name in ("head.engine", "head.engine.json"):
        shutil.copy(device.engines / name, unpruned / name)
    result = device.build("--engine-weights", "baked")  # another kit
    aside = sorted(path.name for path in (device.engines / "set-aside").iterdir())
    assert aside == ["unpruned.head.1.engine", "unpruned.head.1.engine.json"]
    assert (device.engines / "head.engine").is_file() and (device.engines / "head.engine.json").is_file()
    assert device.record().weights == "baked"


def test_plugin_layers_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = host_tensorrt.module(HostCuda())
    monkeypatch.setattr(builder, "load", lambda flavour: Library("tensorrt", VERSION, module))
    monkeypatch.setattr("engines.native.plugins.register_native", lambda trt, path: path)
    onnx = product(tmp_path)
    engine = tmp_path / "product.engine"
    host_tensorrt.write_engine(engine, onnx, version=VERSION, capability=CAPABILITY)
    nodes = {"select/BtpSelectTokens": "BtpSelectTokens"}
    wanted = job(onnx, flavour="tensorrt", plugins="library", custom_nodes=nodes, there=True)
    with pytest.raises(CheckError, match="plugin layers in TensorRT: none"):
        builder.check_engine(wanted)
    head = json.loads(engine.read_bytes().removeprefix(host_tensorrt.MAGIC))
    layers = [{"Name": "select/BtpSelectTokens", "LayerType": "PluginV3"}]
    engine.write_bytes(host_tensorrt.MAGIC + json.dumps(head | {"layers": layers}).encode())
    (layer,) = builder.check_engine(wanted).layers
    assert layer.plugin == "BtpSelectTokens"
