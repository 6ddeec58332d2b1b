"""Engines that build.sh made on the device: found by the records it wrote beside them, loaded, checked and taken over.

An engine that does not fit stays where it is, and a note says why; a build that needs its name sets it aside
(target_folder.py). No engine that another program made is ever deleted.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Final

from engines.tensorrt.build.job import Job
from engines.tensorrt.build.machine import Plugins
from engines.tensorrt.build.target_folder import Part
from engines.tensorrt.build.worker import build_in_child
from engines.tensorrt.installed import Library
from engines.tensorrt.prepare.expected import expected
from engines.tensorrt.records import (
    SCRIPTED_SUFFIX,
    BuiltEngine,
    ScriptedEngine,
    WeightInput,
    bundle_digest,
)
from graphs.files.atomic import sha256
from graphs.records.errors import BtpError, CheckError, InputError
from graphs.records.manifest import TensorRecord
from graphs.records.reading import read_file
from graphs.records.record import parse_record

LOGS: Final = "logs"


def adopt(part: Part, digests: dict[tuple[str, str], str], plugins: Plugins, library: Library) -> Part:
    """The part with every engine of build.sh that is what would be built now.

    `digests` are those of the prepared graphs. Its notes name the engines that are there and were not taken.
    """
    kept, notes = dict(part.kept), list[str]()
    for number in part.pending:
        graph, file = part.plan.graphs[number], part.file(number)
        if not (part.folder / file).is_file():
            continue
        try:
            kept[graph.name, graph.profile] = _adopted(
                part, number, digests[graph.name, graph.profile], plugins, library
            )
        except BtpError as error:
            notes.append(f"{file} was not made by this command and is not taken over: {error.got}")
    return replace(part, kept=kept, notes=(*part.notes, *notes))


def _adopted(part: Part, number: int, digest: str, plugins: Plugins, library: Library) -> BuiltEngine:
    """The engine's record, after its file was loaded. Raises BtpError for what does not fit."""
    graph, file = part.plan.graphs[number], part.file(number)
    known = _scripted(part.folder, file)
    wanted = plugins.record.sha256 if graph.custom_nodes else None
    for what, got, ours in (
        ("another bundle", known.bundle_sha256, bundle_digest(part.plan.bundle)),
        ("another graph", known.graph_sha256, digest),
        ("another plugin library", known.plugin_sha256, wanted),
    ):
        if got != ours:
            raise InputError(f"it was built with {what}")
    if (part.folder / file).stat().st_size != known.size or sha256(part.folder / file) != known.sha256:
        raise InputError("it is not as its record says")
    log = part.folder / LOGS / f"{part.plan.file_stem(graph)}.check.log"
    log.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        built = build_in_child(check_job(part, number, plugins, library), Path(scratch), log, lambda share: None)
    return BuiltEngine(
        file=file,
        size=known.size,
        sha256=known.sha256,
        tensorrt_version=built.tensorrt_version,
        compute_capability=part.plan.target.compute_capability,
        graph_sha256=digest,
        plugin_sha256=known.plugin_sha256,
        seconds=known.seconds,
        peak_memory_bytes=None,  # trtexec does not say
        layers=built.layers,
        made_by="build.sh",
        options=known.options,
        findings=built.findings,
    )


def _scripted(folder: Path, file: str) -> ScriptedEngine:
    """What build.sh wrote of an engine. Raises InputError where it wrote nothing, or of another file."""
    path = folder / f"{file}{SCRIPTED_SUFFIX}"
    if not path.is_file():
        raise InputError(f"build.sh wrote no {path.name}")
    known = parse_record(ScriptedEngine, read_file(path), source=path.name, noun="record of an engine")
    if known.engine != file:
        raise CheckError(f"{path.name} speaks of {known.engine}", file, "./build.sh again")
    return known


def check_job(part: Part, number: int, plugins: Plugins, library: Library) -> Job:
    """The job of loading and checking the engine of a graph."""
    graph = part.plan.graphs[number]
    file = (part.folder / part.file(number)).resolve()
    return Job(
        graph=part.plan.file_stem(graph),
        flavour=library.flavour,
        onnx=file,
        engine=file,
        compute_capability=part.plan.target.compute_capability,
        precision=part.plan.bundle.manifest.build.precision,
        plugins=plugins.record.form,
        plugin_library=plugins.path,
        inputs=(*graph.inputs, *map(plain, graph.weight_inputs)),
        outputs=graph.outputs,
        custom_nodes=graph.custom_nodes,
        expected=expected(graph, part.plan.estimates[number].activation_bytes),
        there=True,
    )


def plain(weight: WeightInput) -> TensorRecord:
    """The input without where its bytes come from."""
    return TensorRecord(name=weight.name, dtype=weight.dtype, shape=weight.shape)
