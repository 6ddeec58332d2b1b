"""The demo reads signs, loses that under the paper's plan, and keeps it under a calibrated one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from btp_export.measuring.evaluate import evaluate_plans
from btp_export.model.open_model import open_model
from btp_export.planning.plan_files import plan_for
from calibrate.data import scenes
from graphs.files.bundle import Bundle

SIGNS = 30


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out questions about signs as a file."""
    folder = tmp_path_factory.mktemp("signs")
    asked = [sample for sample in scenes.samples(6 * SIGNS, seed=9) if sample.kind == scenes.READING]
    lines = []
    for number, sample in enumerate(asked):
        sample.image.save(folder / f"{number}.png")
        fields = {"image": f"{number}.png", "prompt": sample.question, "answer": sample.answer, "kind": sample.kind}
        lines.append(json.dumps(fields))
    (folder / "signs.jsonl").write_text("\n".join(lines))
    return folder / "signs.jsonl"


def test_the_papers_plan_loses_reading_and_the_calibrated_one_does_not(first_example: Path, questions: Path) -> None:
    """With 22 % of the tokens, as many for every plan."""
    model, bundle = open_model("demo"), Bundle.open(first_example / "my-bundle")
    own = bundle.plan
    assert own.compression == pytest.approx(0.78, abs=0.001)
    paper = plan_for("btp-paper", model.spec, average_tokens=own.average_tokens)
    plans = [("none", own.without_stages()), ("btp", own), ("btp-paper", paper)]
    scored = evaluate_plans(bundle, plans, samples=SIGNS, data=questions, threads=1)
    read = {row.plan: row.accuracy for row in scored.evaluation.rows}
    assert read["none"] >= 0.9
    assert read["btp"] >= read["none"] - 0.1
    assert read["btp-paper"] <= read["none"] - 0.25
