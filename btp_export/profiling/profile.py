"""Latency of a target's engines, part by part, from what trtexec measured on the device: `btp-export profile`.

The measuring itself is profile.sh of engines/<target>/ (plain trtexec commands), run here where the device is this
machine, or earlier elsewhere, with its results in a folder. Beside each part stands what the device could do at best
(btp_export/profiling/roofline.py); beside the whole the engines without pruning, if `build --unpruned` made them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from btp_export.console import plain
from btp_export.profiling.break_even import Segments, break_even
from btp_export.profiling.roofline import Roofline, product_flops
from btp_export.profiling.sources import SYSTEM, Source, find_sources, graphs_of, measure, read_system
from engines.targets import Target, find_target
from engines.tensorrt import trtexec
from engines.tensorrt.kit.scripts import stem
from engines.tensorrt.records import EngineGraph, EnginesRecord, EngineWeights
from graphs import names
from graphs.files.atomic import write_json
from graphs.files.bundle import Bundle
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan
from graphs.records.progress import Report
from graphs.records.shapes import ShapeProfile

FORMAT: Final = "btp-profile/1"
UNSTEADY: Final = 0.1  # variation above which a time is called unsteady
FAR: Final = 0.25  # share of the roofline below which a part is pointed out


def profile_engines(
    bundle: Bundle,
    target: str,
    *,
    results: Path | None = None,
    profile: str | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Measure the engines of a target, or read into one document (docs/engines.md) what `results` holds from elsewhere.

    `profile` is a shape profile, the first if left out. The document is also written to the engines' folder, as
    profile.<baked|shared>.json (with the shape profile's name in it where there are several). Raises InputError for
    engines or results that are missing, damaged or of another bundle, UnavailableError without trtexec, TrtexecError
    if it fails.
    """
    device = find_target(target)
    chosen = bundle.profile(profile)
    sources = find_sources(bundle, device, chosen, results)
    if results is None:
        measure(sources, device, chosen, report)
    pruned, *others = [_parts(source, chosen, device) for source in sources.values()]
    full = others[0] if others else None
    record = sources[""].record
    document = {
        "format": FORMAT,
        "target": device.name,
        "title": device.title,
        "tensorrt": record.tensorrt,
        "weights": record.weights,
        "assemble": record.assemble,
        "precision": record.precision,
        "profile": chosen.name,
        "batch": chosen.batch,
        "image_tokens": chosen.image_tokens,
        "roofline": _limits(device, record) | {"measured_target": device.measured},
        "system": read_system(sources[""].results / SYSTEM),
        "parts": pruned,
        "totals": _totals(pruned),
        "unpruned": None if full is None else {"parts": full, "totals": _totals(full)},
        "speedup": _speedup(pruned, full),
        "break_even": _break_even(sources[""].plan, chosen, pruned, full),
    }
    several = len(bundle.manifest.profiles) > 1
    other = _read_document(sources[""].folder / _file(_other(record.weights), chosen, several=several))
    document["compare"] = _compare(document, other, device)
    document["notes"] = _notes(document)
    path = sources[""].folder / _file(record.weights, chosen, several=several)
    write_json(path, plain(document))
    return document | {"file": path}


def saved_profiles(bundle: Bundle) -> list[dict[str, Any]]:
    """The documents of earlier runs in the bundle, by target and kind of weights; another version's are left out."""
    found = []
    for path in sorted((bundle.root / "engines").glob("*/profile.*.json")):
        document = _read_document(path)
        if document is not None:
            found.append(document)
    return found


# -- parts -----------------------------------------------------------------------------------------------------------


def _parts(source: Source, profile: ShapeProfile, target: Target) -> list[dict[str, Any]]:
    """One entry for each graph, in the order in which they run."""
    graphs = graphs_of(source, profile)
    if not graphs:
        raise InputError(
            f"{source.folder} has no graphs of profile {profile.name}", do="btp-export build BUNDLE --target TARGET"
        )
    return [_part(source, graph, profile, target) for graph in graphs]


