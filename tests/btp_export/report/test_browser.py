"""The page in a headless Chromium: it loads without a word on the console and fits phones and desks, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from btp_export.report.data import ReportData
from btp_export.report.write import write_report

if TYPE_CHECKING:
    from tests.btp_export.report.conftest import Browser

OVERFLOWING = """
[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, svg')
  && e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5).map(e => e.outerHTML.slice(0, 80))
"""
TEXT_SIZES = """
[...document.querySelectorAll('svg text')].filter(e => e.getBoundingClientRect().width > 0)
  .map(e => parseFloat(getComputedStyle(e).fontSize) * e.ownerSVGElement.getScreenCTM().a)
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_the_page_loads_and_fits(browser: Browser, data: ReportData, tmp_path: Path, width: int, dark: bool) -> None:
    write_report(tmp_path, data)
    page = (tmp_path / "index.html").as_uri()
    browser.open(page, width=width, dark=dark)
    assert browser.errors() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [page]
    widths = browser.evaluate("[...document.images].map(i => i.complete ? i.naturalWidth : 0)")
    assert len(widths) == 8 and min(widths) > 0
    assert browser.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.evaluate(OVERFLOWING) == []
    red, green, blue = browser.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert (max(red, green, blue) < 60) if dark else (min(red, green, blue) > 230)
    sizes = browser.evaluate(TEXT_SIZES)
    assert sizes and min(sizes) >= 11, "texts in figures are readable"


def test_the_browser_would_tell(browser: Browser, tmp_path: Path) -> None:
    """What the test above looks for is seen when it is there."""
    page = tmp_path / "bad.html"
    page.write_text(
        '<img src="gone.png"><div style="width:2000px">wide</div><script>console.error("loud"); missing()</script>'
    )
    browser.open(page.as_uri(), width=400, dark=False)
    assert any("loud" in text for text in browser.errors()) and len(browser.errors()) >= 2
    assert any(url.endswith("gone.png") for url in browser.requests())
    assert not browser.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.evaluate("document.images[0].naturalWidth") == 0
