"""`btp-export calibrate`: measure a model on pictures and make its pruning plan."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from btp_export.commands import _options as options
from btp_export.console import JsonOption, emit, note, progress
from graphs.records.errors import InputError

if TYPE_CHECKING:
    from btp_export.model.open_model import DummyWeights
    from btp_export.planning.study import CalibrationSettings

METHOD, BUDGET = "The method's switches", "Budget"


def command(
    model: options.ModelOption,
    images: options.ImagesOption = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Prompts for --images, one a line.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", metavar="N", help="Calibration samples.  [default: 64; with --tune 128]")
    ] = None,
    compression: Annotated[
        float | None,
        typer.Option(
            "--compression",
            metavar="X",
            rich_help_panel=BUDGET,
            help="Share of image tokens to save, mean over layers.  [default: 0.78]",
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            "--keep", metavar="K,K,...", rich_help_panel=BUDGET, help="Tokens kept by each stage, e.g. 288,144,0."
        ),
    ] = None,
    latency_share: Annotated[
        float | None,
        typer.Option(
            "--latency-share",
            metavar="X",
            rich_help_panel=BUDGET,
            help="The prefill's cost as a share of the unpruned prefill's.",
        ),
    ] = None,
    latency_from: Annotated[
        Path | None,
        typer.Option(
            "--latency-from",
            metavar="FILE",
            rich_help_panel=BUDGET,
            help="Cost in measured time: what bench --json printed.  [default: arithmetic]",
        ),
    ] = None,
    pareto: Annotated[
        bool,
        typer.Option("--pareto", rich_help_panel=BUDGET, help="A plan for each of --budgets; --out is a folder."),
    ] = False,
    budgets: Annotated[
        str | None,
        typer.Option("--budgets", metavar="X,X,...", rich_help_panel=BUDGET, help="Compressions for --pareto."),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", rich_help_panel=BUDGET, help="Search counts and balance; taken if better on unseen samples."
        ),
    ] = False,
    importance: Annotated[
        Literal["last-token", "mean-text", "similar-text"],
        typer.Option("--importance", rich_help_panel=METHOD, help="Whose attention makes a token important."),
    ] = "last-token",
    spatial_metric: Annotated[
        Literal["euclidean", "manhattan"],
        typer.Option("--spatial-metric", rich_help_panel=METHOD, help="Distance that spreads the fixed spatial set."),
    ] = "euclidean",
    rebalance: Annotated[
        bool,
        typer.Option("--rebalance/--no-rebalance", rich_help_panel=METHOD, help="Over-select, early tokens first."),
    ] = True,
    spatial: Annotated[
        bool, typer.Option("--spatial/--no-spatial", rich_help_panel=METHOD, help="The fixed spatial set.")
    ] = True,
    stages: Annotated[
        str | None,
        typer.Option("--stages", metavar="L,L,...", rich_help_panel=METHOD, help="Stage layers; the last drops all."),
    ] = None,
    balance: Annotated[
        str | None,
        typer.Option(
            "--balance", metavar="X,X,...", rich_help_panel=METHOD, help="Attention's share in each keeping stage."
        ),
    ] = None,
    drop_bound: Annotated[
        float | None,
        typer.Option(
            "--drop-bound",
            metavar="NATS",
            rich_help_panel=METHOD,
            help="How far dropping all may move the next token.  [default: 0.02 and 0.1, the better]",
        ),
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(
            "--tau",
            metavar="X",
            rich_help_panel=METHOD,
            help="Cosine below which a token has changed.  [default: the model's]",
        ),
    ] = None,
    image_size: Annotated[
        str | None,
        typer.Option("--image-size", metavar="HxW", help="Picture size to calibrate at.  [default: the model's]"),
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Reuse what was measured on the same model and pictures.")
    ] = True,
    seed: options.SeedOption = 0,
    device: options.DeviceOption = "auto",
    maths: options.MathsOption = "float32",
    system: options.SystemOption = None,
    dummy: options.DummyOption = False,
    dummy_layers: options.DummyLayersOption = None,
    dummy_seed: options.DummySeedOption = 0,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="PATH", help="The plan's file; with --pareto a folder of plans.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace plan files at --out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure on a few pictures where image tokens can be pruned, and make the balanced plan."""
    from btp_export.planning.study import (
        DEFAULT_SAMPLES,
        TUNED_SAMPLES,
        CalibrationSettings,
        check_settings,
        parse_keep,
        parse_shares,
        parse_stages,
    )

    settings = CalibrationSettings(
        images=images,
        prompts=prompts,
        samples=(TUNED_SAMPLES if tune else DEFAULT_SAMPLES) if samples is None else samples,
        compression=compression,
        keep=None if keep is None else parse_keep(keep),
        latency_share=latency_share,
        latency_from=latency_from,
        stages=None if stages is None else parse_stages(stages),
        balance=None if balance is None else parse_shares(balance),
        importance=importance,
        spatial_metric=spatial_metric,
        rebalance=rebalance,
        spatial=spatial,
        drop_bound=drop_bound,
        tune=tune,
        tau=tau,
        cache=cache,
        seed=seed,
    )
    check_settings(settings)
    size = None if image_size is None else options.parse_image_size(image_size)
    weights = options.dummy_weights(dummy, seed=dummy_seed, layers=dummy_layers)
    if pareto:
        _check_front(settings)
        asked = None if budgets is None else parse_shares(budgets, "--budgets", "0.6,0.78,0.9")
        _front(model, weights, system, settings, size, asked, out, force=force, as_json=as_json)
    elif budgets is not None:
        raise InputError("--budgets without --pareto", wanted="one budget", do="--compression X, or add --pareto")
    else:
        _one(model, weights, system, settings, size, out, force=force, as_json=as_json)


def _one(
    model: str,
    weights: "DummyWeights | None",
    system: str | None,
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
    opened = options.open_chosen(model, weights, system)
    profile = default_profile(opened, size)
    with progress("calibrating") as bar:
        plan = calibrate_model(opened, settings, profile=profile, report=bar, note=note)
    if out is not None:
        write_plan_file(plan, out, force=force)
        note(f"plan written to {out}")
    emit(PlanSummary.of(plan, out), as_json=as_json, render=show_calibration)


def _front(
    model: str,
    weights: "DummyWeights | None",
    system: str | None,
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
    from calibrate.pareto import front, requests

    opened = options.open_chosen(model, weights, system)
    if out is not None:
        check_folder(out, force=force)
    with progress("calibrating") as bar, calibration_work(opened, settings, note) as work:
        study, request = open_study(
            opened,
            settings,
            profile=default_profile(opened, size),
            check=lambda request, shape, cost: requests(request, shape, cost, budgets),
            work=work,
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
