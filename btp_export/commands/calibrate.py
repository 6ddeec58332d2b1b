"""`btp-export calibrate`: measure a model on pictures and make its pruning plan."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import typer

from btp_export import bounds
from btp_export.commands import _complete as complete
from btp_export.commands import _options as options
from btp_export.commands._groups import Between
from btp_export.console import JsonOption, emit, note, progress
from graphs.records.errors import InputError

if TYPE_CHECKING:
    from btp_export.model.open_model import Model
    from btp_export.planning.calibration_settings import CalibrationSettings


@dataclass(frozen=True)
class BudgetOptions:
    """How much is pruned: one of compression, counts and latency share, or several compressions at once."""

    heading: ClassVar[str] = "Budget"
    compression: options.CompressionOption = None
    keep: options.KeepOption = None
    latency_share: Annotated[
        float | None,
        typer.Option(
            "--latency-share",
            metavar="X",
            help="Prefill cost as a share of the unpruned prefill's; not with --compression.",
        ),
    ] = None
    latency_from: Annotated[
        Path | None,
        typer.Option(
            "--latency-from",
            metavar="FILE",
            help="Take the cost from measured times, the output of bench --json.  [default: count FLOPs]",
        ),
    ] = None
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="NAME",
            help="Take the cost from this device's limits, and keep the tokens that cost it no time.",
            autocompletion=complete.targets,
        ),
    ] = None
    weights: Annotated[
        Literal["model", "int4"],
        typer.Option("--weights", help="With --target: what the device reads, the model's type or four bits."),
    ] = "model"
    pareto: Annotated[
        bool, typer.Option("--pareto", help="Make a plan for each of --budgets; --out is then a folder.")
    ] = False
    budgets: Annotated[str | None, typer.Option("--budgets", metavar="X,X,...", help="Compressions for --pareto.")] = (
        None
    )
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Search counts and balance; used only if better on unseen samples."),
    ] = False


@dataclass(frozen=True)
class MethodOptions:
    """The switches of the method."""

    heading: ClassVar[str] = "Method"
    importance: Annotated[
        options.Importance, typer.Option("--importance", help="The query whose attention ranks the tokens.")
    ] = "last-token"
    spatial_metric: Annotated[
        options.Metric, typer.Option("--spatial-metric", help="Distance that spaces the fixed spatial set.")
    ] = "euclidean"
    rebalance: Annotated[
        bool,
        typer.Option("--rebalance/--no-rebalance", help="Select more by attention than kept, early positions first."),
    ] = True
    spatial: Annotated[
        bool, typer.Option("--spatial/--no-spatial", help="Keep a fixed set of tokens spread over the picture.")
    ] = True
    stages: Annotated[
        str | None,
        typer.Option(
            "--stages", metavar="L,L,...", help="Layers of the stages; the last one drops all.  [default: measured]"
        ),
    ] = None
    balance: Annotated[
        str | None,
        typer.Option(
            "--balance",
            metavar="X,X,...",
            help="Attention's share in each stage that keeps tokens.  [default: measured]",
        ),
    ] = None
    answer_tokens: Annotated[
        int,
        typer.Option("--answer-tokens", metavar="N", help="Tokens of the model's own answer that plans are judged by."),
        Between(*bounds.ANSWER_TOKENS, 16),
    ] = 16
    kind_bound: Annotated[
        float | None,
        typer.Option(
            "--kind-bound",
            metavar="NATS",
            help="Refuse plans that change the answers on a kind of picture by more, KL a token.  [default: 1]",
        ),
    ] = None
    drop_bound: Annotated[
        float | None,
        typer.Option(
            "--drop-bound",
            metavar="NATS",
            help="Most that dropping all tokens may change the next token, KL.  [default: better of 0.02, 0.1]",
        ),
    ] = None
    tau: Annotated[
        float | None,
        typer.Option(
            "--tau", metavar="X", help="Cosine below which a token counts as changed.  [default: the model's]"
        ),
    ] = None


def command(
    model: options.ModelOption,
    images: options.ImagesOption = None,
    mix: options.MixOption = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Prompts for --images, one a line.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", metavar="N", help="Calibration samples.  [default: 64; with --tune 128]"),
        Between(*bounds.CALIBRATION_SAMPLES, 64),
    ] = None,
    seed: options.SeedOption = 0,
    budget: BudgetOptions = BudgetOptions(),
    method: MethodOptions = MethodOptions(),
    image_size: options.SizeOption = None,
    system: options.SystemOption = None,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Reuse statistics of the same model and pictures.")
    ] = True,
    device: options.DeviceOption = "auto",
    maths: options.MathsOption = "float32",
    ray: options.RayOption = None,
    dummy: options.DummyOptions = options.DummyOptions(),
    out: Annotated[
        Path | None, typer.Option("--out", metavar="PATH", help="Write the plan to this file (--pareto: a folder).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace plan files at --out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure on a few pictures where image tokens can be pruned, and make the balanced plan."""
    from btp_export.planning.calibration_settings import check_settings, parse_shares

    settings = replace(
        _settings(budget, method),
        images=images,
        mix=mix,
        prompts=prompts,
        cache=cache,
        seed=seed,
        device=device,
        maths=maths,
        ray=ray,
    )
    if samples is not None:
        settings = replace(settings, samples=samples)
    check_settings(settings)
    size = None if image_size is None else options.parse_image_size(image_size)
    opens = partial(options.open_chosen, model, dummy.chosen(), system)
    if budget.pareto:
        _check_front(settings)
        compressions = None if budget.budgets is None else parse_shares(budget.budgets, "--budgets", "0.6,0.78,0.9")
        _front(opens, settings, size, compressions, out, force=force, as_json=as_json)
    elif budget.budgets is not None:
        raise InputError("--budgets without --pareto", wanted="one budget", do="--compression X, or add --pareto")
    else:
        _single(opens, settings, size, out, force=force, as_json=as_json)


