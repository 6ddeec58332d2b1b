"""A few shapes of inline SVG: drawn in pixels, coloured by the page's style sheet, the same bytes for the same data."""

import math
from dataclasses import dataclass, field

from markupsafe import Markup, escape

FONT = 12.5  # pixels; the figures are shown at about their own size, so this is what the reader gets
GLYPH = 0.56  # mean width of a letter in units of the font size, of the sans-serif fonts in use


def text_width(text: str, size: float = FONT) -> float:
    """About how wide `text` will be, in pixels."""
    return len(text) * size * GLYPH


def number(value: float) -> str:
    """A coordinate: two decimals at most, no trailing zeros, no negative zero."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


@dataclass(frozen=True)
class Scale:
    """A linear map from data [low, high] to pixels [start, stop]."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """The pixel of a value; a scale without length maps everything to its start."""
        span = self.high - self.low
        return self.start + (value - self.low) / span * (self.stop - self.start) if span else self.start


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) in [low, high], around `about` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def spread_out(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near as can be to the rising `wanted`, at least `gap` apart, within [low, high] where they fit."""
    places: list[float] = []
    for place in wanted:
        places.append(max(place, places[-1] + gap if places else low))
    limit = high
    for index in range(len(places) - 1, -1, -1):  # push back up what ran over the end
        places[index] = min(places[index], limit)
        limit = places[index] - gap
    return places


@dataclass
class Canvas:
    """Collects shapes; `svg` makes the element. Colours and line widths come from CSS classes."""

    width: float
    height: float
    parts: list[Markup] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        """A straight line."""
        self._add('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>', x1, y1, x2, y2, css)

    def rect(self, x: float, y: float, width: float, height: float, css: str, title: str = "") -> None:
        """A filled rectangle; `title` is shown when the pointer rests on it."""
        shape = '<rect x="{}" y="{}" width="{}" height="{}" class="{}">{}</rect>'
        self._add(shape, x, y, max(width, 0.0), max(height, 0.0), css, _title(title))

    def circle(self, x: float, y: float, radius: float, css: str, title: str = "") -> None:
        """A filled circle."""
        self._add('<circle cx="{}" cy="{}" r="{}" class="{}">{}</circle>', x, y, radius, css, _title(title))

    def path(self, points: list[tuple[float, float]], css: str, *, closed: bool = False) -> None:
        """Straight lines from point to point."""
        steps = " ".join(f"{'L' if index else 'M'}{number(x)} {number(y)}" for index, (x, y) in enumerate(points))
        self._add('<path d="{}" class="{}"/>', steps + ("Z" if closed else ""), css)

    def text(self, x: float, y: float, text: str, css: str = "label", anchor: str = "start") -> None:
        """Text whose base line is at y."""
        self._add('<text x="{}" y="{}" class="{}" text-anchor="{}">{}</text>', x, y, css, anchor, text)

    def svg(self, title: str, css: str = "") -> Markup:
        """The whole element; `title` is what a screen reader says."""
        head = Markup('<svg viewBox="0 0 {} {}" class="chart {}" role="img" aria-label="{}">').format(
            number(self.width), number(self.height), css, title
        )
        return head + Markup("").join(self.parts) + Markup("</svg>")

    def _add(self, shape: str, *values: float | str) -> None:
        texts = [value if isinstance(value, str) else number(value) for value in values]
        self.parts.append(Markup(shape).format(*texts))


def _title(text: str) -> Markup:
    return Markup("<title>{}</title>").format(escape(text)) if text else Markup("")