def _part(source: Source, graph: EngineGraph, profile: ShapeProfile, target: Target) -> dict[str, Any]:
    times = trtexec.read_times(source.results / f"{stem(graph)}{trtexec.TIMES}")
    layers_file = source.results / f"{stem(graph)}{trtexec.LAYER_TIMES}"
    layers = trtexec.read_layers(layers_file) if layers_file.is_file() else ()
    flops = product_flops(source.folder / graph.onnx.file)
    nbytes = graph.estimate.weight_bytes + graph.estimate.io_bytes
    limits = _limits(target, source.record)
    roof = Roofline(limits["peak_flops"], limits["bandwidth_bytes"])
    floor = roof.floor_ms(flops, nbytes)
    return {
        "name": graph.name,
        "kind": names.parse_graph(graph.name).kind,
        "layers": graph.layers,
        "tokens": _tokens(graph.name, source.plan, profile),
        "flops": flops,
        "bytes": nbytes,
        "ms": times.median_ms,
        "min_ms": times.min_ms,
        "p99_ms": times.p99_ms,
        "runs": times.runs,
        "variation": times.variation,
        "floor_ms": floor,
        "bound": roof.bound(flops, nbytes),
        "share_of_roofline": floor / times.median_ms if times.median_ms else None,
        "slowest_layers": [
            {"name": layer.name, "ms": layer.median_ms}
            for layer in sorted(layers, key=lambda layer: -layer.median_ms)[:3]
        ],
    }


def _tokens(name: str, plan: PruningPlan, profile: ShapeProfile) -> int:
    """Tokens of one sample that go into a part: image tokens for vision and selection, the sequence for a prefill."""
    graph = names.parse_graph(name)
    if graph.kind == "prefill":
        return profile.tokens_with(plan.segments()[graph.at].image_tokens)
    if graph.kind == "select":
        return plan.tokens_before(graph.at)
    return {"vision": profile.image_tokens, "whole": profile.total_tokens}.get(graph.kind, 1)


def _limits(target: Target, record: EnginesRecord) -> dict[str, Any]:
    return {
        "peak_flops": target.peak[record.precision],
        "bandwidth_bytes": target.bandwidth,
        "sources": list(target.sources),
    }


# -- sums and comparisons --------------------------------------------------------------------------------------------


