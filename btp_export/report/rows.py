"""The rows of the page's tables, and its main numbers, from the report's document."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from btp_export.report.numbers import count, counted, percent, size, time, tokens
from btp_export.results.evaluation import EvaluatedPlan
from btp_export.results.report import ReportDocument
from btp_export.results.timing import CacheBytes
from graphs.records.plan import Stage
from graphs.records.stored_weights import Activations

MOST_PLACEMENTS = 12  # rows of tried plans on the page; every other kind has its best one below
MAIN = 0.75  # share of the bundle's own tokens from which on a plan counts as one of its budget


@dataclass(frozen=True)
class Headline:
    """One of the main numbers, where it comes from, or the command that measures it."""

    name: str
    value: str | None
    source: str
    command: str = ""


def headlines(document: ReportDocument) -> list[Headline]:
    """The four main numbers: compression, accuracy kept, prefill speed-up, cache saved."""
    plan = document.plan
    compression = Headline(
        "fewer image tokens",
        percent(document.compression),
        f"the plan: {tokens(document.average_tokens)} of {plan.image_tokens}, mean over {plan.num_layers} layers",
    )
    return [compression, _accuracy_kept(document), _faster_prefill(document), _smaller_cache(document)]


def _accuracy_kept(document: ReportDocument) -> Headline:
    own = own_row(document)
    if own is None or document.evaluation is None:
        return Headline("of the accuracy kept", None, "not measured", "btp-export eval")
    source = f"eval: {percent(own.accuracy)} right, on {counted(document.evaluation.samples, 'question')}"
    return Headline("of the accuracy kept", percent(own.kept_accuracy), source)


def _faster_prefill(document: ReportDocument) -> Headline:
    if document.bench is None:
        return Headline("faster prefill", None, "not measured", "btp-export bench")
    times = document.bench.prefill
    return Headline(
        "faster prefill", f"{times.speedup:.2f}×", f"bench: {time(times.full_ms)} to {time(times.pruned_ms)}"
    )


def _smaller_cache(document: ReportDocument) -> Headline:
    cache = cache_bytes(document)
    if cache is None:
        return Headline("less key and value cache", None, "not measured", "btp-export bench")
    source = f"{'bench' if document.bench else 'the graphs’ shapes'}: {size(cache.full)} to {size(cache.pruned)}"
    return Headline("less key and value cache", percent(1 - cache.pruned / cache.full), source)


def cache_bytes(document: ReportDocument) -> CacheBytes | None:
    """Cache sizes as `bench` found them, else by arithmetic."""
    source = document.bench or document.costs
    return source.cache_bytes if source else None


def own_row(document: ReportDocument) -> EvaluatedPlan | None:
    """The evaluation's row of the bundle's own plan: by name, else the one that has the plan's average tokens."""
    rows = document.evaluation.rows if document.evaluation else ()
    same = [row for row in rows if abs(row.average_tokens - document.average_tokens) < 1e-6]
    named = [row for row in same if row.plan == document.plan_name]
    return (named or same)[0] if named or len(same) == 1 else None


def stage_rows(document: ReportDocument) -> list[dict[str, Any]]:
    """The plan's stages with their number, what they choose from, the attention on the image, and what they keep of it.

    `mass` is the attention on all image tokens in the layer before the stage, of the model without pruning; `held` the
    share of the stage's own attention that its kept tokens hold, mean over the evaluation's questions.
    """
    plan, own = document.plan, own_row(document)
    held = own.attention_kept if own and own.attention_kept else [None] * len(plan.stages)
    mass = (document.calibration or {}).get("attention_mass")
    return [
        {
            **dict(stage),
            "number": number + 1,
            "before": plan.tokens_before(number),
            "mass": mass[stage.layer - 1] if mass and 0 < stage.layer <= len(mass) else None,
            "held": held[number],
            "rule": _rule(stage) if stage.keep else "–",
        }
        for number, stage in enumerate(plan.stages)
    ]


def _rule(stage: Stage) -> str:
    """How diversity picks in a stage, and what it weighs."""
    if stage.diversity == "farthest":
        return "distance"
    return f"coverage x {stage.importance or 'scores'}" if stage.weights == "scores" else "coverage"


def kind_rows(document: ReportDocument) -> list[dict[str, Any]]:
    """What the plan loses on each kind of picture, the most changed first; none for a single kind.

    `divergence` is that of the calibration's pictures of the kind, `full` and `own` the accuracies of the evaluation's
    questions of the kind without pruning and with the plan; None for a kind that one of the two does not have.
    """
    moved = ((document.calibration or {}).get("answers") or {}).get("by_kind") or {}
    own, rows = own_row(document), document.evaluation.rows if document.evaluation else ()
    full = next((row.kinds for row in rows if row.compression == 0), {})
    right = own.kinds if own else {}
    names = dict.fromkeys([*sorted(moved, key=lambda name: -moved[name]), *right])
    if len(names) < 2:
        return []
    return [
        {"name": name, "divergence": moved.get(name), "full": full.get(name), "own": right.get(name)} for name in names
    ]


