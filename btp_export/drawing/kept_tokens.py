"""Pictures of what a plan keeps: one panel per stage, kept image tokens clear, dropped ones faded.

A token is one cell of the grid over the picture as the model sees it. Processors of the CLIP kind cut the middle out
of the picture, so `fit` does the same: the panels show what went into the model and nothing else.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from graphs.records.token_layout import Blocks, count_tokens

MARGIN, GAP = 14, 12  # pixels around and between the panels
WASH = (0.84, 236)  # dropped tokens: share of this grey, so that little of the picture is left
GREY = np.array([0.299, 0.587, 0.114])  # weights of Rec. 601 luma
GRID_LIGHT, OUTLINE = (205, 207, 210), (14, 120, 120)
PAPER, INK = (255, 255, 255), (40, 42, 46)
_SMALLEST_CELL_WITH_OUTLINE, _SMALLEST_CELL_WITH_GRID = 3, 5  # pixels; on smaller cells lines would hide the tokens

Pixels = npt.NDArray[np.uint8]


def draw_kept(
    image: Image.Image,
    grid: tuple[int, int],
    kept_per_stage: Sequence[Sequence[int]],
    *,
    layers: Sequence[int] | None = None,
    total: int | None = None,
    blocks: Blocks = (),
    width: int = 1280,
) -> Image.Image:
    """The picture, and beside it a panel for each stage with its caption: "stage 1 · layer 3 · 288 of 576 tokens".

    `grid` is (rows, columns); `kept_per_stage[j]` are indices into that grid; `layers` the stages' layers; `total` is V
    where the model has more image tokens than cells; `blocks` says how they lie (graphs/records/token_layout.py). The
    result is `width` pixels wide; panels wrap when they would become smaller than 180 pixels.
    Raises ValueError for a grid or indices that cannot be.
    """
    tokens = total or grid[0] * grid[1]
    captions = (
        ["the picture", f"{tokens} image tokens"],
        *(_caption(number, len(kept), tokens, layers) for number, kept in enumerate(kept_per_stage)),
    )
    columns = max(1, min(len(captions), (width - 2 * MARGIN + GAP) // (180 + GAP)))
    room = (width - 2 * MARGIN - (columns - 1) * GAP) // columns
    size = panel_size(grid, room)
    panels = [fit(image, grid).resize(size, _filter(image, size))]
    panels += [draw_stage(image, grid, kept, blocks=blocks, width=room) for kept in kept_per_stage]
    font = ImageFont.load_default(13)
    lines = 1 if max(font.getlength(" · ".join(caption)) for caption in captions) <= room else 2
    step = size[1] + 8 + 18 * lines + GAP
    rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (width, 2 * MARGIN + rows * step - GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        left, top = MARGIN + number % columns * (room + GAP), MARGIN + number // columns * step
        sheet.paste(panel, (left, top))
        text = " · ".join(caption) if lines == 1 else f"{' · '.join(caption[:-1])}\n{caption[-1]}"
        pen.multiline_text((left, top + size[1] + 7), text, fill=INK, font=font, spacing=4)
    return sheet


def draw_stage(
    image: Image.Image, grid: tuple[int, int], kept: Sequence[int], *, blocks: Blocks = (), width: int = 288
) -> Image.Image:
    """One panel, at most `width` pixels wide and made of equal whole-pixel cells.

    Inside kept cells the pixels are those of the resized picture. Dropped cells are grey and faded under a thin
    grid, and a line runs around every group of kept cells.
    """
    rows, columns = grid
    mask = kept_mask(grid, kept, blocks)
    size = panel_size(grid, width)
    cell = size[0] // columns
    clear = np.asarray(fit(image, grid).resize(size, _filter(image, size)))
    wide = mask.repeat(cell, axis=0).repeat(cell, axis=1)
    panel = np.where(wide[..., None], clear, _wash(clear))
    if cell >= _SMALLEST_CELL_WITH_GRID:
        lines = np.zeros((rows * cell, columns * cell), dtype=bool)
        lines[::cell], lines[:, ::cell] = True, True
        panel[lines & ~wide] = GRID_LIGHT
    if cell >= _SMALLEST_CELL_WITH_OUTLINE:
        panel[_outline(mask, cell)] = OUTLINE
    return Image.fromarray(panel.astype(np.uint8))


def kept_mask(grid: tuple[int, int], kept: Sequence[int], blocks: Blocks = ()) -> npt.NDArray[np.bool_]:
    """[rows, columns], true where a token is kept. Indices past the grid (tokens with no place) are left out.

    With blocks a cell counts as kept if a token of any block that looks at it is; newline tokens look at nothing.
    """
    rows, columns = grid
    if blocks:
        return _mask_of_blocks(grid, kept, blocks)
    if rows < 1 or columns < 1:
        raise ValueError(f"grid {rows} x {columns}; wanted at least one row and one column.")
    if min(kept, default=0) < 0:
        raise ValueError(f"kept index {min(kept)}; wanted indices from 0.")
    mask = np.zeros(rows * columns, dtype=bool)
    mask[[index for index in kept if index < rows * columns]] = True
    return mask.reshape(rows, columns)


def _mask_of_blocks(grid: tuple[int, int], kept: Sequence[int], blocks: Blocks) -> npt.NDArray[np.bool_]:
    rows, columns = grid
    tokens = np.zeros(count_tokens(blocks), dtype=bool)
    tokens[list(kept)] = True
    mask, start = np.zeros(grid, dtype=bool), 0
    for down, right in blocks:
        block = tokens[start : start + down * right].reshape(down, right)
        wide = columns if (down, right) == (rows, columns + 1) else right
        at = (2 * np.arange(rows) + 1) * down // (2 * rows), (2 * np.arange(columns) + 1) * wide // (2 * columns)
        mask |= block[np.ix_(*at)]
        start += down * right
    return mask


def panel_size(grid: tuple[int, int], width: int) -> tuple[int, int]:
    """(width, height) of a panel of equal cells that is at most `width` pixels wide, at least one pixel per cell."""
    rows, columns = grid
    cell = max(1, width // columns)
    return columns * cell, rows * cell


def fit(image: Image.Image, grid: tuple[int, int]) -> Image.Image:
    """The middle of the picture in the grid's proportions, as the processor cuts it out."""
    image = image.convert("RGB")
    rows, columns = grid
    scale = min(image.width / columns, image.height / rows)
    width, height = max(1, round(columns * scale)), max(1, round(rows * scale))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _filter(image: Image.Image, size: tuple[int, int]) -> Image.Resampling:
    """Small pictures are enlarged with their pixels visible, as the model gets them; others are reduced smoothly."""
    return Image.Resampling.NEAREST if min(image.size) * 2 <= min(size) else Image.Resampling.LANCZOS


def _wash(pixels: Pixels) -> Pixels:
    share, towards = WASH
    grey = (pixels @ GREY)[..., None]
    return np.broadcast_to(np.rint(grey * (1 - share) + towards * share), pixels.shape).astype(np.uint8)


def _outline(mask: npt.NDArray[np.bool_], cell: int) -> npt.NDArray[np.bool_]:
    """Pixels of dropped cells that touch a kept cell, one pixel thick."""
    wide = np.pad(mask.repeat(cell, axis=0).repeat(cell, axis=1), 1)
    near = wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]
    return np.asarray(near & ~wide[1:-1, 1:-1])


def _caption(number: int, kept: int, tokens: int, layers: Sequence[int] | None) -> list[str]:
    where = [f"layer {layers[number]}"] if layers else []
    return [f"stage {number + 1}", *where, f"{kept} of {tokens} tokens"]
