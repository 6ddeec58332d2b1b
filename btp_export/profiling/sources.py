"""Engines that are profiled and where their measurements lie; and measuring them, by the kit's own profile.sh."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engines.native import libraries
from engines.targets import Target
from engines.tensorrt import trtexec
from engines.tensorrt.kit.scripts import needs_plugins, profile_script, stem, weights_script
from engines.tensorrt.records import (
    PLUGIN_LIBRARY,
    UNPRUNED,
    EngineGraph,
    EnginesRecord,
    bundle_digest,
    engines_folder,
)
from engines.tensorrt.versions import traits
from graphs.files.bundle import Bundle
from graphs.records.errors import InputError, UnavailableError
from graphs.records.plan import PruningPlan
from graphs.records.progress import Report
from graphs.records.reading import UnreadableError, read_file
from graphs.records.shapes import ShapeProfile

RESULTS: Final = "profile"  # folder that profile.sh writes into
SYSTEM: Final = "system.txt"  # power mode, clocks, driver and versions, one "name: value" a line


@dataclass(frozen=True)
class Source:
    """One folder of engines and where their results lie."""

    folder: Path
    results: Path
    record: EnginesRecord
    plan: PruningPlan


def find_sources(bundle: Bundle, target: Target, profile: ShapeProfile, results: Path | None) -> dict[str, Source]:
    """The engines of the bundle's plan under "", and those without pruning if they (and their results) are there."""
    folder = engines_folder(bundle, target.name)
    record = EnginesRecord.load(folder)
    _require_made_from(bundle, record, folder)
    plan = bundle.plan_for(profile.name)
    sources = {"": Source(folder, _results(folder, results, ""), record, plan)}
    inner = folder / UNPRUNED
    if (inner / "engines.json").is_file():
        other = EnginesRecord.load(inner)
        _require_made_from(bundle, other, inner)
        where = _results(inner, results, UNPRUNED)
        if results is None or where.is_dir():
            sources[UNPRUNED] = Source(inner, where, other, plan.without_stages())
    if results is not None and not results.is_dir():
        raise InputError(
            f"no folder {results}", wanted="the folder profile/ that profile.sh wrote", do="copy it from the device"
        )
    return sources


def _require_made_from(bundle: Bundle, record: EnginesRecord, folder: Path) -> None:
    if record.bundle_sha256 != bundle_digest(bundle):
        raise InputError(
            f"the engines in {folder} were made from another export of this bundle",
            wanted="engines of the bundle as it is now",
            do=f"btp-export build BUNDLE --target {record.target}",
        )


def _results(folder: Path, given: Path | None, part: str) -> Path:
    """Where results lie: a copy of the engines' folder or of its profile/ may be given."""
    if given is None:
        return folder / RESULTS
    if part:
        places = [given / part / RESULTS, given / part, given.parent / part / RESULTS]
        return next((place for place in places if place.is_dir()), places[0])
    return given / RESULTS if (given / RESULTS).is_dir() else given


def read_system(path: Path) -> dict[str, str]:
    """profile.sh's record of power mode, clocks, driver and versions, without what is empty; {} if there is none."""
    try:
        lines = read_file(path).decode(errors="replace").splitlines()
    except UnreadableError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): " ".join(value.split()) for name, colon, value in pairs if colon and value.strip()}


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(
    sources: Mapping[str, Source],
    target: Target,
    profile: ShapeProfile,
    report: Report | None,
    places: Sequence[Path] = trtexec.PLACES,
) -> None:
    """Run profile.sh, graph by graph, with the trtexec on PATH or in one of the folders `places`.

    Raises InputError for a script that is not as `build` writes it.
    """
    for part, source in sources.items():
        _require_own_scripts(source, target, part, inner=UNPRUNED in sources and not part)
    graphs = [(source, graph) for source in sources.values() for graph in graphs_of(source, profile)]
    for source, graph in graphs:
        if not (source.folder / f"{stem(graph)}.engine").is_file():
            raise InputError(
                f"{source.folder} has no engine of {graph.name}",
                wanted="engines built on this device",
                do=f"btp-export build BUNDLE --target {target.name}, or build.sh in that folder",
            )
    tool = traits(target.flavour, sources[""].record.tensorrt).tool
    environment = {**os.environ, tool.upper(): str(trtexec.find(tool, places).absolute())}
    for number, (source, graph) in enumerate(graphs):
        if report is not None:
            report(number, len(graphs), stem(graph))
        library = _plugin_library(source)
        trtexec.run(
            ["bash", "profile.sh", stem(graph)],
            folder=source.folder,
            log=source.folder / "logs" / f"{stem(graph)}.profile.sh.log",
            environment=environment if library is None else {**environment, "PLUGINS": str(library)},
            wanted=[source.results / f"{stem(graph)}{trtexec.TIMES}"],
            name=tool,
        )


def _require_own_scripts(source: Source, target: Target, part: str, *, inner: bool) -> None:
    """No hash covers the scripts of a bundle: only what would be written now is run, into folders that are no links."""
    record, inside = source.record, "../" if part else ""
    texts = {
        "profile.sh": profile_script(
            record, target, traits(record.flavour, record.tensorrt), inner=inner, inside=inside
        )
    }
    if record.weights == "shared":
        texts["weights.sh"] = weights_script(record, inside)
    for name, text in texts.items():
        path = source.folder / name
        if not path.is_file() or read_file(path) != text.encode():
            raise InputError(
                f"{path} is not the script that belongs to engines.json",
                wanted="the script as this version of btp-export writes it, which it then runs",
                do=f"btp-export build BUNDLE --target {target.name} --force; or read it, run it, and give --from",
            )
    for folder in (source.folder / RESULTS, source.folder / "logs"):
        for path in (folder, *(folder.iterdir() if folder.is_dir() else ())):
            if path.is_symlink():
                raise InputError(f"{path} is a link", wanted="a file of its own", do="remove the link")


def _plugin_library(source: Source) -> Path | None:
    """The plugin library for trtexec; None where none is needed, the user names one, or the kit's own was compiled."""
    own = source.folder / PLUGIN_LIBRARY
    if not needs_plugins(source.record) or "PLUGINS" in os.environ or own.is_file():
        return None
    if source.record.plugins.form == "python":
        raise UnavailableError(
            "the engines were built with the Python plugins, which trtexec cannot load",
            wanted="engines built with the plugin library",
            do=f"docs/native.md builds it; then btp-export build BUNDLE --target {source.record.target}",
        )
    return libraries.find("btp_trt_dynamic").absolute()


def graphs_of(source: Source, profile: ShapeProfile) -> list[EngineGraph]:
    """The graphs of a shape profile, in the order in which they run."""
    return [graph for graph in source.record.graphs if graph.profile == profile.name]
