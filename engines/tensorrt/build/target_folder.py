"""The folder engines/<target>/ itself: one build at a time, the kit replaced as a whole, outdated engines gone.

Deleted are engines that engines.json says this program made, as they were made. Any other engine, of build.sh or of
nobody we know, stays, and is moved to set-aside/ when a build needs its name.
"""

import contextlib
import fcntl
import filecmp
import itertools
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from engines.tensorrt.build.machine import INSTEAD, Plugins
from engines.tensorrt.build.reuse import Key, earlier, graph_digests, is_current, standing
from engines.tensorrt.installed import Library
from engines.tensorrt.kit.device_kit import NOUN, Recorder, fill_kit, is_engines
from engines.tensorrt.prepare.build_plan import BuildPlan
from engines.tensorrt.records import (
    PLUGIN_LIBRARY,
    SCRIPTED_SUFFIX,
    UNPRUNED,
    BuiltEngine,
    EnginesRecord,
    engine_file,
)
from graphs.files.atomic import existing_parent, link_or_copy, move, sha256, staged
from graphs.files.folders import recover
from graphs.records.errors import InputError
from graphs.records.progress import Note

SCRATCH: Final = ".building-"  # prefix of the folder in which an engine is made
SET_ASIDE: Final = "set-aside"
# What the kit writes; anything else in the folder, engines apart, is a measurement, a log or the user's own.
WRITTEN: Final = {"graphs", "inputs", "plugins", "build.sh", "profile.sh", "weights.sh", "README.md", UNPRUNED}


@dataclass(frozen=True)
class Part:
    """The engines of one plan: those in the target's folder, or those of the unpruned model in a folder inside it.

    `kept`: engines that stand; `current`: whether the kit is what would be written now; `skip`: graphs to be left
    without an engine; `made`: file -> sha256 of the engines that an earlier build made; `notes`: on engines there.
    """

    plan: BuildPlan
    folder: Path
    kept: dict[Key, BuiltEngine]
    current: bool
    skip: frozenset[str] = frozenset()
    made: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def file(self, number: int) -> str:
        """The engine file of a graph."""
        graph = self.plan.graphs[number]
        return engine_file(graph.name, graph.profile, several=self.plan.several_profiles)

    def strangers(self) -> list[Path]:
        """Engines in the folder beside those that stand: after `settle` they are not ours."""
        named = {engine.file for engine in self.kept.values()}
        return [path for path in sorted(self.folder.glob("*.engine")) if path.name not in named]

    def is_ours(self, path: Path) -> bool:
        """Whether an engine in the folder is one that a build made, as it was made."""
        return _is_made(path, self.made)

    @property
    def pending(self) -> list[int]:
        """Numbers of the graphs to be built: without an engine that stands."""
        wanted = [n for n, graph in enumerate(self.plan.graphs) if graph.name not in self.skip]
        return [n for n in wanted if (self.plan.graphs[n].name, self.plan.graphs[n].profile) not in self.kept]


def survey_parts(
    plan: BuildPlan, folder: Path, library: Library | None, plugins: Plugins, *, force: bool, skip: Collection[str] = ()
) -> list[Part]:
    """The parts of the plan as they are on disk; with `force` everything counts as missing."""
    parts = []
    for of_plan, place in ((plan, folder), (plan.unpruned, folder / UNPRUNED)):
        if of_plan is None:
            continue
        there, digests = earlier(place), graph_digests(of_plan)
        old = None if force else there
        kept = standing(old, of_plan, digests, library, plugins.record, place)
        current = old is not None and is_current(old, of_plan, digests, place)
        parts.append(Part(of_plan, place, kept, current, frozenset(skip), _made(there)))
    return parts


def _is_made(path: Path, made: Mapping[str, str]) -> bool:
    return path.name in made and sha256(path) == made[path.name]


