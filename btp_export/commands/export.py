"""`btp-export export`: a model and a plan become a bundle."""

from typing import TYPE_CHECKING

from btp_export.commands import _options as options
from btp_export.console import JsonOption, dummy_lines, emit, note, progress

if TYPE_CHECKING:
    from btp_export.results.plans import ExportResult


def command(
    model: options.ModelOption,
    out: options.OutOption = None,
    plan: options.PlanOptions = options.PlanOptions(),
    shapes: options.ExportOptions = options.ExportOptions(),
    weights: options.WeightsOption = "model",
    system: options.SystemOption = None,
    force: options.ForceOption = False,
    dummy: options.DummyOptions = options.DummyOptions(),
    as_json: JsonOption = False,
) -> None:
    """Export a model with a pruning plan: the bundle of ONNX graphs, without verification and report."""
    from btp_export.exporting import check_plan, check_target, export_bundle
    from btp_export.planning.choose_plan import check_pictures_are_used, choose_plan, files_read
    from btp_export.quantising import check_weights, quantise_model
    from btp_export.results.plans import ExportResult

    chosen, settings = shapes.options(), plan.settings()
    check_pictures_are_used(plan.plan, settings, weights)
    target = out or options.default_out(model)
    opened = options.open_chosen(model, dummy.chosen(weights), system, weights)
    reads = files_read(plan.plan, settings)
    profiles = check_target(opened, target, chosen, force=force, reads=reads)
    check_weights(opened, weights)
    with progress("planning") as bar:
        pruning = choose_plan(opened, plan.plan, settings, profile=profiles[0], report=bar)
    if weights != "model":
        with progress("quantising") as bar:
            first = check_plan(opened, pruning, profiles)[0]
            opened = quantise_model(opened, first, settings, weights, profile=profiles[0], report=bar, note=note)
    with progress("exporting") as bar:
        bundle = export_bundle(opened, pruning, target, chosen, force=force, profiles=profiles, report=bar, note=note)
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
