"""Latency of a target's engines, part by part, from what trtexec measured on the device: `btp-export profile`.

The measuring itself is profile.sh of engines/<target>/ (plain trtexec commands), run here where the device is this
machine, or earlier elsewhere, with its results in a folder. Beside each part stands what the device could do at best
(btp_export/profiling/roofline.py); beside the whole the engines without pruning, if `build --unpruned` made them.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from btp_export.profiling.limits import CLOCK, clock_notes, device_limits, read_clock
from btp_export.profiling.roofline import Roofline, product_flops
from btp_export.profiling.sources import SYSTEM, Source, find_sources, graphs_of, measure, read_system
from btp_export.profiling.totals import break_even_of, compared, speedup, totals
from btp_export.results.profile import DeviceLimits, LayerMs, Profile, ProfiledPart, UnprunedProfile
from engines.targets import Target, find_target
from engines.tensorrt import trtexec
from engines.tensorrt.build.layer_checks import described_layers, findings
from engines.tensorrt.kit.scripts import stem
from engines.tensorrt.records import EngineGraph, EngineWeights, Expected
from graphs import names
from graphs.files.atomic import check_writable, write_text
from graphs.files.bundle import Bundle
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan
from graphs.records.progress import Report
from graphs.records.reading import UnreadableError, parse_json, read_file, read_json
from graphs.records.record import parse_record
from graphs.records.shapes import ShapeProfile

FORMAT: Final = Profile.model_fields["format"].default
UNSTEADY: Final = 0.1  # variation above which a time is called unsteady
FAR: Final = 0.25  # share of the roofline below which a part is pointed out
ABOVE: Final = 1.05  # share of the roofline above which the data sheet cannot be this device's


def profile_engines(
    bundle: Bundle,
    target: str,
    *,
    results: Path | None = None,
    profile: str | None = None,
    report: Report | None = None,
    places: Sequence[Path] = trtexec.PLACES,
) -> Profile:
    """Measure the engines of a target, or read into one document (docs/engines.md) what `results` holds from elsewhere.

    `profile` is a shape profile, the first if left out; in `places` trtexec is looked for behind PATH. The document is
    also written to the engines' folder, as profile.<baked|shared>.json (with the shape profile's name in it where there
    are several). Raises InputError for
    engines, results or an earlier document that are missing, damaged or of another bundle, UnavailableError without
    trtexec, TrtexecError if it fails.
    """
    device = find_target(target)
    chosen = bundle.profile(profile)
    sources = find_sources(bundle, device, chosen, results)
    folder, weights = sources[""].folder, sources[""].record.weights
    several = len(bundle.manifest.profiles) > 1
    check_writable(folder, do="copy the bundle to where you can write")
    earlier = _read_document(folder / _file("shared" if weights == "baked" else "baked", chosen, several=several))
    if results is None:
        measure(sources, device, chosen, report, places)
    document = _document(sources, device, chosen, earlier)
    path = folder / _file(weights, chosen, several=several)
    write_text(path, document.to_json())
    return document.model_copy(update={"file": path})


def saved_profiles(bundle: Bundle) -> list[Profile]:
    """The documents of earlier runs in the bundle, by target and kind of weights; another version's are left out.

    Raises InputError for one that is damaged.
    """
    documents = map(_read_document, sorted((bundle.root / "engines").glob("*/profile.*.json")))
    return [document for document in documents if document is not None]


def _document(sources: Mapping[str, Source], device: Target, profile: ShapeProfile, earlier: Profile | None) -> Profile:
    """What the sources' results say. `earlier` has the other kind of weights."""
    system = read_system(sources[""].results / SYSTEM)
    clocks = _clocks(sources, profile)
    limits = device_limits(device, sources[""].record.precision, system, clocks.values())
    pruned, *others = [_parts(source, profile, limits) for source in sources.values()]
    full = others[0] if others else None
    record = sources[""].record
    document = Profile(
        target=device.name,
        title=device.title,
        tensorrt=record.tensorrt,
        weights=record.weights,
        assemble=record.assemble,
        precision=record.precision,
        profile=profile.name,
        batch=profile.batch,
        image_tokens=profile.image_tokens,
        roofline=limits,
        system=system,
        parts=tuple(pruned),
        totals=totals(pruned),
        unpruned=None if full is None else UnprunedProfile(parts=tuple(full), totals=totals(full)),
        speedup=speedup(pruned, full),
        break_even=break_even_of(sources[""].plan, profile, pruned, full),
        compare=None,
        notes=(),
    )
    compare = compared(document, earlier, takes=device.engine_weights)
    notes = (*clock_notes(limits, device, clocks), *_notes(document), *_findings(sources, profile))
    return document.model_copy(update={"compare": compare, "notes": notes})


def _findings(sources: Mapping[str, Source], profile: ShapeProfile) -> Iterator[str]:
    """In what the engines' layers differ from what was expected: as found by `build`, else in what trtexec exported."""
    for part, source in sources.items():
        for graph in graphs_of(source, profile):
            exported = source.results / f"{stem(graph)}{trtexec.LAYERS}"
            differences = graph.engine.findings if graph.engine is not None else _exported_findings(exported, graph)
            for text in differences:
                yield f"layers of {part}{' ' * bool(part)}{graph.name}: {text}"


