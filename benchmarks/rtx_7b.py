"""Engines of a full-size LLaVA-1.5-7B in segments, by TensorRT for RTX, for a GPU that need not be there.

    python -m benchmarks.rtx_7b [--layers 32] [--weights int4] [--target rtx-ada] [--memory 24]

Makes a checkpoint with made-up weights in the model's shapes (13.5 GB, kept in the cache), exports it with the
published plan, and builds every engine twice: with shared weights, then with baked ones. Seconds, size and peak memory
of the building process are written to benchmarks/results/rtx_7b.md. A graph whose build would take more than --memory
GiB by the estimate is left out and said. Needs 13.5 GB of disk for the checkpoint and as much for the baked engines.

With --weights int4 the projections are random codes in groups of 128 (4.5 GB), and the page is
benchmarks/results/four_bits_rtx.md.
"""

import argparse
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from benchmarks.pages import put_between_marks
from btp_export import console
from btp_export.dummy.checkpoints import dummy_checkpoint
from btp_export.exporting import Options, export_bundle
from btp_export.model.open_model import open_model
from engines.targets import GIB, find_target
from engines.tensorrt.build.build import build
from engines.tensorrt.build.machine import machine_for
from engines.tensorrt.prepare.build_plan import BuildPlan, Wishes, plan_build
from engines.tensorrt.records import EngineWeights
from engines.tensorrt.summaries import BuiltEngines
from graphs import names
from graphs.files.bundle import Bundle
from graphs.files.cache_folder import cache_folder
from graphs.files.memory import available_memory
from graphs.records.plan import PruningPlan, Stage

MODEL = "llava-1.5-7b"
RESULTS = Path(__file__).parent / "results"
TITLE = "Engines of LLaVA-1.5-7B by TensorRT for RTX, without a GPU"
PAGES = {"model": RESULTS / "rtx_7b.md", "int4": RESULTS / "four_bits_rtx.md"}
KINDS: tuple[EngineWeights, ...] = ("shared", "baked")
GROUP = 128
MADE = {"model": "made-up weights", "int4": f"random codes in groups of {GROUP}, symmetric"}
PUBLISHED = (  # the released stages of LLaVA-1.5-7B
    Stage(layer=3, keep=288, attention_quota=86, diversity_quota=86, pool=318, boundary=288, seeds=144),
    Stage(layer=6, keep=144, attention_quota=129, diversity_quota=14, pool=194, boundary=144),
    Stage(layer=14, keep=48, attention_quota=48, pool=57, boundary=48),
    Stage(layer=22, keep=0),
)
SHORT = (  # where fewer layers are asked for: one stage before the last layer
    Stage(layer=1, keep=288, attention_quota=86, diversity_quota=86, pool=318, boundary=288, seeds=144),
)


@dataclass(frozen=True)
class Built:
    """All engines with one kind of weights. `skipped`: graph -> why it was left out."""

    weights: EngineWeights
    plan: BuildPlan
    summary: BuiltEngines
    skipped: dict[str, str]


def make_bundle(layers: int, weights: str, folder: Path) -> Bundle:
    """The dummy model with the published plan, float16, one profile."""
    with console.progress("checkpoint") as bar:
        group = GROUP if weights == "int4" else None
        checkpoint = dummy_checkpoint(MODEL, layers=layers, group=group, report=bar)
    model = open_model(str(checkpoint))
    stages = tuple(stage for stage in PUBLISHED if stage.layer < layers) if layers > 3 else SHORT
    plan = PruningPlan(model_type="llava", num_layers=layers, image_tokens=576, grid=(24, 24), stages=stages)
    with console.progress("export") as bar:
        return export_bundle(model, plan, folder / "bundle", Options(precision="float16"), report=bar)


