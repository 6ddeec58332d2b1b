"""Seeded pictures of what users show: signs, pages of text, tables, bar charts and forms, with prompts about them.

A plan that is judged on scenes alone learns nothing about reading, and reading is what pruning loses first. Everything
is drawn with Pillow and its own font, at the size that the model looks at, so that letters are as large as a photograph
of such a thing would have them. The same seed gives the same pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WORDS = (
    "bakery", "market", "station", "library", "garden", "harbour", "museum", "pharmacy", "school", "theatre",
    "copper", "silver", "winter", "summer", "orange", "yellow", "window", "mirror", "bridge", "island",
    "coffee", "butter", "pepper", "carrot", "rabbit", "falcon", "turtle", "dolphin", "engine", "filter",
    "morning", "evening", "monday", "friday", "north", "south", "closed", "ticket", "parcel", "letter",
)  # fmt: skip
COLOURS = ((178, 34, 34), (30, 96, 160), (34, 120, 60), (120, 60, 140), (190, 110, 20), (60, 60, 70))
INK, PAPER, LINE = (28, 28, 32), (250, 249, 245), (150, 150, 155)


@dataclass(frozen=True)
class Drawing:
    """A picture with one prompt about it."""

    image: Image.Image
    prompt: str


@dataclass(frozen=True)
class Kind:
    """What can be drawn; `least` is the shorter side in pixels below which its letters cannot be told apart."""

    name: str
    least: int
    draw: Callable[[np.random.Generator, tuple[int, int]], Drawing]


def _words(rng: np.random.Generator, count: int) -> list[str]:
    return [WORDS[place] for place in rng.choice(len(WORDS), size=count, replace=False)]


def _canvas(size: tuple[int, int], colour: tuple[int, int, int] = PAPER) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty picture of size (height, width) and a pen for it."""
    image = Image.new("RGB", (size[1], size[0]), colour)
    return image, ImageDraw.Draw(image)


