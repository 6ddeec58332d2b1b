"""`btp-export report` on a real bundle: measured, written, and the page says what the JSON says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from btp_export.cli import main
from graphs.files.bundle import Bundle
from tests.plans import PLAN


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Bundle]) -> Bundle:
    """36 tokens in 6 x 6; the second stage chooses among the first one's, the last drops all."""
    return tiny_bundle(PLAN)


def test_report_measures_a_bundle_and_writes_what_it_prints(
    bundle: Bundle, pictures: list[Image.Image], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = []
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
        lines.append({"image": f"{number}.png", "prompt": "what colour is the star?", "answer": "red"})
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, lines)))
    manifest = (bundle.root / "manifest.json").read_bytes()
    code = main(["report", str(bundle.root), "--samples", "4", "--data", str(questions), "--threads", "1", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert code == 0 and printed["passed"]
    stored = json.loads((bundle.root / "report" / "report.json").read_text())
    assert stored == {key: value for key, value in printed.items() if key not in ("report", "passed")}
    html = (bundle.root / "report" / "index.html").read_text()
    for row in stored["evaluation"]["rows"]:
        assert f">{row['plan']}</th>" in html
    assert f"{stored['bench']['prefill']['speedup']:.2f}×" in html
    assert [len(stage) for stage in stored["pictures"][0]["kept"]] == [18, 7, 0]
    assert set(stored["pictures"][0]["kept"][1]) <= set(stored["pictures"][0]["kept"][0]), "kept sets are nested"
    assert stored["costs"]["cache_bytes"] == stored["bench"]["cache_bytes"], "arithmetic and buffers agree"
    assert (bundle.root / "manifest.json").read_bytes() == manifest
    Bundle.open(bundle.root, check="full")


def test_report_of_what_is_no_bundle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "no bundle at" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [["--samples", "0"], ["--data", "gone.jsonl"], ["--data", "long.jsonl"]])
def test_wrong_settings_are_refused_before_the_long_work(
    bundle: Bundle,
    wrong: list[str],
    pictures: list[Image.Image],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("btp_export.measuring.verify.verify_profiles", lambda *_, **__: pytest.fail("it was measured"))
    pictures[0].save("a.png")
    lines = [{"image": "a.png", "prompt": prompt, "answer": "red"} for prompt in ("red ?", "red " * 40)]
    Path("long.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["report", str(bundle.root), *wrong]) == 2
    said = capsys.readouterr().err
    assert wrong[-1] in said and ("line 2: the prompt has" in said) == (wrong[-1] == "long.jsonl")


def test_a_bundle_that_cannot_be_written_is_refused_before_the_long_work(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "bundle"
    shutil.copytree(bundle.root, copied, ignore=shutil.ignore_patterns("report"))
    (copied / "report").symlink_to("/proc")
    monkeypatch.setattr("btp_export.report.collect.collect", lambda *_: pytest.fail("it was measured"))
    assert main(["report", str(copied)]) == 2
    assert "cannot write in /proc" in capsys.readouterr().err


def test_a_bundle_that_does_not_verify_gets_its_report_and_exit_code_1(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from btp_export.report import collect

    copied = tmp_path / "bundle"
    shutil.copytree(bundle.root, copied)
    real: Callable[..., Any] = collect.collect

    def too_strict(*arguments: Any) -> Any:
        """The same bundle under gates that no arithmetic can pass."""
        from engines.verify import verification

        strict = verification.Gates(cosine=1.0, norm=0.0, agreement=1.0, logit_gap=0.0)
        monkeypatch.setitem(verification.GATES, "float32", strict)
        return real(*arguments)

    monkeypatch.setattr(collect, "collect", too_strict)
    assert main(["report", str(copied), "--threads", "1"]) == 1
    assert "verification failed" in (copied / "report" / "index.html").read_text()
