"""`btp-export export`: a model and a plan become a bundle."""

from typing import TYPE_CHECKING

from btp_export.commands import _options as options
from btp_export.console import JsonOption, dummy_lines, emit, note, progress

if TYPE_CHECKING:
    from btp_export.results.plans import ExportResult


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
    image_size: options.ImageSizeOption = None,
    profile: options.ProfileOption = None,
    opset: options.OpsetOption = 23,
    precision: options.PrecisionOption = None,
    assemble: options.AssembleOption = "segments",
    link: options.LinkOption = "auto",
    system: options.SystemOption = None,
    force: options.ForceOption = False,
    dummy: options.DummyOption = False,
    dummy_layers: options.DummyLayersOption = None,
    dummy_seed: options.DummySeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Export a model with a pruning plan: the bundle of ONNX graphs, without verification and report."""
    from btp_export.exporting import check_target, export_bundle
    from btp_export.planning.choose_plan import choose_plan
    from btp_export.results.plans import ExportResult

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
    target = out or options.default_out(model)
    opened = options.open_chosen(model, options.dummy_weights(dummy, seed=dummy_seed, layers=dummy_layers), system)
    profiles = check_target(opened, target, chosen, force=force)
    with progress("planning") as bar:
        made = choose_plan(opened, plan, settings, profile=profiles[0], report=bar)
    with progress("exporting") as bar:
        bundle = export_bundle(opened, made, target, chosen, force=force, report=bar, note=note)
    result = ExportResult(
        bundle=target,
        plan=bundle.plan,
        average_tokens=bundle.plan.average_tokens,
        compression=bundle.plan.compression,
        profiles=tuple(profile.name for profile in profiles),
        graphs=tuple(record.name for record in bundle.graphs()),
        dummy_weights=opened.source.is_dummy,
    )
    emit(result, as_json=as_json, render=_render)


def _render(result: "ExportResult") -> str:
    saved = f"{result.compression:.1%} of the image tokens saved"
    dummy = "".join(f"{line}\n" for line in dummy_lines(result.dummy_weights))
    return f"{dummy}{result.bundle}: {len(result.graphs)} graphs, {saved}, mean over the layers"
