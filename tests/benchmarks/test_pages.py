"""Pages of results keep what people wrote in them when a program writes its part again."""

from pathlib import Path

import pytest

from benchmarks import four_bits_cpu, installed, rtx_7b, streamed_calibration, table
from benchmarks.pages import MARKS, put_between_marks


def test_what_stands_around_the_marks_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    put_between_marks(page, "first\n", title="Found")
    assert page.read_text() == f"# Found\n\n{MARKS[0]}\nfirst\n{MARKS[1]}\n"
    page.write_text(f"# By hand\n\nBefore.\n{page.read_text().partition('Found')[2]}\nBehind, by hand.\n")
    put_between_marks(page, "second", title="Found")
    assert page.read_text() == f"# By hand\n\nBefore.\n\n\n{MARKS[0]}\nsecond\n{MARKS[1]}\n\nBehind, by hand.\n"


@pytest.mark.parametrize("text", ["", "all by hand", f"{MARKS[1]} {MARKS[0]}"])
def test_a_page_without_marks_is_left_alone(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(SystemExit, match=r"page\.md has no lines <!-- table: begin"):
        put_between_marks(page, "measured")
    assert page.read_text() == text


def test_the_pages_of_the_programs_have_marks() -> None:
    written = [four_bits_cpu.RESULTS, streamed_calibration.RESULTS, installed.RESULTS, table.PAGE, table.README]
    for page in (*written, *rtx_7b.PAGES.values()):
        assert [page.read_text(encoding="utf-8").count(mark) for mark in MARKS] == [1, 1], page.name


def test_a_run_in_four_bits_has_a_row_for_each_model() -> None:
    one = {"open": 6.0, "busy": 4.0, "vision": 1.0, "prefill": 2.0, "decode": 3.0, "load": 0.5}
    found = {name: {**one, "VmHWM": 2048, "RssAnon": 1024, "Pss": 1536} for name in ("pruned", "pruned, float16")}
    text = four_bits_cpu.report(found, 100.0, 32)
    assert "| pruned, float16 | 6 | 4.0 | 1 | 2 | 3 | 2.0 | 1.0 | 0.5 | 0.5 |" in text
    assert "| peak, GiB | private, GiB | mapped once, GiB |" in text, "fields are in MiB"
    columns, dashes = (line.count("|") for line in four_bits_cpu.rows(found)[:2])
    assert columns == dashes == 11
