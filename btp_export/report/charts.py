"""The page's figures, from the report's document."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from btp_export.drawing import figures
from btp_export.report.rows import evaluation_rows
from btp_export.results.report import ReportDocument
from btp_export.results.timing import Bench

USUAL_SAMPLES = 64  # of a calibration whose record does not say how many


def charts(document: ReportDocument) -> dict[str, Markup | None]:
    """The figures by name; None where the data is missing."""
    plan = document.plan
    layers = [stage.layer for stage in plan.stages]
    steps = ", ".join(f"{stage.keep} from layer {stage.layer}" for stage in plan.stages) or "no stage"
    drawn: dict[str, Markup | None] = {
        **dict.fromkeys(("changed", "dropped", "accuracy", "latency")),
        "tokens": figures.token_steps(
            document.tokens_per_layer.pruned,
            plan.image_tokens,
            layers,
            title=f"Image tokens that each layer sees: {plan.image_tokens} at first, {steps}.",
        ),
    }
    drawn |= _calibration_charts(document, layers)
    rows = evaluation_rows(document)
    if rows:
        title = f"Accuracy of {len(rows)} plans against their average image tokens; the table below has the numbers."
        drawn["accuracy"] = figures.accuracy_plot(points(rows), plan.image_tokens, title=title)
    if document.bench is not None:
        drawn["latency"] = _latency_chart(document.bench)
    return drawn


def points(rows: Sequence[Mapping[str, Any]]) -> list[figures.Point]:
    """The evaluation's rows for the plot of accuracy."""
    return [
        figures.Point(row["plan"], row["average_tokens"], row["accuracy"], row["interval"], row["own"]) for row in rows
    ]


def spread(document: ReportDocument) -> tuple[int | None, list[float] | None]:
    """(pictures, bootstrap standard deviation per layer) for the sample size nearest to the calibration's own."""
    record = document.calibration or {}
    by_size = record.get("changed_tokens_spread") or {}
    if not by_size:
        return None, None
    used = int(record.get("samples") or USUAL_SAMPLES)
    nearest = min(by_size, key=lambda size: (abs(int(size) - used), int(size)))
    return int(nearest), list(by_size[nearest])


def _calibration_charts(document: ReportDocument, layers: Sequence[int]) -> dict[str, Markup]:
    record, count = document.calibration or {}, document.plan.num_layers
    drawn: dict[str, Markup] = {}
    if len(record.get("changed_tokens") or ()) == count:
        drawn["changed"] = figures.layer_bars(
            record["changed_tokens"],
            layers,
            title="Changed image tokens per layer, with the layers before which the plan prunes.",
            unit="image tokens changed",
            ceiling=document.plan.image_tokens,
            spread=spread(document)[1],
        )
    if len(record.get("drop_divergence") or ()) == count:
        drawn["dropped"] = figures.layer_bars(
            record["drop_divergence"],
            layers,
            title="Change of the next-token distribution if every image token is dropped before a layer.",
            unit="nats",
        )
    return drawn


def _latency_chart(bench: Bench) -> Markup:
    vision = ("vision", "part-vision", bench.vision_ms)
    select = sum(bench.select_ms)
    decoder, full, pruned = "decoder prefill", bench.prefill.full_ms, max(0.0, bench.prefill.pruned_ms - select)
    bars = [
        figures.Bar("without pruning", (vision, (decoder, "part-prefill", full))),
        figures.Bar("with pruning", (vision, (decoder, "part-prefill", pruned), ("selection", "part-select", select))),
    ]
    totals = " and ".join(f"{figures.milliseconds(bar.total)} ms {bar.name}" for bar in bars)
    return figures.stacked_bars(bars, title=f"Time to the first token: {totals}.")
