"""`btp-export export`: a model and a plan become a bundle."""

import json
from typing import Any

from btp_export.commands import _options as options
from btp_export.console import JsonOption, emit, progress


def command(
    model: options.ModelOption,
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
    profile: options.ProfileOption = None,
    opset: options.OpsetOption = 23,
    precision: options.PrecisionOption = None,
    assemble: options.AssembleOption = "segments",
    link: options.LinkOption = "auto",
    force: options.ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Export a model with a pruning plan: the bundle of ONNX graphs, without verification and report."""
    from btp_export.export import check_target, export_bundle
    from btp_export.models import open_model
    from btp_export.planning import choose_plan

    chosen = options.export_options(
        batch=batch,
        text_tokens=text_tokens,
        max_new_tokens=max_new_tokens,
        profile=profile,
        opset=opset,
        precision=precision,
        assemble=assemble,
        link=link,
    )
    settings = options.calibration_settings(
        images=images, samples=samples, compression=compression, keep=keep, seed=seed
    )
    target = out or options.default_out(model)
    opened = open_model(model)
    check_target(opened, target, chosen, force=force)
    with progress("planning") as bar:
        made = choose_plan(opened, plan, settings, report=bar)
    with progress("exporting") as bar:
        bundle = export_bundle(opened, made, target, chosen, force=force, report=bar)
    result = {
        "bundle": target,
        "plan": json.loads(made.to_json()),
        "average_tokens": made.average_tokens,
        "compression": made.compression,
        "graphs": [record.name for record in bundle.graphs()],
    }
    emit(result, as_json=as_json, render=_render)


def _render(result: dict[str, Any]) -> str:
    saved = f"{result['compression']:.1%} of the image tokens saved"
    return f"{result['bundle']}: {len(result['graphs'])} graphs, {saved}, mean over the layers"