def _font(height: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(max(8, round(height)))


def _ask(rng: np.random.Generator, *prompts: str) -> str:
    return prompts[int(rng.integers(len(prompts)))]


def _sign(rng: np.random.Generator, size: tuple[int, int]) -> Drawing:
    """Two signs on a wall, a word and a number on each."""
    wall = tuple(int(value) for value in rng.integers(120, 210, 3))
    image, pen = _canvas(size, (wall[0], wall[1], wall[2]))
    height, width = size
    for row, word in enumerate(_words(rng, 2)):
        top, left = height * (0.1 + 0.46 * row), width * float(rng.uniform(0.05, 0.2))
        box = (left, top, left + 0.72 * width, top + 0.34 * height)
        pen.rounded_rectangle(
            box, radius=height / 40, fill=COLOURS[int(rng.integers(len(COLOURS)))], outline=PAPER, width=3
        )
        pen.text((box[0] + 0.04 * width, top + 0.03 * height), word.upper(), font=_font(height / 9), fill=PAPER)
        number = str(int(rng.integers(10, 1000)))
        pen.text((box[0] + 0.04 * width, top + 0.18 * height), number, font=_font(height / 9), fill=PAPER)
    return Drawing(
        image,
        _ask(
            rng,
            "What is written on the upper sign?",
            "Which numbers are on the signs?",
            "Where is the sign with the smaller number?",
            "Describe the picture.",
        ),
    )


def _page(rng: np.random.Generator, size: tuple[int, int]) -> Drawing:
    """A heading and a page of lines."""
    image, pen = _canvas(size)
    height, width = size
    line = height / 19
    pen.text((width * 0.07, line), " ".join(_words(rng, 2)).title(), font=_font(1.35 * line), fill=INK)
    for row in range(13):
        words = _words(rng, 4)
        text = " ".join(words)[: round(width / (0.55 * line))]
        pen.text((width * 0.07, (3.3 + 1.15 * row) * line), text, font=_font(0.9 * line), fill=INK)
    return Drawing(
        image,
        _ask(
            rng,
            "What is the heading of the page?",
            "Read the first line of the text.",
            "How many lines of text are there?",
            "What is the last word on the page?",
        ),
    )


def _table(rng: np.random.Generator, size: tuple[int, int]) -> Drawing:
    """Five rows of a name and two numbers under a head."""
    image, pen = _canvas(size)
    height, width = size
    names = _words(rng, 5)
    row, edges = height / 7, (0.05 * width, 0.45 * width, 0.7 * width, 0.95 * width)
    heads = ("name", "price", "stock")
    cells = [heads, *((name, f"{rng.integers(100, 9900) / 100:.2f}", str(rng.integers(1, 100))) for name in names)]
    for place, texts in enumerate(cells):
        top = row * (place + 0.5)
        if place == 0:
            pen.rectangle((edges[0], top, edges[-1], top + row), fill=(222, 226, 232))
        for left, text in zip(edges, texts, strict=False):
            pen.text((left + 0.02 * width, top + 0.22 * row), text, font=_font(0.48 * row), fill=INK)
        pen.line((edges[0], top, edges[-1], top), fill=LINE, width=2)
    for edge in edges:
        pen.line((edge, 0.5 * row, edge, 6.5 * row), fill=LINE, width=2)
    pen.line((edges[0], 6.5 * row, edges[-1], 6.5 * row), fill=LINE, width=2)
    name = names[int(rng.integers(5))]
    return Drawing(
        image,
        _ask(
            rng,
            f"What is the price of {name}?",
            f"How many {name} are in stock?",
            "Which row has the highest price?",
            "How many rows does the table have?",
        ),
    )


def _chart(rng: np.random.Generator, size: tuple[int, int]) -> Drawing:
    """Four bars with their values above and their names below."""
    image, pen = _canvas(size)
    height, width = size
    names, values = _words(rng, 4), rng.integers(10, 100, 4)
    base, top = 0.82 * height, 0.14 * height
    pen.text((0.05 * width, 0.02 * height), "sales by " + _words(rng, 1)[0], font=_font(height / 16), fill=INK)
    pen.line((0.05 * width, base, 0.97 * width, base), fill=INK, width=2)
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        left = width * (0.08 + 0.225 * place)
        head = base - (base - top) * int(value) / 100
        pen.rectangle((left, head, left + 0.15 * width, base), fill=COLOURS[place])
        pen.text((left + 0.02 * width, head - height / 15), str(value), font=_font(height / 18), fill=INK)
        pen.text((left - 0.02 * width, base + 0.02 * height), name, font=_font(height / 20), fill=INK)
    name = names[int(rng.integers(4))]
    return Drawing(
        image,
        _ask(
            rng,
            f"What is the value of {name}?",
            "Which bar is the highest?",
            "How many bars are there?",
            "What does the chart show?",
        ),
    )


def _form(rng: np.random.Generator, size: tuple[int, int]) -> Drawing:
    """A screen with labelled fields, a tick box and two buttons."""
    image, pen = _canvas(size, (232, 235, 240))
    height, width = size
    pen.rectangle((0, 0, width, 0.12 * height), fill=COLOURS[1])
    pen.text((0.04 * width, 0.025 * height), "New order", font=_font(height / 15), fill=PAPER)
    labels, entries = ("Name", "Street", "City", "Code"), [word.title() for word in _words(rng, 3)]
    entries.append(str(int(rng.integers(10000, 100000))))
    for place, (label, entry) in enumerate(zip(labels, entries, strict=True)):
        top = height * (0.17 + 0.145 * place)
        pen.text((0.05 * width, top + 0.025 * height), label, font=_font(height / 20), fill=INK)
        pen.rectangle((0.3 * width, top, 0.94 * width, top + 0.105 * height), fill=PAPER, outline=LINE, width=2)
        pen.text((0.33 * width, top + 0.02 * height), entry, font=_font(height / 18), fill=INK)
    ticked = bool(rng.integers(2))
    box = (0.3 * width, 0.765 * height, 0.3 * width + 0.05 * height, 0.815 * height)
    pen.rectangle(box, fill=PAPER, outline=INK, width=2)
    if ticked:
        pen.line((box[0] + 3, box[1] + 0.02 * height, box[0] + 0.02 * height, box[3] - 4), fill=INK, width=3)
        pen.line((box[0] + 0.02 * height, box[3] - 4, box[2] - 2, box[1] + 3), fill=INK, width=3)
    pen.text((0.38 * width, 0.765 * height), "express", font=_font(height / 22), fill=INK)
    for left, text, colour in ((0.3, "Send", COLOURS[2]), (0.64, "Cancel", COLOURS[5])):
        pen.rounded_rectangle((left * width, 0.86 * height, (left + 0.3) * width, 0.96 * height), radius=6, fill=colour)
        pen.text(((left + 0.07) * width, 0.875 * height), text, font=_font(height / 20), fill=PAPER)
    return Drawing(
        image,
        _ask(
            rng,
            "Which city is in the form?",
            "What is the code?",
            "Is express ticked?",
            "Where is the button that says Cancel?",
        ),
    )


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("signs", 112, _sign),
        Kind("pages", 280, _page),
        Kind("tables", 224, _table),
        Kind("charts", 224, _chart),
        Kind("forms", 224, _form),
    )
}


def draw(kind: str, seed: int, number: int, size: tuple[int, int]) -> Drawing:
    """Drawing `number` of a kind, height x width pixels."""
    return KINDS[kind].draw(np.random.default_rng((seed, number, list(KINDS).index(kind))), size)