def _made(record: EnginesRecord | None) -> dict[str, str]:
    engines = [graph.engine for graph in record.graphs if graph.engine is not None] if record is not None else []
    return {engine.file: engine.sha256 for engine in engines if engine.made_by == "build"}


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Raise InputError if another build works in the bundle's engines/. The lock ends with the process."""
    place = existing_parent(folder.parent)
    handle = os.open(place, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another build works in {place}", wanted="one at a time", do="wait until it is done, or stop it"
            ) from error
        yield
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove what a killed build has left; the old folder comes back if the new one had not taken its place."""
    for left in (*folder.glob(f"{SCRATCH}*"), *folder.glob(f"{UNPRUNED}/{SCRATCH}*")):
        left.unlink() if left.is_symlink() else shutil.rmtree(left, ignore_errors=True)
    recover(folder, is_engines)


def write_kit(parts: Sequence[Part], recorder: Recorder | None, say: Note, *, carry: bool) -> None:
    """Replace the folder by the kit and the engines that are kept or not ours; with `carry` also other files in it."""
    plan, folder = parts[0].plan, parts[0].folder
    with staged(folder, force=True, is_ours=is_engines, noun=NOUN) as root:
        fill_kit(plan, root, recorder=recorder, say=say)
        for part in parts:
            place = root / part.folder.relative_to(folder)
            for engine in part.kept.values():
                link_or_copy(part.folder / engine.file, place / engine.file)
            _name_engines(part, EnginesRecord.load(place)).save(place)
            if part.folder.is_dir():
                _carry_engines(part, place)
                _carry_library(part.folder, place)
                if carry:
                    _carry(part.folder, place)
        if plan.unpruned is None:
            _keep_unpruned(folder / UNPRUNED, root)


def settle(part: Part, plugins: Plugins | None) -> EnginesRecord:
    """Bring engines.json and the engines there in line, outdated ones gone, before new ones are built.

    `plugins`: the form in this build; None where nothing is built here.
    """
    record = _name_engines(part, EnginesRecord.load(part.folder))
    if plugins is not None:
        notes = [note for note in record.notes if not note.startswith(INSTEAD)]
        notes += [plugins.note] if plugins.note else []
        record = record.model_copy(update={"plugins": plugins.record, "notes": tuple(notes)})
    record.save(part.folder)
    for path in part.strangers():
        if part.is_ours(path):
            path.unlink()
    return record


def set_aside(path: Path) -> None:
    """Move an engine that is not ours, if there is one, out of the way, with what build.sh says of it."""
    if path.exists():
        for source, target in _aside(path, path.parent, path.stem):
            move(source, target)


def _aside(path: Path, root: Path, stem: str) -> list[tuple[Path, Path]]:
    """An engine and its record, and free names for both in the folder of what is set aside below `root`."""
    folder = root / SET_ASIDE
    folder.mkdir(exist_ok=True)
    number = next(number for number in itertools.count(1) if not (folder / f"{stem}.{number}.engine").exists())
    pairs = [
        (path.with_name(path.name + end), folder / f"{stem}.{number}.engine{end}") for end in ("", SCRIPTED_SUFFIX)
    ]
    return [(source, target) for source, target in pairs if source.is_file()]


def _name_engines(part: Part, record: EnginesRecord) -> EnginesRecord:
    """The record with the engines that stand, and none for the other graphs."""
    graphs = [
        graph.model_copy(update={"engine": part.kept.get((graph.name, graph.profile))}) for graph in record.graphs
    ]
    return record.model_copy(update={"graphs": tuple(graphs)})


def _carry_engines(part: Part, root: Path) -> None:
    """Engines that are not ours, with build.sh's records of them, and those that were set aside."""
    for path in part.folder.glob("*.engine"):
        if not (root / path.name).exists() and not path.is_symlink() and not part.is_ours(path):
            link_or_copy(path, root / path.name)
    for path in part.folder.glob(f"*.engine{SCRIPTED_SUFFIX}"):
        if not path.is_symlink() and (root / path.name.removesuffix(SCRIPTED_SUFFIX)).exists():
            link_or_copy(path, root / path.name)
    if (part.folder / SET_ASIDE).is_dir():
        shutil.copytree(part.folder / SET_ASIDE, root / SET_ASIDE, copy_function=_linked, symlinks=True)


def _keep_unpruned(folder: Path, root: Path) -> None:
    """Engines without pruning that are not ours, where the new kit has none: they are set aside."""
    made = _made(earlier(folder))
    for path in folder.glob("*.engine"):
        if not path.is_symlink() and not _is_made(path, made):
            for source, target in _aside(path, root, f"{UNPRUNED}.{path.stem}"):
                link_or_copy(source, target)


def _carry_library(folder: Path, root: Path) -> None:
    """The plugin library that plugins/build.sh compiled, where its sources are still the same."""
    compiled = folder / PLUGIN_LIBRARY
    sources = [path.relative_to(root) for path in (root / PLUGIN_LIBRARY).parent.rglob("*") if path.is_file()]
    same = all((folder / path).is_file() and filecmp.cmp(folder / path, root / path, False) for path in sources)
    if sources and same and compiled.is_file() and not compiled.is_symlink():
        link_or_copy(compiled, root / PLUGIN_LIBRARY)


def _carry(folder: Path, root: Path) -> None:
    """What is neither of the kit nor an engine."""
    for path in folder.iterdir():
        target = root / path.name
        engine = path.suffix in (".engine", ".partial") or path.name.endswith(f".engine{SCRIPTED_SUFFIX}")
        if path.name in WRITTEN or target.exists() or engine or path.is_symlink():
            continue
        if path.is_dir():
            shutil.copytree(path, target, copy_function=_linked, symlinks=True)
        else:
            link_or_copy(path, target)


def _linked(source: str, target: str) -> None:
    link_or_copy(Path(source), Path(target))
