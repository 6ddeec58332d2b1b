"""Progress reports: what they pass on, and that there is one type of each."""

import re
from pathlib import Path

from graphs.records.progress import labelled, part_of

ROOT = Path(__file__).parents[3]
PACKAGES = ("graphs", "engines", "calibrate", "btp_export")


def test_reports_are_passed_on() -> None:
    said: list[tuple[int, int, str]] = []

    def report(done: int, total: int, text: str = "") -> None:
        said.append((done, total, text))

    second = part_of(labelled(report, "layers"), 1, 4)
    assert second is not None
    second(1, 2, "dropped")
    assert said == [(1500, 4000, "layers")]
    assert labelled(None, "layers") is None and part_of(None, 0, 2) is None


def test_progress_and_notes_are_declared_once() -> None:
    """Nowhere else is there a callable of (done, total) or of one sentence under a name of its own."""
    declared = re.compile(r"Callable\[\[int, int(, str)?\], None\]|Callable\[\[str\], None\]|class Report\(")
    homes = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if declared.search(path.read_text(encoding="utf-8"))
    }
    assert homes == {"graphs/records/progress.py"}
