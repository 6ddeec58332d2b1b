"""A machine with a GPU in host memory, and folders like engines/<target>/ whose engines run on it."""

from pathlib import Path
from typing import Any

import pytest

from engines.runners import cuda
from engines.tensorrt import installed
from engines.tensorrt.installed import Library
from engines.tensorrt.prepare.prepared_graphs import Choices, PreparedGraph, prepare
from engines.tensorrt.records import (
    BuiltEngine,
    EngineGraph,
    EnginesRecord,
    Estimate,
    PluginRecord,
    bundle_digest,
    engine_file,
)
from engines.tensorrt.run import session
from engines.tensorrt.run.runner import TrtLoader, open_engines
from graphs.files.atomic import record
from graphs.files.bundle import Bundle
from graphs.records.plan import Stage
from tests.engines.runners.host_cuda import HostCuda
from tests.engines.tensorrt.run import host_tensorrt

TARGET, VERSION, CAPABILITY = "jetson-orin-jp6", "10.3.0.26", "8.7"
STAGES = (  # of the tiny model: one stage that selects by every rule, one that drops all
    Stage(layer=2, keep=18, attention_quota=6, pool=24, boundary=18, diversity_quota=6, seeds=9),
    Stage(layer=4, keep=0),
)


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions and registered plugins of one test are not another's."""
    monkeypatch.setattr(session, "PROCESS", session.Process())


def machine_with_gpu(monkeypatch: pytest.MonkeyPatch) -> HostCuda:
    """One GPU of the Orin's kind, and TensorRT 10.3."""
    host = HostCuda()
    monkeypatch.setattr(cuda, "library", lambda: host)
    module = host_tensorrt.module(host, VERSION)
    monkeypatch.setattr(installed, "load", lambda flavour: Library(flavour, VERSION, module))
    return host


def write_engines(bundle: Bundle, folder: Path, choices: Choices, **built: Any) -> EnginesRecord:
    """Prepare a bundle's graphs in `folder`, "build" an engine of each, and record it all as the build does."""
    weights = folder / "graphs" / "weights"
    weights.mkdir(parents=True)
    for file in bundle.weights.iterdir():
        (weights / file.name).hardlink_to(file)
    created = EnginesRecord(
        target=TARGET,
        flavour="tensorrt",
        tensorrt="10.3",
        compute_capability=CAPABILITY,
        opset=choices.opset,
        precision=bundle.manifest.build.precision,
        weights=choices.weights,
        assemble=choices.assemble,
        plugins=PluginRecord(form="none"),
        bundle_sha256=bundle_digest(bundle),
        graphs=tuple(_graph(folder, graph, bundle, **built) for graph in prepare(bundle, choices)),
    )
    created.save(folder)
    return created


def engines(bundle: Bundle, folder: Path, **options: Any) -> tuple[TrtLoader, dict[str, Path]]:
    """What opens the engines in a folder, and their files by graph."""
    return open_engines(bundle, folder, profile=bundle.profile().name, **options)


def _graph(folder: Path, graph: PreparedGraph, bundle: Bundle, **built: Any) -> EngineGraph:
    several = len(bundle.manifest.profiles) > 1
    engine = engine_file(graph.name, graph.profile, several=several)
    onnx = f"graphs/{engine.removesuffix('.engine')}.onnx"
    (folder / onnx).write_bytes(graph.serialize())
    settings = {"version": VERSION, "capability": CAPABILITY} | built
    host_tensorrt.write_engine(folder / engine, folder / onnx, **settings)
    prepared = record(folder, onnx)
    return EngineGraph(
        name=graph.name,
        profile=graph.profile,
        onnx=prepared,
        inputs=graph.inputs,
        outputs=graph.outputs,
        layers=graph.layers,
        weight_inputs=graph.weight_inputs,
        custom_nodes=len(graph.custom_nodes),
        estimate=Estimate(weight_bytes=0, engine_bytes=0, activation_bytes=0, io_bytes=0, build_peak_bytes=0),
        engine=BuiltEngine(
            **record(folder, engine).model_dump(),
            tensorrt_version=settings["version"],
            compute_capability=settings["capability"],
            graph_sha256=prepared.sha256,
            plugin_sha256=None,
            seconds=0.1,
            peak_memory_bytes=None,
            layers=(),
        ),
    )
