"""Pictures to pixels in Pillow and numpy, bit for bit what transformers' processors for Pillow give.

Their versions for torchvision scale with other filters and differ by a few levels; no part of the toolkit uses them.
"""

from collections.abc import Iterator
from math import ceil
from typing import Any

import numpy as np
from PIL import Image

from btp_export.preprocess import sizes
from graphs.records.errors import InputError
from graphs.records.preprocess import ExactSize, Patches, PictureSteps, ShortestEdge, Tiles

Levels = np.ndarray[Any, np.dtype[np.uint8]]
Pixels = np.ndarray[Any, np.dtype[np.float32]]


def pixel_values(picture: Image.Image, steps: PictureSteps) -> Pixels:
    """What the vision graph takes of one RGB picture: [1,3,h,w]; [1,parts,3,h,w] with tiles; [n,values] with patches.

    Raises InputError for a picture that the model cannot take.
    """
    if steps.square is not None:
        picture = _square(picture, steps.square)
    parts = [picture] if steps.tiles is None else list(_tiles(picture, steps.tiles, _filter(steps)))
    arrays = [_scaled(_cropped(_resized(part, steps), steps.crop), steps) for part in parts]
    if steps.patches is not None:
        return _patches(arrays[0], steps.patches)
    return np.stack(arrays)[None] if steps.tiles is not None else arrays[0][None]


def _filter(steps: PictureSteps) -> Image.Resampling:
    return Image.Resampling[steps.filter.upper()]


def _square(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    side = max(picture.size)
    if min(picture.size) == side:
        return picture
    whole = Image.new("RGB", (side, side), colour)
    whole.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return whole


def _tiles(picture: Image.Image, tiles: Tiles, resample: Image.Resampling) -> Iterator[Image.Image]:
    """The whole picture, then the squares of the best size, row by row."""
    yield picture.resize(tiles.base[::-1], resample)
    size = (picture.height, picture.width)
    rows, columns = sizes.best_size(size, tiles.sizes)
    height, width = sizes.inside(size, (rows, columns))
    frame = Image.new("RGB", (columns, rows))
    frame.paste(picture.resize((width, height), resample), ((columns - width) // 2, (rows - height) // 2))
    for top in range(0, rows, tiles.tile):
        for left in range(0, columns, tiles.tile):
            yield frame.crop((left, top, min(left + tiles.tile, columns), min(top + tiles.tile, rows)))


def _resized(picture: Image.Image, steps: PictureSteps) -> Image.Image:
    rule, size = steps.resize, (picture.height, picture.width)
    if rule is None:
        return picture
    if isinstance(rule, ExactSize):
        wanted = rule.size
    elif isinstance(rule, ShortestEdge):
        wanted = sizes.shortest_edge(size, rule.pixels, rule.longest)
    else:
        wanted = sizes.in_pixel_range(size, rule.multiple, rule.least, rule.most)
    if min(wanted) < 1:
        raise InputError(
            f"a picture of {size[0]} x {size[1]} pixels becomes {wanted[0]} x {wanted[1]}",
            wanted="a picture whose sides differ less",
            do="crop it",
        )
    return picture.resize(wanted[::-1], _filter(steps))


def _cropped(picture: Image.Image, crop: tuple[int, int] | None) -> Levels:
    """The middle [h,w,3], with zeros where the picture is smaller."""
    levels = np.asarray(picture)
    for axis, wanted in enumerate(crop or ()):
        there = levels.shape[axis]
        missing = max(wanted - there, 0)
        before = ceil(missing / 2)
        padding = [(0, 0)] * 3
        padding[axis] = (before, missing - before)
        start = (there - wanted) // 2 + before
        levels = np.pad(levels, padding).take(range(start, start + wanted), axis)
    return levels


def _scaled(levels: Levels, steps: PictureSteps) -> Pixels:
    """[h,w,3] levels -> float32 [3,h,w]. Each of the 256 levels is computed once, in the roundings of transformers."""
    table = np.arange(256)
    values = table.astype(np.float32) if steps.rescale is None else (table * steps.rescale).astype(np.float32)
    scaled = np.empty((3, *levels.shape[:2]), np.float32)
    for channel in range(3):
        row = values
        if steps.mean is not None and steps.deviation is not None:
            row = (values - np.float32(steps.mean[channel])) / np.float32(steps.deviation[channel])
        np.take(row, levels[..., channel], out=scaled[channel])
    return scaled


def _patches(pixels: Pixels, patches: Patches) -> Pixels:
    """[3,h,w] -> [n, 3 x frames x side x side], neighbours that become one token after one another."""
    side, merge = patches.side, patches.merge
    rows, columns = (length // (side * merge) for length in pixels.shape[1:])
    cells = pixels.reshape(3, rows, merge, side, columns, merge, side).transpose(1, 4, 2, 5, 0, 3, 6)
    repeated = np.broadcast_to(cells[:, :, :, :, :, None], (*cells.shape[:5], patches.frames, side, side))
    return repeated.reshape(rows * columns * merge * merge, -1)
