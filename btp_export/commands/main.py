"""`btp-export --model NAME`: the whole road."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from btp_export import __version__
from btp_export.commands import _options as options
from btp_export.console import JsonOption, dummy_lines, emit

if TYPE_CHECKING:
    from btp_export.results.job import JobResult

VersionOption = Annotated[bool, typer.Option("--version", help="Show the version and exit.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show where an error came from; for every command.")]
TargetOption = Annotated[str | None, typer.Option("--target", metavar="T", help=f"Engines too. {options.TARGET_HELP}")]
ModelOption = Annotated[str | None, typer.Option("--model", metavar="NAME", help=options.MODEL_HELP)]


def command(
    context: typer.Context,
    model: ModelOption = None,
    out: options.OutOption = None,
    plan: options.PlanOption = "btp",
    compression: options.CompressionOption = None,
    keep: options.KeepOption = None,
    images: options.ImagesOption = None,
    samples: options.SamplesOption = 64,
    seed: options.SeedOption = 0,
    batch: options.BatchOption = 1,
    text_tokens: options.TextOption = None,
    max_new_tokens: options.NewOption = None,
    image_size: options.ImageSizeOption = None,
    profile: options.ProfileOption = None,
    opset: options.OpsetOption = 23,
    precision: options.PrecisionOption = None,
    assemble: options.AssembleOption = "segments",
    link: options.LinkOption = "auto",
    target: TargetOption = None,
    system: options.SystemOption = None,
    force: options.ForceOption = False,
    dummy: options.DummyOption = False,
    dummy_layers: options.DummyLayersOption = None,
    dummy_seed: options.DummySeedOption = 0,
    version: VersionOption = False,
    debug: DebugOption = False,  # taken off the command line before typer sees it, see cli.main
    as_json: JsonOption = False,
) -> None:
    """Prune the image tokens of a vision-language model and export it as static ONNX subgraphs.

    With --model and no command: calibrate, export, verify, measure, write a report, and with --target build engines.
    """
    start = time.perf_counter()
    if version:
        from btp_export.results.doctor import Version

        emit(Version(version=__version__), as_json=as_json, render=lambda result: f"btp-export {result.version}")
        raise typer.Exit
    if context.invoked_subcommand is not None:
        _refuse_stray_options(context)
        return
    if model is None:
        raise typer.BadParameter("a model or a command is needed", param_hint="--model")
    chosen = options.export_options(
        batch=batch,
        text_tokens=text_tokens,
        max_new_tokens=max_new_tokens,
        image_size=image_size,
        profile=profile,
        opset=opset,
        precision=precision,
        assemble=assemble,
        link=link,
    )
    settings = options.calibration_settings(
        images=images, samples=samples, compression=compression, keep=keep, seed=seed
    )
    weights = options.dummy_weights(dummy, seed=dummy_seed, layers=dummy_layers)
    from btp_export.pipeline import Job, run_job

    job = Job(model, out or options.default_out(model), plan, settings, chosen, force, target, weights, system)
    result = run_job(job)
    total = round(time.perf_counter() - start, 3)  # with the imports
    result = result.model_copy(update={"seconds": {**result.seconds, "total": total}})
    emit(result, as_json=as_json, render=_render)


def _refuse_stray_options(context: typer.Context) -> None:
    """`btp-export --seed 3 verify B` would drop the seed in silence."""
    given = [name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]
    if given:
        flag = "--json" if given[0] == "as_json" else "--" + given[0].replace("_", "-")
        command_name = context.invoked_subcommand
        raise typer.BadParameter(f"it belongs after the command: {command_name} ... {flag}", param_hint=flag)


def _render(result: "JobResult") -> Any:
    from rich.console import Group

    from btp_export.commands import bench, build
    from btp_export.commands import eval as evaluation
    from btp_export.planning.plan_files import show

    graphs = result.verify.graphs
    worst = min((graph.cosine for graph in graphs if graph.cosine is not None), default=1.0)
    parts: list[Any] = [show(result)]
    parts += [evaluation.show(result.eval)] if result.eval else []
    parts += [bench.show(result.bench)] if result.bench else []
    if result.engines:
        parts.append(build.show_built(result.engines))
    lines = [
        *dummy_lines(result.dummy_weights),
        f"verified: {len(graphs)} graphs, cosine to transformers at least {worst:.9f}, same tokens out",
        f"bundle: {result.bundle}",
        f"report: {result.report}",
        f"{result.seconds['total']:.1f} s",
    ]
    parts.append("\n".join(lines))
    return Group(*parts)
