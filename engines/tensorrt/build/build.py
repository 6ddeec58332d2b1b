"""`btp-export build`: the folder engines/<target>/ is brought up to date, engine by engine.

1. Everything is worked out and checked first (prepare/build_plan.py, machine.py): graphs, lint, memory, disk, TensorRT,
   plugins.
2. Engines that build.sh made are loaded, checked and taken over (adopt.py).
3. The kit is written if it is not there as it would be now (kit/device_kit.py), atomically; engines that still stand
   move along, and so do files that are not ours (reuse.py, target_folder.py).
4. Engines that are missing, or that something has changed for, are built in order, each in its own process. An engine
   appears under its name when it is whole and checked, and engines.json names it after that. So an interrupted build
   leaves complete engines only, and the next one continues from there.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engines.tensorrt.build.adopt import LOGS, adopt, plain
from engines.tensorrt.build.engine_checks import require_file
from engines.tensorrt.build.job import Built, Job
from engines.tensorrt.build.machine import Plugins, choose_plugins
from engines.tensorrt.build.reuse import graph_digests
from engines.tensorrt.build.target_folder import (
    SCRATCH,
    Part,
    only_one,
    set_aside,
    settle,
    survey_parts,
    sweep,
    write_kit,
)
from engines.tensorrt.build.worker import build_in_child
from engines.tensorrt.installed import Library
from engines.tensorrt.kit.device_kit import NOUN, Recorder, disk_bytes, is_engines
from engines.tensorrt.prepare.build_plan import BuildPlan, require_build_memory
from engines.tensorrt.prepare.expected import expected
from engines.tensorrt.prepare.lint import require_clean
from engines.tensorrt.records import (
    UNPRUNED,
    BuiltEngine,
    EngineGraph,
    EnginesRecord,
    PluginRecord,
    engine_file,
    engines_folder,
)
from engines.tensorrt.summaries import BuiltEngines, engine_states
from graphs.files.atomic import check_destination, check_space, move, sha256
from graphs.files.memory import available_memory
from graphs.files.signals import uninterrupted
from graphs.records.progress import Note, Report, silent

TIMING_CACHE: Final = "timing.cache"


@dataclass(frozen=True)
class Result:
    """What a build did. `not_built` says why no engine was built where this machine cannot, "" where it can."""

    folder: Path
    record: EnginesRecord
    unpruned: EnginesRecord | None
    built: tuple[str, ...]  # engine files made now, relative to `folder`
    kept: tuple[str, ...]  # engine files that still stood
    seconds: float
    not_built: str = ""
    notes: tuple[str, ...] = ()  # on engines that are there and were not taken over

    def summary(self) -> BuiltEngines:
        """What was built, beside what BuildPlan.summary() says of the plan."""
        return BuiltEngines(
            folder=self.folder,
            plugins=self.record.plugins.form,
            plugin_sha256=self.record.plugins.sha256,
            engines=engine_states(self.record, self.built),
            unpruned_engines=engine_states(self.unpruned, self.built, f"{UNPRUNED}/"),
            built=self.built,
            kept=self.kept,
            not_built=self.not_built or None,
            seconds=self.seconds,
            notes=(*self.record.notes, *self.notes),
        )


def build(
    plan: BuildPlan,
    library: Library | None,
    *,
    wish: str = "auto",
    reason: str = "",
    force: bool = False,
    skip: Collection[str] = (),
    recorder: Recorder | None = None,
    report: Report = silent,
    say: Note = lambda text: None,
) -> Result:
    """Bring engines/<target>/ of the bundle up to date; without `library` that is the kit, and `reason` says why.

    `wish`: the form of plugins the user asked for; `force`: write and build all of it anew; `skip`: names of graphs
    that stay without an engine. Raises InputError, CheckError or UnavailableError before anything is written if
    something does not fit; whatever is raised later, every engine file is complete.
    """
    start = time.monotonic()
    require_clean(plan.findings, plan.traits)
    if plan.unpruned is not None:
        require_clean(plan.unpruned.findings, plan.traits)
    folder = engines_folder(plan.bundle, plan.target.name)
    check_destination(folder, force=True, is_ours=is_engines, noun=NOUN)
    plugins = Plugins(PluginRecord(form=plan.plugins)) if library is None else choose_plugins(plan, wish)
    with only_one(folder):
        sweep(folder)
        parts = survey_parts(plan, folder, library, plugins, force=force, skip=skip)
        if library is not None and not force:
            parts = [adopt(part, graph_digests(part.plan), plugins, library) for part in parts]
        _require_means(plan, parts, build=library is not None)
        if not all(part.current for part in parts):
            write_kit(parts, recorder, say, carry=not force)
        records = [settle(part, None if library is None else plugins) for part in parts]
        built = [] if library is None else _build_pending(parts, records, plugins, library, report)
    files = [_file(folder, part, engine) for part in parts for engine in part.kept.values()]
    unpruned = records[1] if len(records) > 1 else None
    seconds = round(time.monotonic() - start, 3)
    notes = [note for part in parts for note in part.notes]
    if library is None and (left := [path.name for part in parts for path in part.strangers()]):
        notes.append(f"{', '.join(left)}: not made here; the same command on the device takes over what build.sh made")
    return Result(folder, records[0], unpruned, tuple(built), tuple(files), seconds, reason, tuple(notes))


def _require_means(plan: BuildPlan, parts: Sequence[Part], *, build: bool) -> None:
    """Raise InputError unless disk and memory suffice for what will be written and built."""
    estimates = [part.plan.estimates[number] for part in parts for number in part.pending]
    kit = 0
    if not all(part.current for part in parts):
        kit = disk_bytes(plan) - sum(part.plan.totals.disk_bytes for part in parts)
    engines = sum(estimate.engine_bytes for estimate in estimates)
    folder = parts[0].folder
    remedy = "free some space" + ", or --engine-weights shared" * (plan.choices.weights == "baked")
    check_space(folder, kit + engines, what=f"the folder {folder.name}", do=remedy)
    free = available_memory()
    if build and free is not None and max((estimate.build_peak_bytes for estimate in estimates), default=0) > free:
        require_build_memory(plan, free)


def _file(folder: Path, part: Part, engine: BuiltEngine) -> str:
    return (part.folder / engine.file).relative_to(folder).as_posix()


# -- one engine after another ----------------------------------------------------------------------------------------


def _build_pending(
    parts: Sequence[Part], records: list[EnginesRecord], plugins: Plugins, library: Library, report: Report
) -> list[str]:
    """Build what is missing; engines.json names each engine as soon as it is complete. Updates `records`."""
    todo = [(index, number) for index, part in enumerate(parts) for number in part.pending]
    work = [parts[index].plan.estimates[number].build_peak_bytes for index, number in todo]  # grows with the time
    built: list[str] = []
    for position, (index, number) in enumerate(todo):
        part = parts[index]
        stem = part.plan.file_stem(part.plan.graphs[number])
        before, own = sum(work[:position]), work[position]

        def progress(share: float, text: str = stem, before: int = before, own: int = own) -> None:
            report(int(100 * (before + share * own) / sum(work)), 100, text)

        progress(0.0)
        with _scratch(part.folder, stem) as scratch:
            engine = _build_one(part, records[index], number, plugins, library, scratch, progress)
            graphs = list(records[index].graphs)
            graphs[number] = graphs[number].model_copy(update={"engine": engine})
            records[index] = records[index].model_copy(update={"graphs": tuple(graphs)})
            with uninterrupted():
                set_aside(part.folder / engine.file)
                move(scratch / engine.file, part.folder / engine.file)
                records[index].save(part.folder)
        built.append(_file(parts[0].folder, part, engine))
    return built


@contextlib.contextmanager
def _scratch(folder: Path, stem: str) -> Iterator[Path]:
    """A folder for one engine while it is made, removed at the end whatever happens."""
    scratch = folder / f"{SCRATCH}{stem}"
    try:
        scratch.mkdir()
        yield scratch
    finally:
        with uninterrupted():
            shutil.rmtree(scratch, ignore_errors=True)


def _build_one(
    part: Part,
    record: EnginesRecord,
    number: int,
    plugins: Plugins,
    library: Library,
    scratch: Path,
    progress: Callable[[float], None],
) -> BuiltEngine:
    """Build and check one engine in the folder `scratch`. What TensorRT says is kept in logs/."""
    graph, prepared, folder = record.graphs[number], part.plan.graphs[number], part.folder
    stem = part.plan.file_stem(prepared)
    file = engine_file(graph.name, graph.profile, several=part.plan.several_profiles)
    log = folder / LOGS / f"{stem}.log"
    log.parent.mkdir(exist_ok=True)
    job = Job(
        graph=stem,
        flavour=library.flavour,
        onnx=(folder / graph.onnx.file).resolve(),
        engine=(scratch / file).resolve(),
        compute_capability=record.compute_capability,
        precision=record.precision,
        plugins=record.plugins.form,
        plugin_library=plugins.path,
        timing_cache=(folder / TIMING_CACHE).resolve() if library.flavour == "tensorrt" else None,
        inputs=(*graph.inputs, *map(plain, graph.weight_inputs)),
        outputs=graph.outputs,
        custom_nodes=prepared.custom_nodes,
        expected=expected(prepared, part.plan.estimates[number].activation_bytes),
    )
    built = build_in_child(job, scratch.resolve(), log, progress)
    require_file(scratch / file, built.size)
    return _engine_record(job, built, graph, plugins, file)


def _engine_record(job: Job, built: Built, graph: EngineGraph, plugins: Plugins, file: str) -> BuiltEngine:
    return BuiltEngine(
        file=file,
        size=built.size,
        sha256=sha256(job.engine),
        tensorrt_version=built.tensorrt_version,
        compute_capability=job.compute_capability,
        graph_sha256=graph.onnx.sha256,
        plugin_sha256=plugins.record.sha256 if graph.custom_nodes else None,
        seconds=built.seconds,
        peak_memory_bytes=built.peak_memory_bytes,
        layers=built.layers,
        findings=built.findings,
    )
