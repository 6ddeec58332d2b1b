"""`btp-export --model NAME` without a command: everything from calibration to the report."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from btp_export import __version__
from btp_export.commands import _complete as complete
from btp_export.commands import _options as options
from btp_export.console import JsonOption, dummy_lines, emit

if TYPE_CHECKING:
    from btp_export.results.job import JobResult

VersionOption = Annotated[bool, typer.Option("--version", help="Show the version and exit.")]
TargetOption = Annotated[
    str | None,
    typer.Option(
        "--target", metavar="NAME", help=f"Build engines too. {options.TARGET_HELP}", autocompletion=complete.targets
    ),
]


def command(
    context: typer.Context,
    model: options.MaybeModelOption = None,
    out: options.OutOption = None,
    plan: options.PlanOptions = options.PlanOptions(),
    shapes: options.ExportOptions = options.ExportOptions(),
    weights: options.WeightsOption = "model",
    target: TargetOption = None,
    system: options.SystemOption = None,
    force: options.ForceOption = False,
    dummy: options.DummyOptions = options.DummyOptions(),
    version: VersionOption = False,
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
    chosen, settings, made_up = shapes.options(), plan.settings(), dummy.chosen(weights)
    from btp_export.pipeline import Job, run_job

    job = Job(
        model, out or options.default_out(model), plan.plan, settings, chosen, force, target, made_up, system, weights
    )
    result = run_job(job)
    total = round(time.perf_counter() - start, 3)  # with the imports
    result = result.model_copy(update={"seconds": {**result.seconds, "total": total}})
    emit(result, as_json=as_json, render=_render)


def _refuse_stray_options(context: typer.Context) -> None:
    """`btp-export --seed 3 verify B` would drop the seed in silence; `--debug` may stand anywhere."""
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name != "debug" and str(context.get_parameter_source(parameter.name or "")).endswith("COMMANDLINE")
    ]
    if given:
        command_name = context.invoked_subcommand
        raise typer.BadParameter(f"it belongs after the command: {command_name} ... {given[0]}", param_hint=given[0])


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
