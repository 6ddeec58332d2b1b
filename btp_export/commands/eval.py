"""`btp-export eval`: accuracy of plans through the exported graphs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from btp_export import bounds
from btp_export.commands import _complete as complete
from btp_export.commands import _options as options
from btp_export.commands._groups import Between
from btp_export.console import JsonOption, emit, note, progress

if TYPE_CHECKING:
    from btp_export.results.evaluation import Evaluation


def command(
    bundle: options.BundleArgument,
    plans: Annotated[
        str | None,
        typer.Option(
            "--plans",
            metavar="P,P,...",
            help="Presets, plan files, or btp for the bundle's own.  [default: all]",
            autocompletion=complete.plan_lists,
        ),
    ] = None,
    compression: Annotated[
        str | None,
        typer.Option("--compression", metavar="X,X,...", help="Budgets for all plans.  [default: the bundle's own]"),
    ] = None,
    samples: Annotated[
        int,
        typer.Option("--samples", metavar="N", help="How many held-out questions."),
        Between(*bounds.QUESTIONS, 200),
    ] = 200,
    seed: options.SeedOption = 0,
    data: options.DataOption = None,
    full_weights: Annotated[
        Path | None,
        typer.Option(
            "--full-weights",
            metavar="BUNDLE",
            help="Of a four-bit bundle: the same export without --weights, to tell what four bits cost.",
        ),
    ] = None,
    threads: options.ThreadsOption = None,
    activations: options.ActivationsOption = "int8",
    ray: options.RayOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the accuracy of several plans at equal average tokens."""
    from btp_export.measuring.evaluate import DEFAULT_PLANS, evaluate_bundle, parse_budgets
    from graphs.files.bundle import Bundle

    names = DEFAULT_PLANS if plans is None else [name.strip() for name in plans.split(",")]
    with progress("evaluating") as bar:
        result = evaluate_bundle(
            Bundle.open(bundle),
            plans=names,
            compression=None if compression is None else parse_budgets(compression),
            samples=samples,
            seed=seed,
            data=data,
            full_weights=None if full_weights is None else Bundle.open(full_weights),
            threads=threads,
            activations=activations,
            ray=ray,
            report=bar,
            note=note,
        )
    emit(result, as_json=as_json, render=show)


def show(result: "Evaluation") -> Any:
    """The document of `eval` for the console."""
    from rich.console import Group

    from btp_export.console import table

    rows = [
        [
            row.plan,
            f"{row.average_tokens:.1f}",
            f"{row.compression:.3f}",
            f"{row.accuracy:.3f}",
            "{:.3f}–{:.3f}".format(*row.interval),
            "" if row.kept_accuracy is None else f"{row.kept_accuracy:.1%}",
            f"{row.flops_ratio:.3f}",
        ]
        for row in result.rows
    ]
    title = f"{result.samples} samples, {result.source}"
    shown = table(["plan", "tokens", "saved", "accuracy", "95 % interval", "kept", "FLOPs"], rows, title=title)
    cost = result.weights_cost
    if cost is None:
        return shown
    costs = [
        ["the model's own", f"{cost.full:.3f}", f"{cost.pruned:.3f}"],
        [f"four bits ({cost.weights})", f"{cost.four_bits:.3f}", f"{cost.both:.3f}"],
    ]
    title = "what pruning costs, what four bits cost"
    return Group(shown, table(["weights", "not pruned", "the bundle's plan"], costs, title=title))
