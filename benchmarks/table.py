"""The accuracy tables of docs/results.md: every plan at three budgets, and ablations, on held-out scenes of the demo.

    make table                                    # or: python -m benchmarks.table [--samples 1200] [--seed 1]

Exports the demo with the calibrated plan, answers the same questions under every plan through the exported graphs,
writes benchmarks/results/table.json, and from it the tables in docs/results.md and a sentence in README.md. `--render`
writes the pages only.
"""

import argparse
import contextlib
import json
import platform
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.pages import put_between_marks

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "table.json"
PAGE, README = ROOT / "docs" / "results.md", ROOT / "README.md"
BUDGETS = (0.78, 0.89, 0.945)
OWN = "btp"
LEVEL = 0.05  # of the paired test
READING = "reading"


def measure(samples: int, seed: int, threads: int | None) -> dict[str, Any]:
    """All rows, each with its comparison to btp at the same budget."""
    from btp_export import console
    from btp_export.exporting import Options, export_bundle
    from btp_export.measuring.evaluate import evaluate_plans
    from btp_export.model.open_model import open_model
    from btp_export.planning.calibration_settings import CalibrationSettings
    from btp_export.planning.study import calibrate_model
    from calibrate.place.ablations import ablations

    model = open_model("demo")
    own = {budget: calibrate_model(model, CalibrationSettings(compression=budget)) for budget in BUDGETS}
    plan = own[BUDGETS[0]]
    groups = [("plans", budget, _plans(model.spec, own[budget])) for budget in BUDGETS]
    variants = ablations(plan)[1:]  # the first is the plan itself
    groups.append(("ablations", BUDGETS[0], [(OWN, plan), *((variant.name, variant.plan) for variant in variants)]))
    named = [entry for _, _, entries in groups for entry in entries]
    with tempfile.TemporaryDirectory() as folder, console.progress("table") as report:
        bundle = export_bundle(model, plan, Path(folder) / "bundle", Options())
        scored = evaluate_plans(bundle, named, samples=samples, seed=seed, threads=threads, report=report)
    rows = iter(zip([row.model_dump(mode="json") for row in scored.evaluation.rows], scored.hits, strict=True))
    tables = [_compared(kind, budget, [next(rows) for _ in entries]) for kind, budget, entries in groups]
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "samples": scored.evaluation.samples,
        "seed": seed,
        "source": scored.evaluation.source,
        "calibration": plan.calibration.get("sha256") or plan.calibration.get("source"),
        "changes": {variant.name: variant.summary for variant in variants},
        "tables": tables,
    }


def _plans(spec: Any, own: Any) -> list[tuple[str, Any]]:
    """btp and every baseline at its average tokens."""
    from btp_export.measuring.evaluate import DEFAULT_PLANS
    from btp_export.planning.plan_files import plan_for
    from graphs.records.errors import InputError

    named = [("none", own.without_stages()), (OWN, own)]
    for name in (*DEFAULT_PLANS[2:], "btp-paper-corrected"):
        with contextlib.suppress(InputError):  # a method whose first layer sees the whole picture has a least budget
            named.append((name, plan_for(name, spec, average_tokens=own.average_tokens)))
    return named


def _compared(kind: str, budget: float, rows: list[tuple[dict[str, Any], list[bool]]]) -> dict[str, Any]:
    from calibrate.measure.accuracy import paired

    (own,) = [hits for row, hits in rows if row["plan"] == OWN]
    listed = []
    for row, hits in rows:
        against = paired(own, hits)
        listed.append({**row, "btp_better_by": against.difference, "p_value": against.p_value})
    return {"kind": kind, "compression": budget, "rows": listed}


def render(result: dict[str, Any]) -> str:
    """The tables, Markdown."""
    plans = [table for table in result["tables"] if table["kind"] == "plans"]
    (switches,) = [table for table in result["tables"] if table["kind"] == "ablations"]
    parts = [
        f"{result['samples']:,} held-out questions (seed {result['seed']}), exact match through the exported graphs, "
        f"{result['date']}. *Kept*: accuracy divided by the accuracy without pruning. *Difference to btp*: percentage "
        f"points above or below btp, with the p value of a paired test (McNemar's exact test, two-sided)."
    ]
    for table in plans:
        parts += [f"With {_share(table)} of the tokens:", _table(table["rows"], "plan"), "By kind of question:"]
        parts.append(_by_kind(table["rows"]))
    parts += [_verdict(table) for table in plans]
    parts += [_signs_read(table) for table in plans if READING in table["rows"][0]["kinds"]]
    parts.append(
        f"One setting of btp changed at a time, with {_share(switches)} of the tokens:\n\n"
        f"{_table(_named(switches['rows'], result['changes']), 'change')}"
    )
    return "\n\n".join(parts)


