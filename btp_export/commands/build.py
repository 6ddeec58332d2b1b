"""`btp-export build`: TensorRT engines of a bundle for a device, or all that the device needs to build them."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from btp_export import bounds, extras
from btp_export.commands import _options as options
from btp_export.commands._groups import Between
from btp_export.console import JsonOption, emit, progress, table

if TYPE_CHECKING:
    from btp_export.results.engines import BuildResult

GIB = 2**30
EXTRA = extras.DEVICE  # what is named where a library is missing


def command(
    bundle: options.BundleArgument,
    target: options.TargetOption,
    tensorrt: Annotated[
        str | None, typer.Option("--tensorrt", metavar="VERSION", help="TensorRT version.  [default: the target's]")
    ] = None,
    assemble: Annotated[
        Literal["segments", "whole"] | None,
        typer.Option("--assemble", help="Prefill in segments, or as one engine.  [default: the target's]"),
    ] = None,
    engine_weights: Annotated[
        Literal["baked", "shared"] | None,
        typer.Option("--engine-weights", help="In each engine, or shared by all.  [default: the target's]"),
    ] = None,
    plugins: Annotated[
        Literal["auto", "library", "python", "none"],
        typer.Option("--plugins", help="Form of the custom operators; none: standard operators only."),
    ] = "auto",
    accumulate: Annotated[
        Literal["auto", "float32", "native"],
        typer.Option("--accumulate", help="Sums in float16 products; native leaves them to TensorRT."),
    ] = "auto",
    memory: Annotated[
        float | None,
        typer.Option("--memory", metavar="GIB", help="Memory of the device.  [default: the target's]"),
        Between(*(size / GIB for size in bounds.MEMORY), 8),
    ] = None,
    unpruned: Annotated[
        bool, typer.Option("--unpruned", help="Also build engines without pruning, for comparison.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Prepare, check and estimate; write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the engines of this target.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Build TensorRT engines; without TensorRT, write what the device needs to build and profile them."""
    from btp_export.engine_inputs import build_engines
    from btp_export.results.engines import BuildResult
    from engines.targets import find_target
    from engines.tensorrt.build.machine import machine_for
    from engines.tensorrt.prepare.build_plan import Wishes, plan_build
    from graphs.files.bundle import Bundle

    device = find_target(target)
    wishes = Wishes(
        tensorrt=tensorrt,
        assemble=assemble,
        engine_weights=engine_weights,
        plugins=plugins,
        memory_bytes=None if memory is None else int(memory * GIB),
        unpruned=unpruned,
        accumulate=accumulate,
    )
    opened = Bundle.open(bundle)
    if dry_run:
        plan = plan_build(opened, device, wishes)
        emit(BuildResult.of(plan.summary()), as_json=as_json, render=show)
        return 1 if plan.findings else 0
    machine = machine_for(device, wishes)
    plan = plan_build(opened, device, machine.wishes)
    with progress("building") as bar:
        built = build_engines(plan, machine, force=force, report=bar)
    emit(BuildResult.of(plan.summary(), built), as_json=as_json, render=show_built)
    return 0


def show(result: "BuildResult") -> Any:
    """The document of `build` for the console."""
    from rich.console import Group

    several = len({graph.profile for graph in result.graphs}) > 1
    rows = [
        [
            f"{graph.name} {graph.profile}" if several else graph.name,
            str(graph.nodes),
            str(graph.custom_nodes),
            _size(graph.weight_bytes),
            _size(graph.engine_bytes),
            _size(graph.activation_bytes),
            _size(graph.build_peak_bytes),
        ]
        for graph in result.graphs
    ]
    total = result.total
    lines = [
        f"{result.target}: TensorRT {result.tensorrt}, opset {result.opset}, {result.precision}, "
        f"{result.assemble}, weights {result.engine_weights}, plugins {result.plugins}",
        f"the engines fit: to run {_size(total.run_bytes)} of {_size(total.usable_bytes)}, to build "
        f"{_size(total.build_peak_bytes)}, on disk {_size(total.disk_bytes)}"
        + (f", shared weights {_size(total.shared_weight_bytes)}" if total.shared_weight_bytes else ""),
        *(f"note: {text}" for text in result.notes),
        *(f"finding: {f.graph}: {f.node}: {f.got}; wanted: {f.wanted}" for f in result.findings),
        f"{len(result.findings)} findings" if result.findings else "lint: the graphs suit this version",
    ]
    heads = ["graph", "nodes", "plugins", "weights", "engine", "scratch", "build"]
    return Group(table(heads, rows), "\n".join(lines))


def show_built(result: "BuildResult") -> Any:
    """The document of `build` for the console, when it has built or written the kit."""
    from rich.console import Group

    several = len({graph.profile for graph in result.graphs}) > 1
    entries = [("", entry) for entry in result.engines]
    entries += [("unpruned ", entry) for entry in result.unpruned_engines]
    rows = [
        [
            f"{kind}{entry.name}" + (f" {entry.profile}" if several else ""),
            entry.state if entry.made_by == "build" else f"{entry.state}, by {entry.made_by}",
            _size(entry.size or 0),
            f"{entry.seconds or 0.0:.1f} s",
            "unknown" if entry.peak_memory_bytes is None else _size(entry.peak_memory_bytes),
            str(entry.layers),
            str(entry.plugin_layers),
        ]
        for kind, entry in entries
        if entry.file is not None
    ]
    lines = [
        f"{result.target}: TensorRT {result.tensorrt}, opset {result.opset}, {result.precision}, "
        f"{result.assemble}, weights {result.engine_weights}, plugins {result.plugins}",
        *(f"note: {text}" for text in result.notes),
        *(f"layers of {kind}{entry.name}: {text}" for kind, entry in entries for text in entry.findings),
    ]
    if result.not_built:
        lines.append(f"no engine was built: {result.not_built}")
        lines.append(f"{result.folder} holds all that the device needs; its README.md says how")
    else:
        lines.append(f"{len(result.built)} engines built, {len(result.kept)} unchanged: {result.folder}")
    heads = ["engine", "state", "size", "build", "memory", "layers", "plugins"]
    return Group(*([table(heads, rows, text=2)] if rows else []), "\n".join(lines))


def _size(count: int) -> str:
    from graphs.files.atomic import size_text

    return size_text(count)
