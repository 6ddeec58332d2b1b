"""Which size a picture is scaled to, by the rules of transformers' processors; sizes are height and width in pixels.

The rounding of every division is theirs, because it decides.
"""

import math
from collections.abc import Sequence

from graphs.records.errors import InputError

Size = tuple[int, int]
LONGEST = 200  # times the shorter side


def shortest_edge(picture: Size, pixels: int, longest: int | None = None) -> Size:
    """The shorter side becomes `pixels`, unless the longer one would then be above `longest`."""
    height, width = picture
    short, long = min(picture), max(picture)
    wanted: float = pixels
    if longest is not None and long / short * pixels > longest:
        wanted = longest * short / long
    new_short = round(wanted)
    if longest is not None and short == new_short:
        return picture
    # Without a bound the ratio is taken of the sides in order of length, with one in the order they are written.
    new_long = int(wanted * long / short)
    return (new_long, new_short) if width <= height else (new_short, new_long)


def best_size(picture: Size, sizes: Sequence[Size]) -> Size:
    """The size that keeps most of the picture's pixels, the one with the least empty room among equals."""
    height, width = picture
    best, kept, empty = sizes[0], 0, math.inf
    for rows, columns in sizes:
        scale = min(columns / width, rows / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        wasted = rows * columns - effective
        if effective > kept or (effective == kept and wasted < empty):
            best, kept, empty = (rows, columns), effective, wasted
    return best


def inside(picture: Size, frame: Size) -> Size:
    """The largest size of the picture's proportions that fits into the frame."""
    (height, width), (rows, columns) = picture, frame
    across, down = columns / width, rows / height
    if across < down:
        return min(math.ceil(height * across), rows), columns
    return rows, min(math.ceil(width * down), columns)


def in_pixel_range(picture: Size, multiple: int, least: int, most: int) -> Size:
    """Sides that are multiples of `multiple`, about the picture's proportions, with `least` to `most` pixels in all.

    Raises InputError for a picture more than 200 times as long as wide.
    """
    height, width = picture
    if max(picture) / min(picture) > LONGEST:
        raise InputError(
            f"a picture of {height} x {width} pixels",
            wanted=f"at most {LONGEST} times as long as wide, which is what the model takes",
            do="cut the picture",
        )
    rows, columns = (round(side / multiple) * multiple for side in picture)
    if rows * columns > most:
        shrink = math.sqrt(height * width / most)
        return (
            max(multiple, math.floor(height / shrink / multiple) * multiple),
            max(multiple, math.floor(width / shrink / multiple) * multiple),
        )
    if rows * columns < least:
        grow = math.sqrt(least / (height * width))
        return math.ceil(height * grow / multiple) * multiple, math.ceil(width * grow / multiple) * multiple
    return rows, columns
