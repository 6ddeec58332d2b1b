"""The accuracy tables of docs/results.md and the README's sentence are the recorded results, nothing else."""

import json

import pytest

from benchmarks import table


def test_the_pages_show_what_was_recorded() -> None:
    """`python -m benchmarks.table --render` writes both."""
    result = json.loads(table.RESULTS.read_text(encoding="utf-8"))
    assert table.render(result) in table.PAGE.read_text(encoding="utf-8")
    assert table.summary(result) in table.README.read_text(encoding="utf-8")
    kinds = [(one["kind"], one["compression"]) for one in result["tables"]]
    assert kinds == [*(("plans", budget) for budget in table.BUDGETS), ("ablations", table.BUDGETS[0])]


def test_baselines_cost_what_btp_costs() -> None:
    """Equal average tokens within 1 %, or half a token where that is more: counts are whole."""
    for one in json.loads(table.RESULTS.read_text(encoding="utf-8"))["tables"]:
        own = next(row["average_tokens"] for row in one["rows"] if row["plan"] == table.OWN)
        for row in one["rows"]:
            if row["plan"] != "none":
                assert row["average_tokens"] == pytest.approx(own, rel=0.01, abs=0.5), row["plan"]
