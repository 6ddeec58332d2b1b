"""Pages of results: what a program writes stands between two marks, what people write around them stays."""

from pathlib import Path
from typing import Final

MARKS: Final = ("<!-- table: begin -->", "<!-- table: end -->")  # a page has one pair


def put_between_marks(page: Path, text: str, *, title: str = "") -> None:
    """Replace what stands between the marks; a page that is not there begins with the title.

    Raises SystemExit for a page without marks: everything in it may have been written by hand.
    """
    whole = page.read_text(encoding="utf-8") if page.exists() else f"# {title}\n\n{MARKS[0]}\n{MARKS[1]}\n"
    before, begin, rest = whole.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (begin and end):
        raise SystemExit(f"{page} has no lines {MARKS[0]} and {MARKS[1]}: put them around what is to be replaced")
    page.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}", encoding="utf-8")
