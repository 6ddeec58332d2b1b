"""What a calibration measured and chose, as tables for the console."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from btp_export.console import table

if TYPE_CHECKING:
    from btp_export.results.plans import Front, PlanSummary
    from graphs.records.plan import PruningPlan


def show_calibration(result: PlanSummary) -> Any:
    """The plan, what its layers showed, how far that depends on the pictures, and what the search found."""
    from rich.console import Group

    from btp_export.planning.plan_files import show

    record = result.plan.calibration
    parts: list[Any] = [show(result), _layers(result.plan), _spread(record)]
    parts += [_tuning(record["tuning"])] if "tuning" in record else []
    parts += ["\n".join(f"note: {text}" for text in record["notes"])] if record["notes"] else []
    return Group(*parts)


def show_front(result: Front) -> Any:
    """One row a budget."""
    from rich.console import Group

    rows = [
        [
            f"{row.compression:.3f}",
            f"{row.average_tokens:.1f}",
            f"{row.cost_share:.3f}",
            f"{row.divergence:.4f}",
            f"{row.agreement:.3f}",
            ",".join(map(str, row.layers)),
            ",".join(map(str, row.keep)),
        ]
        for row in result.rows
    ]
    columns = ["compression", "tokens", "cost", "KL", "same", "layers", "keep"]
    needless = [f"{row.compression:.3f}" for row in result.rows if row.dominated]
    lines = ["cost: prefill, share of the unpruned one; KL and same: next token compared with the full model's"]
    lines += [f"dominated, another plan costs no more and diverges no more: {', '.join(needless)}"] if needless else []
    return Group(table(columns, rows), "\n".join(lines))


def _layers(plan: PruningPlan) -> Any:
    """By layer: changed tokens with their spread, attention on the image, and what dropping it would do."""
    record = plan.calibration
    stages = {stage.layer: stage.keep for stage in plan.stages}
    spread, dropped = record["changed_tokens_spread"], record["drop_divergence_spread"]
    rows = []
    for layer, count in enumerate(record["changed_tokens"]):
        rows.append(
            [
                f"{layer}",
                f"{count:.1f}",
                *(f"{spread[size][layer]:.1f}" for size in ("16", "64", "256")),
                f"{record['attention_mass'][layer]:.2f}",
                f"{record['drop_divergence'][layer]:.3f}",
                f"{dropped['64'][layer]:.3f}",
                f"{stages[layer]}" if layer in stages else "",
            ]
        )
    columns = ["layer", "changed", "±16", "±64", "±256", "attention", "KL dropped", "±64", "keep"]
    title = f"mean over {record['samples']} samples; ± standard deviation over bootstrap sets of so many"
    return table(columns, rows, title=title, text=0)


def _spread(record: dict[str, Any]) -> str:
    lines = []
    for size, stages in record["stage_spread"].items():
        ranges = ", ".join(
            f"{low}" if low == high else f"{low} to {high}"
            for low, high in zip(stages["low"], stages["high"], strict=True)
        )
        lines.append(
            f"{size:>3} pictures: stages first placed at {ranges or 'no layer'} (the same in {stages['same']:.0%}); "
            f"same plan in {stages['chosen_again']:.0%}"
        )
    return "\n".join(lines)


def _tuning(record: dict[str, Any]) -> str:
    if "searched" not in record:
        return str(record["reason"])
    searched = f"searched {' and '.join(record['searched'])}: {record['plans']} plans in {record['passes']} passes"
    if "held_out" not in record["tuned"]:
        return f"{searched}; {record['reason']}, the default is kept"
    old, new = record["default"]["held_out"], record["tuned"]["held_out"]
    compared = (
        f"on {record['held_out']} unseen samples error {old['error']:.4f} -> {new['error']:.4f}, "
        f"KL {old['divergence']:.4f} -> {new['divergence']:.4f}"
    )
    return f"{searched}\n{compared}\n{'used' if record['taken'] else 'the default is kept'}: {record['reason']}"