def _settings(budget: BudgetOptions, method: MethodOptions) -> "CalibrationSettings":
    """What the two groups set. Raises InputError for lists that are none."""
    from btp_export.planning.calibration_settings import (
        DEFAULT_SAMPLES,
        TUNED_SAMPLES,
        CalibrationSettings,
        parse_keep,
        parse_shares,
        parse_stages,
    )

    return CalibrationSettings(
        samples=TUNED_SAMPLES if budget.tune else DEFAULT_SAMPLES,
        compression=budget.compression,
        keep=None if budget.keep is None else parse_keep(budget.keep),
        latency_share=budget.latency_share,
        latency_from=budget.latency_from,
        target=budget.target,
        weights=budget.weights,
        answer_tokens=method.answer_tokens,
        kind_bound=method.kind_bound,
        stages=None if method.stages is None else parse_stages(method.stages),
        balance=None if method.balance is None else parse_shares(method.balance),
        importance=method.importance,
        spatial_metric=method.spatial_metric,
        rebalance=method.rebalance,
        spatial=method.spatial,
        drop_bound=method.drop_bound,
        tune=budget.tune,
        tau=method.tau,
    )


def _single(
    opens: Callable[[], "Model"],
    settings: "CalibrationSettings",
    size: tuple[int, int] | None,
    out: Path | None,
    *,
    force: bool,
    as_json: bool,
) -> None:
    from btp_export.model.defaults import default_profile
    from btp_export.planning.plan_files import check_out, write_plan_file
    from btp_export.planning.study import calibrate_model
    from btp_export.planning.study_tables import show_calibration
    from btp_export.results.plans import PlanSummary

    if out is not None:
        check_out(out, force=force)
    opened = opens()
    profile = default_profile(opened, size)
    with progress("calibrating") as bar:
        plan = calibrate_model(opened, settings, profile=profile, report=bar, note=note)
    if out is not None:
        write_plan_file(plan, out, force=force)
        note(f"plan written to {out}")
    emit(PlanSummary.of(plan, out), as_json=as_json, render=show_calibration)


def _front(
    opens: Callable[[], "Model"],
    settings: "CalibrationSettings",
    size: tuple[int, int] | None,
    budgets: tuple[float, ...] | None,
    out: Path | None,
    *,
    force: bool,
    as_json: bool,
) -> None:
    from btp_export.model.defaults import default_profile
    from btp_export.planning.plan_folder import check_folder, front_of, write_front
    from btp_export.planning.study import calibration_work, open_study
    from btp_export.planning.study_tables import show_front
    from btp_export.spreading import connected
    from calibrate.pareto import front, requests

    opened = opens()
    if out is not None:
        check_folder(out, force=force)
    with (
        progress("calibrating") as bar,
        calibration_work(opened, settings, note) as work,
        connected(settings.ray) as cluster,
    ):
        study, request = open_study(
            opened,
            settings,
            profile=default_profile(opened, size),
            check=lambda request, shape, cost: requests(request, shape, cost, budgets),
            work=work,
            cluster=cluster,
            report=bar,
            note=note,
        )
        points = front(study, request, budgets, progress=bar)
    if out is not None:
        write_front(points, out, force=force)
        note(f"{len(points)} plans written to {out}")
    emit(front_of(points, out), as_json=as_json, render=show_front)


def _check_front(settings: "CalibrationSettings") -> None:
    given = {
        "--compression": settings.compression is not None,
        "--keep": settings.keep is not None,
        "--latency-share": settings.latency_share is not None,
        "--tune": settings.tune,
    }
    for flag, there in given.items():
        if there:
            raise InputError(f"--pareto with {flag}", wanted="--budgets, one plan for each", do=f"leave {flag} out")