def build_all(bundle: Bundle, target: str, weights: EngineWeights, memory: int) -> Built:
    """Every engine whose build fits the memory; the target's own memory does not count here."""
    chosen = find_target(target)
    wishes = Wishes(assemble="segments", engine_weights=weights, memory_bytes=10 * memory)
    builder = machine_for(chosen, wishes)
    if builder.library is None:
        raise SystemExit(builder.reason)
    plan = plan_build(bundle, chosen, builder.wishes)
    skipped = {
        graph.name: f"its build is estimated at {_gib(estimate.build_peak_bytes)}, more than {_gib(memory)}"
        for graph, estimate in zip(plan.graphs, plan.estimates, strict=True)
        if estimate.build_peak_bytes > memory
    }
    with console.progress(f"engines, {weights}") as bar:
        result = build(plan, builder.library, force=True, skip=skipped, report=bar)
    return Built(weights, plan, result.summary(), skipped)


def render(layers: int, weights: str, builds: Sequence[Built]) -> str:
    """What is written into the page of results, Markdown."""
    first = builds[0]
    version = next(engine.tensorrt_version for engine in first.summary.engines if engine.file)
    plan, memory = first.plan, available_memory()
    parts = [
        f"`python -m benchmarks.rtx_7b --layers {layers} --weights {weights}`, {date.today().isoformat()}: "
        f"{layers} of 32 decoder layers, {MADE[weights]}, {plan.bundle.manifest.build.precision}, opset "
        f"{plan.choices.opset}, the published plan, in segments, from the portable bodies, for {plan.target.title} "
        f"(compute capability {plan.target.compute_capability}). TensorRT for RTX {version}, Python "
        f"{platform.python_version()}, {len(os.sched_getaffinity(0))} cores with a load of {os.getloadavg()[1]:.1f}, "
        f"{_gib(memory or 0)} of memory available. *Memory* is the peak of the process that builds the engine; mapped "
        "weight files are part of it.",
    ]
    for built in builds:
        parts += [f"## Weights {built.weights}", _table(built), *_totals(built)]
    return "\n\n".join(parts) + "\n"


def _table(built: Built) -> str:
    lines = [
        "| engine | layers | its weights | size | build | memory | estimate of memory |",
        "|---|---|---|---|---|---|---|",
    ]
    estimates = zip(built.plan.graphs, built.plan.estimates, built.summary.engines, strict=True)
    for graph, estimate, engine in estimates:
        layers = (
            f"{graph.layers[0]} to {graph.layers[1] - 1}"
            if graph.layers
            else "all"
            if graph.name == names.DECODE
            else ""
        )
        row = [graph.name, layers, _mb(estimate.weight_bytes)]
        if engine.file is None:
            row += ["not built", "", ""]
        else:
            row += [_mb(engine.size or 0), f"{engine.seconds:.1f} s", _gib(engine.peak_memory_bytes or 0)]
        lines.append(f"| {' | '.join([*row, _gib(estimate.build_peak_bytes)])} |")
    return "\n".join(lines)


def _totals(built: Built) -> list[str]:
    engines = [engine for engine in built.summary.engines if engine.file is not None]
    text = (
        f"All {len(engines)} engines: {_mb(sum(engine.size or 0 for engine in engines))} in "
        f"{sum(engine.seconds or 0.0 for engine in engines):.1f} s, at most "
        f"{_gib(max(engine.peak_memory_bytes or 0 for engine in engines))}."
    )
    return [text, *(f"{name} was left out: {why}." for name, why in built.skipped.items())]


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"


def main() -> None:
    """Make, build, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--weights", choices=tuple(PAGES), default="model")
    parser.add_argument("--target", default="rtx-ada")
    parser.add_argument("--memory", type=float, default=24, help="GiB that a build may take")
    parser.add_argument(
        "--folder", type=Path, help="where the bundle and its engines lie  [default: beside the checkpoint]"
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    place = given.folder or cache_folder()  # on the checkpoint's disk, so that weights are linked
    place.mkdir(parents=True, exist_ok=True)
    memory = int(min(given.memory * GIB, available_memory() or given.memory * GIB))
    with tempfile.TemporaryDirectory(prefix=".rtx-7b-", dir=place) as folder:
        bundle = make_bundle(given.layers, given.weights, Path(folder))
        builds = [build_all(bundle, given.target, kind, memory) for kind in KINDS]
        page = render(given.layers, given.weights, builds)
    put_between_marks(given.out or PAGES[given.weights], page, title=TITLE)
    print(page)


if __name__ == "__main__":
    main()