def shown_placements(rows: Sequence[dict[str, Any]], most: int = MOST_PLACEMENTS) -> list[dict[str, Any]]:
    """The first rows, and of the others the best of every kind that is not among them."""
    shown = list(rows[:most])
    for row in rows[most:]:
        if row.get("method") and row["method"] not in {other.get("method") for other in shown}:
            shown.append(row)
    return shown


def placement_rows(document: ReportDocument) -> list[dict[str, Any]]:
    """The calibration's placements: first those decided on the most pictures, the nearest first; `own` is the plan's.

    Divergences on different numbers of pictures do not compare: few pictures hold few of the hard ones.
    """
    record = document.calibration or {}
    rows = [
        {**placement, "own": number == record.get("chosen"), "samples": placement.get("samples")}
        for number, placement in enumerate(record.get("candidates") or ())
    ]
    return sorted(rows, key=lambda row: (-(row["samples"] or 0), row["divergence"] is None, row["divergence"] or 0.0))


def evaluation_rows(document: ReportDocument) -> list[dict[str, Any]]:
    """The evaluation's rows: the unpruned model on top, then the plans at the bundle's own budget (`main`), then those
    at smaller ones, best first in each group.
    """
    if document.evaluation is None:
        return []
    own = own_row(document)
    least = MAIN * document.average_tokens  # plans at one budget are within a few tokens of each other
    rows = [{**dict(row), "own": row is own, "main": row.average_tokens >= least} for row in document.evaluation.rows]
    return sorted(rows, key=lambda row: (row["compression"] > 0, not row["main"], -row["accuracy"], row["plan"]))


def latency_rows(document: ReportDocument) -> list[tuple[str, float | None, float | None]]:
    """What `bench` timed, part by part: (name, milliseconds without pruning, milliseconds with pruning)."""
    bench = document.bench
    if bench is None:
        return []
    rows: list[tuple[str, float | None, float | None]] = [
        ("Vision tower and projector", bench.vision_ms, bench.vision_ms),
        ("Decoder prefill, selection included", bench.prefill.full_ms, bench.prefill.pruned_ms),
    ]
    for number, value in enumerate(bench.select_ms):
        layer = document.plan.stages[number].layer
        rows.append((f"of it: selection of stage {number + 1} before layer {layer}", None, value))
    rows.append(("Decoding, for each token", bench.decode.full_ms_per_token, bench.decode.ms_per_token))
    return rows


def cost_rows(document: ReportDocument) -> list[tuple[str, str, str, float]]:
    """What pruning leaves: (name, without, with, share)."""
    full, mean = document.plan.image_tokens, document.average_tokens
    rows = [("Image tokens, mean over the layers", tokens(full), tokens(mean), mean / full)]
    if document.costs is not None:
        needed = document.costs.operations
        share = needed.pruned / needed.full
        rows.append(("Prefill operations of the decoder", count(needed.full), count(needed.pruned), share))
        share = needed.selection / needed.full
        rows.append(("Operations of the selection", "none", count(needed.selection), share))
    cache = cache_bytes(document)
    if cache is not None:
        share = cache.pruned / cache.full
        rows.append(("Key and value cache", size(cache.full), size(cache.pruned), share))
    return rows


def verdict(document: ReportDocument) -> dict[str, str]:
    """Whether verification passed, in words; `state` is passed, failed or unknown."""
    if document.verification is None:
        return {"state": "unknown", "text": "not verified"}
    if not document.verification.passed:
        return {"state": "failed", "text": "verification failed"}
    return {"state": "passed", "text": "verified against transformers"}


def _multiplied(activations: Activations | None) -> str:
    return "" if activations is None else f", four-bit weights multiplied with {activations} rows"


def places(document: ReportDocument) -> list[tuple[str, str]]:
    """What ran where: (step, what it ran in)."""
    runner = "the exported graphs in ONNX Runtime"
    rows = []
    if document.calibration is not None and "samples" in document.calibration:
        rows.append(("Calibration", "the unpruned model in PyTorch, one layer at a time"))
    if document.verification is not None:
        multiplied = _multiplied(document.verification.activations)
        rows.append(("Verification", f"{runner}{multiplied}, against transformers’ modelling code in PyTorch"))
    if document.evaluation is not None:
        rows.append(("Evaluation", f"{runner}{_multiplied(document.evaluation.activations)}"))
    if document.bench is not None:
        rows.append(("Benchmark", f"{runner}{_multiplied(document.bench.activations)}"))
    if document.pictures:
        rows.append(("Pictures", runner))
    return rows
