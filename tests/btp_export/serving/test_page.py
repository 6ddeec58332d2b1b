"""The page in a real browser: a picture and a question in, streamed text and the kept tokens out, at 400 pixels too."""

import io
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from btp_export.running.runtime import BundleModel
from btp_export.serving.page import page as page_and_policy
from tests.btp_export.serving.conftest import KEY
from tests.btp_export.serving.running import Server, data_uri

BROWSER = next(
    (result for name in ("chromium", "chromium-browser", "google-chrome") if (result := shutil.which(name))), None
)
QUESTION = "what color is the circle ?"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("there is no Chromium")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Page]:
    """A page of 400 pixels; what its console complains of fails the test."""
    context = browser.new_context(viewport={"width": 400, "height": 800})
    opened, said = context.new_page(), list[str]()
    opened.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: said.append(str(error)))
    yield opened
    context.close()
    assert [text for text in said if "status of 4" not in text] == []


def png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def test_ask(page: Page, serving: Server, alone: dict[str, BundleModel], wide: Image.Image) -> None:
    model = next(model for model in alone.values() if model.profile.image_size == (40, 72))
    [wanted] = model.generate(wide, QUESTION)
    page.goto(serving.addresses[0])
    expect(page.locator("#model")).to_contain_text("tiny · pictures for 48 × 48, 72 × 40 pixels")
    expect(page.locator("#ask")).to_be_disabled()
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": png(wide)})
    page.fill("#prompt", QUESTION)
    page.click("#ask")
    expect(page.locator("#numbers")).to_contain_text("12 tokens in")
    assert page.locator("#answer").text_content() == wanted.text
    captions = page.locator("figcaption")
    expect(captions).to_have_count(len(model.plan.stages))
    for number, stage in enumerate(model.plan.stages):
        expect(captions.nth(number)).to_have_text(
            f"stage {number + 1} · layer {stage.layer} · {stage.keep} of {model.plan.image_tokens}"
        )
    check_drawing(page, wanted.kept[0].tolist(), model)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400, "nothing is cut off at the side"
    for name in ("#drop", "#prompt", "#ask", "#stages"):
        box = page.locator(name).bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 400


def check_drawing(page: Page, kept: list[int], model: BundleModel) -> None:
    """Cells of dropped tokens are washed out in the first stage's panel, the others are as bright as the picture."""
    from btp_export.drawing.kept_tokens import kept_mask

    mask = kept_mask(model.plan.grid, kept, model.plan.blocks)
    middles = page.evaluate(
        """([rows, columns]) => {
            const canvas = document.querySelector("canvas"), pen = canvas.getContext("2d");
            const cell = canvas.width / columns;
            return Array.from({length: rows}, (_, row) => Array.from({length: columns}, (_, column) =>
                Math.min(...pen.getImageData((column + .5) * cell, (row + .5) * cell, 1, 1).data.slice(0, 3))));
        }""",
        list(mask.shape),
    )
    for row, values in enumerate(middles):
        for column, darkest in enumerate(values):
            assert darkest >= 200 or mask[row, column], "a dropped cell is washed out"
    drawn = [value for row, values in enumerate(middles) for column, value in enumerate(values) if mask[row, column]]
    assert len(drawn) == mask.sum() and min(drawn) < 150, "a kept cell is not"


def test_drop_and_refusals(page: Page, serving: Server, square: Image.Image) -> None:
    page.goto(serving.addresses[0])
    drop(page, data_uri(square), "image/png")
    page.fill("#prompt", "what is <image> ?")
    page.press("#prompt", "Enter")
    expect(page.get_by_role("alert")).to_contain_text("stands for a picture")
    expect(page.locator("#ask")).to_be_enabled()
    page.fill("#prompt", "<b>where</b> ?")
    page.press("#prompt", "Enter")
    expect(page.locator("#numbers")).to_contain_text("tokens in")
    expect(page.get_by_role("alert")).to_be_empty()
    drop(page, "data:text/plain,hello", "text/plain")
    expect(page.get_by_role("alert")).to_contain_text("not a picture")


def drop(page: Page, uri: str, kind: str) -> None:
    """Drop a file as a person does with the mouse."""
    page.evaluate(
        """([uri, kind]) => {
            const [head, text] = uri.split(","), data = head.endsWith("base64") ? atob(text) : text;
            const bytes = Uint8Array.from(data, one => one.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "a", {type: kind}));
            const target = document.getElementById("drop");
            for (const name of ["dragenter", "dragover", "drop"])
                target.dispatchEvent(new DragEvent(name, {dataTransfer: transfer, bubbles: true, cancelable: true}));
        }""",
        [uri, kind],
    )
    page.wait_for_timeout(200)


def test_the_key_is_asked_for(page: Page, serving: Server) -> None:
    page.goto(serving.addresses[1])
    expect(page.get_by_role("alert")).to_contain_text("no valid API key")
    page.fill("#key", KEY)
    page.press("#key", "Tab")
    expect(page.locator("#model")).to_contain_text("tiny")
    expect(page.get_by_role("alert")).to_be_empty()


def test_the_page_loads_nothing_from_elsewhere(serving: Server) -> None:
    reply = serving.get("/")
    assert reply.status == 200 and reply.text == page_and_policy()[0]
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert "unsafe" not in reply.headers["content-security-policy"]
    assert "://" not in reply.text and "@import" not in reply.text and " src=" not in reply.text