def _share(table: dict[str, Any]) -> str:
    """Of the tokens, in per cent."""
    return f"{100 * (1 - table['compression']):.3g} %"


def _named(rows: Sequence[dict[str, Any]], changes: dict[str, str]) -> list[dict[str, Any]]:
    return [row | {"plan": changes.get(row["plan"], row["plan"])} for row in rows]


def _table(rows: Sequence[dict[str, Any]], first: str) -> str:
    lines = [
        f"| {first} | tokens | accuracy (95 % interval) | kept | FLOPs | difference to btp |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["interval"]
        lines.append(
            f"| {row['plan']} | {row['average_tokens']:.1f} | {row['accuracy']:.3f} ({low:.3f} to {high:.3f}) "
            f"| {_percent(row['kept_accuracy'], 1)} | {row['flops_ratio']:.3f} | {_against(row)} |"
        )
    return "\n".join(lines)


def _by_kind(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy by kind, the kinds as they take turns."""
    kinds = list(rows[0]["kinds"])
    lines = [f"| plan | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for row in rows:
        shares = [f"{row['kinds'][kind]:.3f}" for kind in kinds]
        lines.append(f"| {' | '.join([row['plan'], *shares])} |")
    return "\n".join(lines)


def _against(row: dict[str, Any]) -> str:
    if row["plan"] == OWN:
        return ""
    chance = "p < 0.001" if row["p_value"] < 0.001 else f"p = {row['p_value']:.3f}"
    return f"{-row['btp_better_by'] * 100:+.1f}, {chance}"


def _verdict(table: dict[str, Any]) -> str:
    """Which baselines btp is better than, in a sentence."""
    others = [row for row in table["rows"] if row["plan"] not in (OWN, "none")]
    better = [row["plan"] for row in others if row["p_value"] < LEVEL and row["btp_better_by"] > 0]
    worse = [row["plan"] for row in others if row["p_value"] < LEVEL and row["btp_better_by"] < 0]
    open_ = [row["plan"] for row in others if row["p_value"] >= LEVEL]
    parts = [f"better than {_list(better)}" if better else "better than none of them"]
    parts += [f"worse than {_list(worse)}"] if worse else []
    parts += [f"not significantly different from {_list(open_)}"] if open_ else []
    share = _share(table)
    return f"With {share} of the tokens btp is {', '.join(parts)} (significance level {_percent(LEVEL)})."


def _signs_read(table: dict[str, Any]) -> str:
    """How much of the reading is left: what dropping every token before the last layers costs most."""
    read = {row["plan"]: _percent(row["kinds"][READING], 1) for row in table["rows"]}
    named = [f"{name} reads {read[name]}" for name in (OWN, "btp-paper", "btp-paper-corrected") if name in read]
    return f"Signs: without pruning the demo reads {read['none']}; with {_share(table)} of the tokens {_list(named)}."


def _percent(share: float, digits: int = 0) -> str:
    return f"{share * 100:.{digits}f} %"


def _list(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def summary(result: dict[str, Any]) -> str:
    """What the README says of accuracy: what btp keeps at each budget."""
    owns = [
        (table["compression"], next(row for row in table["rows"] if row["plan"] == OWN))
        for table in result["tables"]
        if table["kind"] == "plans"
    ]
    kept = [f"{_percent(row['kept_accuracy'], 1)} with {100 * (1 - budget):.3g} % of them" for budget, row in owns]
    first = next(table for table in result["tables"] if table["kind"] == "plans")
    return (
        f"Accuracy that the demo model keeps when its image tokens are pruned: {_list(kept)} "
        f"({result['samples']:,} held-out questions, {result['date']}; [all plans](docs/results.md))."
        + (f" {_signs_read(first)}" if READING in first["rows"][0]["kinds"] else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--render", action="store_true", help="only write the pages from the recorded results")
    given = parser.parse_args()
    if not given.render:
        result = measure(given.samples, given.seed, given.threads)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    recorded = json.loads(RESULTS.read_text(encoding="utf-8"))
    put_between_marks(PAGE, render(recorded))
    put_between_marks(README, summary(recorded))
    print(render(recorded))


if __name__ == "__main__":
    main()
