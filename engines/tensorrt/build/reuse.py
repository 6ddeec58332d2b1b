"""What of an earlier build still stands: the kit as a whole, and each engine that nothing has changed for."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from engines.tensorrt.installed import Library
from engines.tensorrt.prepare.build_plan import BuildPlan
from engines.tensorrt.records import FILE, BuiltEngine, EnginesRecord, PluginRecord, bundle_digest
from graphs.files.atomic import SMALL_FILE, sha256
from graphs.records.errors import InputError

Key = tuple[str, str]  # a graph's name and profile


def earlier(folder: Path) -> EnginesRecord | None:
    """The record in the folder; None where there is none that can be gone on with, of another version of ours say."""
    if not (folder / FILE).is_file():
        return None
    try:
        return EnginesRecord.load(folder)
    except InputError:
        return None


def graph_digests(plan: BuildPlan) -> dict[Key, str]:
    """sha256 of each prepared graph's file."""
    return {(graph.name, graph.profile): hashlib.sha256(graph.serialize()).hexdigest() for graph in plan.graphs}


def is_current(old: EnginesRecord, plan: BuildPlan, digests: Mapping[Key, str], folder: Path) -> bool:
    """Whether the kit in `folder` is what would be written now.

    The C++ and the Python form of the plugins differ in the engines, not in the kit.
    """
    settings = (
        old.target == plan.target.name
        and old.flavour == plan.traits.flavour
        and old.tensorrt == plan.traits.version
        and old.compute_capability == plan.target.compute_capability
        and old.weights == plan.choices.weights
        and old.assemble == plan.choices.assemble
        and (old.plugins.form == "none") == (plan.plugins == "none")
        and old.bundle_sha256 == bundle_digest(plan.bundle)
    )
    graphs = {(graph.name, graph.profile): graph.onnx for graph in old.graphs}
    same = {key: entry.sha256 for key, entry in graphs.items()} == digests
    return settings and same and all(_is_file(folder / file.file, file.size) for file in graphs.values())


def standing(
    old: EnginesRecord | None,
    plan: BuildPlan,
    digests: Mapping[Key, str],
    library: Library | None,
    plugins: PluginRecord,
    folder: Path,
) -> dict[Key, BuiltEngine]:
    """The engines in `folder` that a build would make again as they are.

    Compared are the graph, the bundle (its weights), TensorRT's whole version, the GPU, and for graphs with custom
    nodes the plugin library. Without `library` nothing can be built here, and what another machine has built is kept.
    """
    if old is None or old.bundle_sha256 != bundle_digest(plan.bundle):
        return {}
    engines = {(graph.name, graph.profile): graph.engine for graph in old.graphs}
    custom = {(graph.name, graph.profile) for graph in plan.graphs if graph.custom_nodes}
    kept = {}
    for key, digest in digests.items():
        engine = engines.get(key)
        if engine is None or engine.graph_sha256 != digest or not _is_whole(folder, engine):
            continue
        if engine.compute_capability != plan.target.compute_capability:
            continue
        wanted = plugins.sha256 if key in custom else None
        if library is None or (engine.tensorrt_version, engine.plugin_sha256) == (library.version, wanted):
            kept[key] = engine
    return kept


def _is_whole(folder: Path, engine: BuiltEngine) -> bool:
    path = folder / engine.file
    return _is_file(path, engine.size) and (engine.size > SMALL_FILE or sha256(path) == engine.sha256)


def _is_file(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
