"""The folder engines/<target>/ itself: one build at a time, the kit replaced as a whole, outdated engines gone."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from graphs.records.progress import Note
from engines.tensorrt.build.reuse import Key, earlier, graph_digests, is_current, standing
from engines.tensorrt.kit.device_kit import NOUN, Recorder, fill_kit, is_engines
from engines.tensorrt.installed import Library
from engines.tensorrt.build.machine import INSTEAD, Plugins
from engines.tensorrt.prepare.build_plan import BuildPlan
from engines.tensorrt.records import UNPRUNED, BuiltEngine, EnginesRecord
from graphs.records.errors import InputError
from graphs.files.atomic import existing_parent, staged, link_or_copy
from graphs.files.folders import recover

SCRATCH: Final = ".building-"  # prefix of the folder in which an engine is made
# What the kit writes; anything else in the folder, engines apart, is a measurement, a log or the user's own.
WRITTEN: Final = {"graphs", "inputs", "plugins", "build.sh", "profile.sh", "weights.sh", "README.md", UNPRUNED}


@dataclass(frozen=True)
class Part:
    """The engines of one plan: those in the target's folder, or those of the unpruned model in a folder inside it.

    `kept`: engines that stand; `current`: whether the kit is what would be written now; `skip`: graphs to be left
    without an engine.
    """

    plan: BuildPlan
    folder: Path
    kept: dict[Key, BuiltEngine]
    current: bool
    skip: frozenset[str] = frozenset()

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
        old, digests = None if force else earlier(place), graph_digests(of_plan)
        kept = standing(old, of_plan, digests, library, plugins.record, place)
        current = old is not None and is_current(old, of_plan, digests, place)
        parts.append(Part(of_plan, place, kept, current, frozenset(skip)))
    return parts


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
    """Replace the folder by the kit and the engines that are kept; with `carry` also files in it that are not ours."""
    plan, folder = parts[0].plan, parts[0].folder
    with staged(folder, force=True, is_ours=is_engines, noun=NOUN) as root:
        fill_kit(plan, root, recorder=recorder, say=say)
        for part in parts:
            place = root / part.folder.relative_to(folder)
            for engine in part.kept.values():
                link_or_copy(part.folder / engine.file, place / engine.file)
            _name_engines(part, EnginesRecord.load(place)).save(place)
            if carry and part.folder.is_dir():
                _carry(part.folder, place)


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
    named = {engine.file for engine in part.kept.values()}
    for path in part.folder.glob("*.engine"):
        if path.name not in named:
            path.unlink()
    return record


def _name_engines(part: Part, record: EnginesRecord) -> EnginesRecord:
    """The record with the engines that stand, and none for the other graphs."""
    graphs = [
        graph.model_copy(update={"engine": part.kept.get((graph.name, graph.profile))}) for graph in record.graphs
    ]
    return record.model_copy(update={"graphs": tuple(graphs)})


def _carry(folder: Path, root: Path) -> None:
    for path in folder.iterdir():
        target = root / path.name
        if path.name in WRITTEN or target.exists() or path.suffix in (".engine", ".partial") or path.is_symlink():
            continue
        if path.is_dir():
            shutil.copytree(path, target, copy_function=_linked, symlinks=True)
        else:
            link_or_copy(path, target)


def _linked(source: str, target: str) -> None:
    link_or_copy(Path(source), Path(target))
