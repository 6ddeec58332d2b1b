"""Summaries of engines before and after a build: the parts that `btp-export build` prints.

engines.json (records.py) is what the folder holds; these are what a reader of the command's result wants to know.
"""

from pathlib import Path
from typing import Literal

from engines.tensorrt.records import (
    Accumulate,
    Assemble,
    EngineGraph,
    EnginesRecord,
    EngineWeights,
    Estimate,
    Flavour,
    PluginForm,
)
from graphs.dtypes import Precision
from graphs.records.record import Record


class Finding(Record):
    """Something a version refuses: in which graph, at which node, what was got and wanted, and what to do."""

    graph: str
    node: str
    got: str
    wanted: str
    do: str


class PlannedGraph(Estimate):
    """One prepared graph and its estimates."""

    name: str
    profile: str
    nodes: int
    custom_nodes: int
    weight_inputs: int


class PlannedTotal(Record):
    """What all engines need together; `usable_bytes` is what the device has for them."""

    run_bytes: int
    build_peak_bytes: int
    disk_bytes: int
    shared_weight_bytes: int
    usable_bytes: int


class PlannedEngines(Record):
    """What will be built for a target, and whether it suits it. `estimates_from` says how bytes are estimated."""

    target: str
    tensorrt: str
    flavour: Flavour
    compute_capability: str
    opset: int
    precision: Precision
    assemble: Assemble
    accumulate: Accumulate
    engine_weights: EngineWeights
    plugins: PluginForm
    graphs: tuple[PlannedGraph, ...]
    total: PlannedTotal
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    unpruned: "PlannedEngines | None"
    estimates_from: tuple[str, ...]


class EngineState(Record):
    """One engine of the folder; everything from `size` on is null where it is not built."""

    name: str
    profile: str
    state: Literal["not built", "built", "kept"]
    file: str | None = None
    size: int | None = None
    tensorrt_version: str | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    layers: int | None = None
    plugin_layers: int | None = None
    made_by: Literal["build", "build.sh"] | None = None
    findings: tuple[str, ...] = ()  # in what its layers differ from what the graph was prepared for


class BuiltEngines(Record):
    """What a build did. `not_built` says why no engine was built where this machine cannot."""

    folder: Path
    plugins: PluginForm
    plugin_sha256: str | None
    engines: tuple[EngineState, ...]
    unpruned_engines: tuple[EngineState, ...]
    built: tuple[str, ...]  # engine files made now, relative to `folder`
    kept: tuple[str, ...]  # engine files that still stood
    not_built: str | None
    seconds: float
    notes: tuple[str, ...]


def engine_states(record: EnginesRecord | None, built: tuple[str, ...], place: str = "") -> tuple[EngineState, ...]:
    """The engines of a record whose files lie in the folder `place` ("" or "unpruned/"); `built` were made now."""
    return () if record is None else tuple(_state(graph, built, place) for graph in record.graphs)


def _state(graph: EngineGraph, built: tuple[str, ...], place: str) -> EngineState:
    engine = graph.engine
    if engine is None:
        return EngineState(name=graph.name, profile=graph.profile, state="not built")
    file = f"{place}{engine.file}"
    return EngineState(
        name=graph.name,
        profile=graph.profile,
        state="built" if file in built else "kept",
        file=file,
        size=engine.size,
        tensorrt_version=engine.tensorrt_version,
        seconds=engine.seconds,
        peak_memory_bytes=engine.peak_memory_bytes,
        layers=len(engine.layers),
        plugin_layers=sum(layer.plugin is not None for layer in engine.layers),
        made_by=engine.made_by,
        findings=engine.findings,
    )