def _exported_findings(path: Path, graph: EngineGraph) -> tuple[str, ...]:
    """Of an engine that build.sh made: whether anything but products reads its weight inputs, and large copies."""
    try:
        layers = described_layers(read_json(path))
    except UnreadableError:
        return ()
    except (InputError, TypeError, LookupError, AttributeError):
        return (f"{path.name} is cut off or damaged",)
    weights: dict[str, tuple[str, ...]] = {weight.name: () for weight in graph.weight_inputs}
    return findings(layers, Expected(weights=weights, scratch=graph.estimate.activation_bytes), None)


def _clocks(sources: Mapping[str, Source], profile: ShapeProfile) -> dict[str, float]:
    """The GPU's clock in Hz while each engine ran, by the engine's name, of those that were recorded."""
    clocks = {}
    for part, source in sources.items():
        for graph in graphs_of(source, profile):
            clock = read_clock(source.results / f"{stem(graph)}{CLOCK}")
            if clock is not None:
                clocks[f"{part}/{graph.name}" if part else graph.name] = clock
    return clocks


# -- parts -----------------------------------------------------------------------------------------------------------


def _parts(source: Source, profile: ShapeProfile, limits: DeviceLimits) -> list[ProfiledPart]:
    """One entry for each graph, in the order in which they run."""
    graphs = graphs_of(source, profile)
    if not graphs:
        raise InputError(
            f"{source.folder} has no graphs of profile {profile.name}", do="btp-export build BUNDLE --target TARGET"
        )
    return [_part(source, graph, profile, limits) for graph in graphs]


def _part(source: Source, graph: EngineGraph, profile: ShapeProfile, limits: DeviceLimits) -> ProfiledPart:
    times = trtexec.read_times(source.results / f"{stem(graph)}{trtexec.TIMES}")
    layers_file = source.results / f"{stem(graph)}{trtexec.LAYER_TIMES}"
    layers = trtexec.read_layers(layers_file) if layers_file.is_file() else ()
    flops = product_flops(source.folder / graph.onnx.file)
    nbytes = graph.estimate.weight_bytes + graph.estimate.io_bytes
    roof = Roofline(limits.peak_flops, limits.bandwidth_bytes)
    floor = roof.floor_ms(flops, nbytes)
    slowest = sorted(layers, key=lambda layer: -layer.median_ms)[:3]
    return ProfiledPart(
        name=graph.name,
        kind=names.parse_graph(graph.name).kind,
        layers=graph.layers,
        tokens=_tokens(graph.name, source.plan, profile),
        flops=flops,
        bytes=nbytes,
        ms=times.median_ms,
        min_ms=times.min_ms,
        p99_ms=times.p99_ms,
        runs=times.runs,
        variation=times.variation,
        floor_ms=floor,
        bound=roof.bound(flops, nbytes),
        share_of_roofline=floor / times.median_ms if times.median_ms else None,
        slowest_layers=tuple(LayerMs(name=layer.name, ms=layer.median_ms) for layer in slowest),
    )


def _tokens(name: str, plan: PruningPlan, profile: ShapeProfile) -> int:
    """Tokens of one sample that go into a part: image tokens for vision and selection, the sequence for a prefill."""
    graph = names.parse_graph(name)
    most = {"prefill": len(plan.segments()), "select": len(plan.stages)}.get(graph.kind)
    if most is not None and graph.at >= most:
        raise InputError(
            f"engines.json has a graph {name}, the plan {len(plan.stages)} stages",
            wanted="engines of this bundle",
            do="btp-export build BUNDLE --target TARGET --force",
        )
    if graph.kind == "prefill":
        return profile.tokens_with(plan.segments()[graph.at].image_tokens)
    if graph.kind == "select":
        return plan.tokens_before(graph.at)
    return {"vision": profile.image_tokens, "whole": profile.total_tokens}.get(graph.kind, 1)


def _notes(document: Profile) -> tuple[str, ...]:
    """What a reader of the numbers must know."""
    notes = []
    system = document.system
    if not any(name in system for name in ("nvpmodel", "nvidia_smi")):
        notes.append("power mode, clocks and driver are not known: there is no system.txt of profile.sh")
    if system.get("weights", "real") != "real":
        notes.append("measured with random weights: products take the same time, power and clocks may differ")
    for part in document.parts:
        if part.variation > UNSTEADY:
            notes.append(f"{part.name} varies by {part.variation:.0%}: fix the clocks and measure again")
        if part.share_of_roofline is not None and part.share_of_roofline > ABOVE:
            notes.append(f"{part.name} is faster than {document.roofline.device} can be: it ran on another device")
    if document.unpruned is None:
        notes.append("no engines without pruning: btp-export build --unpruned makes them")
    if document.assemble == "whole":
        notes.append("the prefill is one engine: vision, selection and head cannot be told apart")
    return tuple(notes)


# -- files -----------------------------------------------------------------------------------------------------------


def _file(weights: EngineWeights, profile: ShapeProfile, *, several: bool) -> str:
    return f"profile.{weights}.{profile.name}.json" if several else f"profile.{weights}.json"


def _read_document(path: Path) -> Profile | None:
    """An earlier document; None if there is none, or one of another version. Raises InputError for a damaged one."""
    if not path.is_file():
        return None
    content = read_file(path, noun="profile")
    with contextlib.suppress(ValueError):  # parse_record says what is wrong with it
        document = parse_json(content)
        if isinstance(document, dict) and document.get("format") != FORMAT:
            return None
    return parse_record(Profile, content, source=path, noun="profile")
