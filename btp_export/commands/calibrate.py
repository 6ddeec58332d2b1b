"""`btp-export calibrate`: measure a model on pictures and make its pruning plan."""

from pathlib import Path
from typing import Annotated

import typer

from btp_export.commands import _options as options
from btp_export.console import JsonOption, emit, note, progress


def command(
    model: options.ModelOption,
    images: options.ImagesOption = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Prompts for --images, one a line.")
    ] = None,
    samples: options.SamplesOption = 64,
    compression: options.CompressionOption = None,
    keep: options.KeepOption = None,
    tau: Annotated[
        float | None,
        typer.Option("--tau", metavar="X", help="Cosine below which a token has changed.  [default: the model's]"),
    ] = None,
    seed: options.SeedOption = 0,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Where to write the plan.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the plan file at --out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure on a few pictures where image tokens can be pruned, and make the balanced plan."""
    from btp_export.calibration import CalibrationSettings, calibrate_model, check_settings, parse_keep
    from btp_export.models import open_model
    from btp_export.plans import check_out, show, summary, write_plan_file

    settings = CalibrationSettings(
        images=images,
        prompts=prompts,
        samples=samples,
        compression=compression,
        keep=None if keep is None else parse_keep(keep),
        tau=tau,
        seed=seed,
    )
    check_settings(settings)
    if out is not None:
        check_out(out, force=force)
    opened = open_model(model)
    with progress("calibrating") as bar:
        plan = calibrate_model(opened, settings, report=bar, note=note)
    if out is not None:
        write_plan_file(plan, out, force=force)
        note(f"plan written to {out}")
    emit({**summary(plan), "out": out}, as_json=as_json, render=show)
