"""Pictures inside the page: as the model sees them, and the tokens left after each stage."""

import base64
import io
from dataclasses import dataclass

from PIL import Image

from btp_export.drawing.kept_tokens import draw_stage, fit, panel_size
from btp_export.report.data import Picture
from graphs.records.plan import PruningPlan

PANEL = 288  # pixels; twice the width at which a phone shows a panel
PNG_LIMIT = 150_000  # bytes; photographs get larger than that as PNG and are embedded as JPEG


@dataclass(frozen=True)
class Panel:
    """One drawing and its caption."""

    src: str
    alt: str
    caption: tuple[str, ...]


@dataclass(frozen=True)
class PictureView:
    """A picture with its panels, all of one width and height in pixels.

    `wrong`: another answer was expected; `changed`: the model without pruning gives another one.
    """

    picture: Picture
    wrong: bool
    changed: bool
    panels: tuple[Panel, ...]
    width: int
    height: int


def picture_view(plan: PruningPlan, picture: Picture) -> PictureView:
    """The picture and one panel for each stage that keeps tokens."""
    original = fit(picture.image, picture.grid)
    width, height = panel_size(picture.grid, PANEL)
    sampling = Image.Resampling.NEAREST if original.width * 2 <= width else Image.Resampling.LANCZOS
    clear = data_uri(original.resize((width, height), sampling))
    seen = ("the picture", f"{plan.image_tokens} image tokens")
    panels = [Panel(clear, "The picture as the model sees it.", seen)]
    # Where a stage keeps nothing the text beside the pictures says so.
    panels += [_panel(plan, picture, number) for number, kept in enumerate(picture.kept) if kept]
    wrong, changed = _differs(picture.answer, picture.expected), _differs(picture.answer, picture.full_answer)
    return PictureView(picture, wrong, changed, tuple(panels), width, height)


def _differs(answer: str, other: str | None) -> bool:
    return other is not None and answer.strip().casefold() != other.strip().casefold()


def _panel(plan: PruningPlan, picture: Picture, stage: int) -> Panel:
    kept = picture.kept[stage]
    src = data_uri(draw_stage(picture.image, picture.grid, kept, blocks=picture.blocks, width=PANEL))
    alt = f"The {len(kept)} image tokens that stage {stage + 1} keeps; the others are faded."
    name = f"stage {stage + 1} · layer {plan.stages[stage].layer}"
    return Panel(src, alt, (name, f"{len(kept)} of {plan.image_tokens} tokens"))


def data_uri(image: Image.Image) -> str:
    """The picture inside the page: PNG, or JPEG where PNG gets large."""
    for kind, options in (("png", {}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        if buffer.tell() <= PNG_LIMIT or kind == "jpeg":
            return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    raise AssertionError("the last format is always taken")
