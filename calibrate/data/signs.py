"""A sign in a picture: a board with two or three characters, drawn from bitmaps of our own.

A sign takes two cells of the grid side by side. Its letters are those that no digit and no other letter of a 5 x 7
bitmap resembles (o is 0, i is 1, s is 5), and "a" is left out because it is a word of the questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CHARACTERS: tuple[str, ...] = tuple("0123456789cefhjklnprtuxy")
LENGTHS = (2, 3)
QUESTION = "what is written on the sign?"

_GLYPHS: dict[str, str] = {
    "0": ".###. #...# #...# #...# #...# #...# .###.",
    "1": "..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.",
    "2": ".###. #...# ....# ...#. ..#.. .#... #####",
    "3": "####. ....# ....# .###. ....# ....# ####.",
    "4": "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "5": "##### #.... ####. ....# ....# #...# .###.",
    "6": "..##. .#... #.... ####. #...# #...# .###.",
    "7": "##### ....# ...#. ..#.. ..#.. ..#.. ..#..",
    "8": ".###. #...# #...# .###. #...# #...# .###.",
    "9": ".###. #...# #...# .#### ....# ...#. .##..",
    "c": ".###. #...# #.... #.... #.... #...# .###.",
    "e": "##### #.... #.... ####. #.... #.... #####",
    "f": "##### #.... #.... ####. #.... #.... #....",
    "h": "#...# #...# #...# ##### #...# #...# #...#",
    "j": "..### ...#. ...#. ...#. ...#. #..#. .##..",
    "k": "#...# #..#. #.#.. ##... #.#.. #..#. #...#",
    "l": "#.... #.... #.... #.... #.... #.... #####",
    "n": "#...# ##..# ##..# #.#.# #..## #..## #...#",
    "p": "####. #...# #...# ####. #.... #.... #....",
    "r": "####. #...# #...# ####. #.#.. #..#. #...#",
    "t": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "u": "#...# #...# #...# #...# #...# #...# .###.",
    "x": "#...# #...# .#.#. ..#.. .#.#. #...# #...#",
    "y": "#...# #...# .#.#. ..#.. ..#.. ..#.. ..#..",
}
_BITMAPS = {
    name: np.array([[dot == "#" for dot in row] for row in rows.split()], np.float64) for name, rows in _GLYPHS.items()
}
_PALE, _DARK = (226.0, 224.0, 216.0), (26.0, 30.0, 40.0)
_MARGIN = 3.0  # pixels of board around the characters
_SAMPLES = 4  # points a pixel is looked at in each direction: soft edges


@dataclass(frozen=True)
class Sign:
    """A board over the cells (`row`, `column`) and (`row`, `column` + 1).

    `x` and `y` are its centre, `width` and `height` those of one character, `pitch` the distance between two of them,
    all in pixels; `dark` is a dark board with pale characters.
    """

    text: str
    row: int
    column: int
    x: float
    y: float
    width: float
    height: float
    pitch: float
    dark: bool

    @property
    def cells(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The two cells that it takes."""
        return (self.row, self.column), (self.row, self.column + 1)

    @property
    def answer(self) -> str:
        """Its characters as the words of an answer."""
        return " ".join(self.text)

    @property
    def board(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the board in pixels."""
        half_width = (self.pitch * (len(self.text) - 1) + self.width) / 2 + _MARGIN
        half_height = self.height / 2 + _MARGIN
        return self.x - half_width, self.y - half_height, self.x + half_width, self.y + half_height

    def box(self, place: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the character at `place`, in pixels."""
        middle = self.x + self.pitch * (place - (len(self.text) - 1) / 2)
        half_width, half_height = self.width / 2, self.height / 2
        return middle - half_width, self.y - half_height, middle + half_width, self.y + half_height


def draw_sign(rng: np.random.Generator, cells: Sequence[tuple[int, int]], cell: int) -> Sign:
    """A sign somewhere in `cells` of `cell` pixels; every text of two or three characters is as likely as any other.

    Raises ValueError if no two cells lie side by side.
    """
    pairs = [(row, column) for row, column in cells if (row, column + 1) in cells]
    if not pairs:
        raise ValueError(f"no room for a sign in {len(cells)} cells; wanted two side by side.")
    row, column = pairs[int(rng.integers(len(pairs)))]
    length = LENGTHS[int(rng.integers(len(LENGTHS)))]
    text = "".join(CHARACTERS[i] for i in rng.integers(len(CHARACTERS), size=length))
    width, height = float(rng.uniform(8.5, 10.5)), float(rng.uniform(12.5, 16.5))
    pitch = width + float(rng.uniform(2.0, 4.0))
    at_corner = Sign(text, row, column, 0.0, 0.0, width, height, pitch, bool(rng.integers(2)))
    _, _, half_width, half_height = at_corner.board
    slack_x, slack_y = cell - half_width, cell / 2 - half_height
    x = (column + 1) * cell + float(rng.uniform(-slack_x, slack_x))
    y = (row + 0.5) * cell + float(rng.uniform(-slack_y, slack_y))
    return Sign(text, row, column, x, y, width, height, pitch, at_corner.dark)


def bitmap(name: str) -> npt.NDArray[np.bool_]:
    """[7, 5], true where a character has ink."""
    return _BITMAPS[name] > 0


def paint(canvas: npt.NDArray[np.float64], sign: Sign, rng: np.random.Generator) -> None:
    """Draw the sign on a picture [h, w, 3]."""
    paper, ink = (_DARK, _PALE) if sign.dark else (_PALE, _DARK)
    _fill(canvas, np.array(paper) + rng.uniform(-10, 10, 3), sign.board, np.ones((1, 1)))
    tint = np.array(ink) + rng.uniform(-10, 10, 3)
    for place, name in enumerate(sign.text):
        _fill(canvas, tint, sign.box(place), _BITMAPS[name])


def _fill(
    canvas: npt.NDArray[np.float64],
    tint: npt.NDArray[np.float64],
    box: tuple[float, float, float, float],
    bitmap: npt.NDArray[np.float64],
) -> None:
    """Lay a bitmap [rows, columns], stretched over a box, on the canvas in one colour."""
    left, top, right, bottom = box
    down, across = _dots(top, bottom, len(bitmap)), _dots(left, right, bitmap.shape[1])
    points = np.pad(bitmap, 1)[np.ix_(down, across)]  # outside the box: nothing
    cover = points.reshape(len(down) // _SAMPLES, _SAMPLES, -1, _SAMPLES).mean((1, 3))[..., None]
    region = canvas[int(top) : int(top) + len(cover), int(left) : int(left) + cover.shape[1]]
    region += cover * (tint - region)


def _dots(begin: float, end: float, count: int) -> npt.NDArray[np.int64]:
    """Which of `count` dots between `begin` and `end` each sampled point of the pixels there lies on, from 1.

    0 and `count` + 1 are beside them.
    """
    pixels = np.arange(int(begin), int(np.ceil(end)))
    points = (pixels[:, None] + (np.arange(_SAMPLES) + 0.5) / _SAMPLES).reshape(-1)
    dots = np.floor((points - begin) / (end - begin) * count).astype(np.int64)
    return np.clip(dots + 1, 0, count + 1)