def _totals(parts: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Milliseconds by kind. `prefill_ms` are the decoder's segments; `first_token_ms` is all but decoding."""
    sums = {kind: sum(part["ms"] for part in parts if part["kind"] == kind) for kind in names.GRAPH_KINDS}
    chain = sums["prefill"] + sums["select"] + sums["head"]
    whole = any(part["kind"] == "whole" for part in parts)
    return {
        "vision_ms": None if whole else sums["vision"],
        "prefill_ms": None if whole else sums["prefill"],
        "select_ms": None if whole else sums["select"],
        "head_ms": None if whole else sums["head"],
        "select_share": None if whole or not chain else sums["select"] / chain,
        "first_token_ms": sums["whole"] if whole else sums["vision"] + chain,
        "decode_ms": sums["decode"],
    }


def _speedup(
    pruned: Sequence[Mapping[str, Any]], full: Sequence[Mapping[str, Any]] | None
) -> dict[str, float | None] | None:
    """How many times faster than without pruning; `prefill` counts selection and head, and not vision."""
    if full is None:
        return None
    mine, other = _totals(pruned), _totals(full)
    return {
        "prefill": _ratio(_chain_ms(other), _chain_ms(mine)),
        "first_token": _ratio(other["first_token_ms"], mine["first_token_ms"]),
        "decode": _ratio(other["decode_ms"], mine["decode_ms"]),
    }


def _chain_ms(totals: Mapping[str, float | None]) -> float | None:
    parts = [totals[name] for name in ("prefill_ms", "select_ms", "head_ms")]
    return None if None in parts else math.fsum(part for part in parts if part is not None)


def _ratio(full: float | None, pruned: float | None) -> float | None:
    return None if full is None or not pruned else full / pruned


def _break_even(
    plan: PruningPlan,
    profile: ShapeProfile,
    pruned: Sequence[Mapping[str, Any]],
    full: Sequence[Mapping[str, Any]] | None,
) -> dict[str, Any]:
    """See btp_export/profiling/break_even.py."""
    return break_even(
        plan,
        profile,
        segments=_segments(pruned),
        full=None if full is None else _segments(full),
        select_ms=sum(part["ms"] for part in pruned if part["kind"] == "select"),
        decode_ms=_decode_ms(pruned),
        full_decode_ms=None if full is None else _decode_ms(full),
    )


def _segments(parts: Sequence[Mapping[str, Any]]) -> Segments:
    return [
        (part["layers"][1] - part["layers"][0], part["tokens"], part["ms"])
        for part in parts
        if part["kind"] == "prefill"
    ]


def _decode_ms(parts: Sequence[Mapping[str, Any]]) -> float:
    return math.fsum(part["ms"] for part in parts if part["kind"] == "decode")


def _compare(document: Mapping[str, Any], earlier: Mapping[str, Any] | None, target: Target) -> dict[str, Any] | None:
    """Baked against shared weights, if the other kind was profiled before with the same shapes and version."""
    mine: EngineWeights = document["weights"]
    other = _other(mine)
    same = ("tensorrt", "profile", "assemble", "precision")
    if earlier is None or any(earlier.get(key) != document[key] for key in same):
        return None
    times = {mine: _by_name(document["parts"]), other: _by_name(earlier["parts"])}
    both = [name for name in times[mine] if name in times[other]]
    totals = {mine: document["totals"], other: earlier["totals"]}
    first = {kind: total["first_token_ms"] for kind, total in totals.items()}
    decode = {kind: total["decode_ms"] for kind, total in totals.items()}
    return {
        "parts": [{"name": n, "baked_ms": times["baked"][n], "shared_ms": times["shared"][n]} for n in both],
        "first_token_ms": first,
        "decode_ms": decode,
        "faster": {"first_token": min(first, key=first.__getitem__), "decode": min(decode, key=decode.__getitem__)},
        "target_takes": target.engine_weights,
        "same_system": earlier.get("system") == document["system"],
    }


def _by_name(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {part["name"]: part["ms"] for part in parts}


def _notes(document: Mapping[str, Any]) -> list[str]:
    """What a reader of the numbers must know."""
    notes = []
    system = document["system"]
    if not any(name in system for name in ("nvpmodel", "nvidia_smi")):
        notes.append("power mode, clocks and driver are not known: there is no system.txt of profile.sh")
    if system.get("weights", "real") != "real":
        notes.append("measured with random weights: products take the same time, power and clocks may differ")
    for part in document["parts"]:
        if part["variation"] > UNSTEADY:
            notes.append(f"{part['name']} varies by {part['variation']:.0%}: fix the clocks and measure again")
        share = part["share_of_roofline"]
        if share is not None and share > 1.05:
            notes.append(f"{part['name']} is faster than {document['title']} can be: it ran on another device")
    if document["unpruned"] is None:
        notes.append("no engines without pruning: btp-export build --unpruned makes them")
    if document["assemble"] == "whole":
        notes.append("the prefill is one engine: vision, selection and head cannot be told apart")
    return notes


# -- files -----------------------------------------------------------------------------------------------------------


def _other(weights: EngineWeights) -> EngineWeights:
    return "shared" if weights == "baked" else "baked"


def _file(weights: EngineWeights, profile: ShapeProfile, *, several: bool) -> str:
    return f"profile.{weights}.{profile.name}.json" if several else f"profile.{weights}.json"


def _read_document(path: Path) -> dict[str, Any] | None:
    """An earlier document; None if there is none of this version."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) and document.get("format") == FORMAT else None
