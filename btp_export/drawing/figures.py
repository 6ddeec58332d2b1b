"""The report's figures. Each is drawn twice, for wide and for narrow pages, at the size it is shown; CSS picks one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from markupsafe import Markup

from btp_export.drawing.svg import FONT, Canvas, Scale, spread_out, text_width, ticks

WIDE, NARROW = 760, 352  # pixels
OUTLIER = 0.25  # accuracy below the best plan's; plans further down would flatten the differences between the others
_LINE = 15.0  # pixels between lines of labels


@dataclass(frozen=True)
class Box:
    """The plot area inside a canvas, in pixels."""

    left: float
    right: float
    top: float
    bottom: float


@dataclass(frozen=True)
class Point:
    """One evaluated plan: accuracy with its interval (or None) against the average image tokens."""

    plan: str
    tokens: float
    accuracy: float
    interval: tuple[float, float] | None = None
    own: bool = False


@dataclass(frozen=True)
class Bar:
    """One row of stacked parts: (name, CSS class, milliseconds)."""

    name: str
    parts: tuple[tuple[str, str, float], ...]

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return sum(part[2] for part in self.parts)


def both(draw: Callable[[int], Markup]) -> Markup:
    """The wide and the narrow drawing; the style sheet shows one of them."""
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(draw(WIDE), draw(NARROW))


def layer_bars(
    values: Sequence[float],
    stages: Sequence[int],
    *,
    title: str,
    unit: str,
    ceiling: float | None = None,
    spread: Sequence[float] | None = None,
) -> Markup:
    """One bar per layer, dashed lines before the stages' layers; `spread` is drawn as whiskers of plus and minus."""

    def draw(width: int) -> Markup:
        canvas, box = Canvas(width, 230 if width == WIDE else 210), Box(52, width - 10, 40, 0)
        box = replace(box, bottom=canvas.height - 34)
        tops = [value + (spread[layer] if spread else 0.0) for layer, value in enumerate(values)]
        high = min(_nice_top(max(tops, default=0.0)), ceiling if ceiling is not None else float("inf")) or 1.0
        y = Scale(0, high, box.bottom, box.top)
        _value_axis(canvas, box, y, unit)
        step = _layer_axis(canvas, box, len(values))
        for layer, value in enumerate(values):
            left = box.left + layer * step
            text = f"layer {layer}: {value:.4g} {unit}" + (f" ± {spread[layer]:.2g}" if spread else "")
            canvas.rect(left + step * 0.14, y(value), step * 0.72, box.bottom - y(value), "bar", text)
            if spread and spread[layer] > 0:
                low, top = y(max(0.0, value - spread[layer])), y(min(high, value + spread[layer]))
                canvas.line(left + step / 2, low, left + step / 2, top, "whisker")
        _stage_marks(canvas, box, step, stages)
        return canvas.svg(title)

    return both(draw)


def token_steps(pruned: Sequence[int], full: int, stages: Sequence[int], *, title: str) -> Markup:
    """Image tokens that each layer sees: a filled staircase for the plan under the level line of the full model."""

    def draw(width: int) -> Markup:
        canvas = Canvas(width, 250 if width == WIDE else 220)
        box = Box(52, width - 10, 40, canvas.height - 34)
        y = Scale(0, full * 1.12, box.bottom, box.top)
        _value_axis(canvas, box, y, "image tokens", marks=[0, full / 2, full] if full % 2 == 0 else [0, full])
        step = _layer_axis(canvas, box, len(pruned))
        corners: list[tuple[float, float]] = []
        for layer, tokens in enumerate(pruned):
            corners += [(box.left + layer * step, y(tokens)), (box.left + (layer + 1) * step, y(tokens))]
        canvas.path([(box.left, y(0)), *corners, (box.right, y(0))], "area", closed=True)
        canvas.path(corners, "curve")
        canvas.line(box.left, y(full), box.right, y(full), "full-line")
        _stage_marks(canvas, box, step, stages)
        canvas.text(box.right - 4, y(full) - 6, f"full model: {full} in every layer", "label muted", "end")
        start = 0
        for tokens, run in groupby(pruned):
            length = len(list(run))
            middle = box.left + (start + length / 2) * step
            if tokens != full and length * step >= text_width(str(tokens)):
                canvas.text(middle, y(tokens) - 6, str(tokens), "label strong", "middle")
            start += length
        return canvas.svg(title)

    return both(draw)


def accuracy_plot(points: Sequence[Point], full_tokens: int, *, title: str) -> Markup:
    """Accuracy against average tokens. Plans of about equal tokens stand side by side; every plan is named once.

    The unpruned model is a line across, so that the axis ends where the pruned plans do. Plans so far down that they
    would flatten the others are arrows at the end of the axis, with their value.
    """
    full = next((p for p in points if p.tokens >= full_tokens), None)
    points = [p for p in points if p.tokens < full_tokens]
    most = max((p.tokens for p in points), default=full_tokens)
    below = outliers(points)
    shown = [p for p in points if p not in below]

    def draw(width: int) -> Markup:
        canvas = Canvas(width, 340 if width == WIDE else 320)
        box = Box(52, width - 16, 30, canvas.height - 40)
        bounds = [bound for p in shown for bound in (p.interval or (p.accuracy, p.accuracy))]
        bounds += [full.accuracy] if full else []
        low, high = min(bounds), max(bounds)
        room = max(high - low, 0.02) * (0.2 if below else 0.08)
        y = Scale(max(0.0, low - room), min(1.0, high + room * 0.5), box.bottom, box.top)
        end = min(full_tokens, most * (1.25 if width == WIDE else 1.9))  # a phone needs more room for the names
        x = Scale(0, end, box.left + 12, box.right - 22)
        _value_axis(canvas, box, y, "accuracy", percent=True)
        if full:
            text = f"{full.plan}: {full.accuracy * 100:.1f} % at {full_tokens} tokens"
            canvas.line(box.left, y(full.accuracy), box.right, y(full.accuracy), "full-line")
            canvas.text(box.right, FONT, text, "label muted", "end")
            sample = box.right - text_width(text) - 8
            canvas.line(sample - 18, FONT * 0.65, sample, FONT * 0.65, "full-line")
        for mark in ticks(0, end, 5 if width == WIDE else 3):
            canvas.text(x(mark), box.bottom + 17, f"{mark:g}", "label muted", "middle")
            canvas.line(x(mark), box.bottom, x(mark), box.bottom + 4, "axis")
        canvas.line(box.left, box.bottom, box.right, box.bottom, "axis")
        canvas.text(box.right, canvas.height - 5, "image tokens, mean over the layers", "label muted", "end")
        placed = _placed(shown, points, x, y, width, bottom=y.start - 12 - _LINE * len(below))
        _draw_points(canvas, placed + _placed(below, points, x, y, width, bottom=y.start - 12), y)
        return canvas.svg(title)

    return both(draw)


def outliers(points: Sequence[Point]) -> list[Point]:
    """The few points more than `OUTLIER` below the best; if they are more than a quarter, they are no outliers."""
    best = max((p.accuracy for p in points), default=0.0)
    low = [p for p in points if p.accuracy < best - OUTLIER]
    return low if len(low) <= max(2, len(points) // 4) else []


def stacked_bars(bars: Sequence[Bar], *, title: str) -> Markup:
    """Milliseconds per part as stacked horizontal bars, with the total at the end of each."""

    def draw(width: int) -> Markup:
        names = list(dict.fromkeys((name, css) for bar in bars for name, css, _ in bar.parts))
        canvas = Canvas(width, 34 + len(bars) * 46)
        _legend(canvas, names)
        longest = max((bar.total for bar in bars), default=0.0) or 1.0
        reserved = max(text_width(f"{milliseconds(bar.total)} ms", FONT * 1.15) for bar in bars) + 14  # bold
        x = Scale(0, longest, 0, width - reserved)
        for row, bar in enumerate(bars):
            top = 34 + row * 46
            canvas.text(0, top + 12, bar.name)
            left = 0.0
            for name, css, value in bar.parts:
                wide = x(value)
                canvas.rect(left, top + 18, wide, 18, css, f"{bar.name}, {name}: {milliseconds(value)} ms")
                left += wide
            canvas.text(left + 8, top + 31.5, f"{milliseconds(bar.total)} ms", "label strong")
        return canvas.svg(title)

    return both(draw)


def milliseconds(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


# Axes and marks


def _value_axis(
    canvas: Canvas, box: Box, y: Scale, unit: str, *, percent: bool = False, marks: Sequence[float] | None = None
) -> None:
    for mark in marks if marks is not None else ticks(y.low, y.high, 4):
        canvas.line(box.left, y(mark), box.right, y(mark), "grid")
        text = f"{mark * 100:g} %".replace(" ", "\N{NO-BREAK SPACE}") if percent else f"{mark:g}"
        canvas.text(box.left - 6, y(mark) + FONT * 0.35, text, "label muted", "end")
    canvas.text(0, FONT, unit, "label muted")


def _layer_axis(canvas: Canvas, box: Box, count: int) -> float:
    """Draw the layers' numbers; the width of one layer in pixels."""
    step = (box.right - box.left) / max(1, count)
    every = next(every for every in (1, 2, 4, 5, 8, 10, 20, 40, 100, count + 1) if every * step >= 24)
    for layer in range(0, count, every):
        canvas.text(box.left + (layer + 0.5) * step, box.bottom + 17, str(layer), "label muted", "middle")
    canvas.line(box.left, box.bottom, box.right, box.bottom, "axis")
    canvas.text(box.right, canvas.height - 2, "decoder layer", "label muted", "end")
    return step


def _stage_marks(canvas: Canvas, box: Box, step: float, stages: Sequence[int]) -> None:
    """Dashed lines before the stages' layers, named "stage 1", or "1" where the names would run into each other."""
    places = [box.left + layer * step for layer in stages]
    long = text_width("stage 1") + 8
    close = any(right - left < long for left, right in pairwise(places))
    for index, place in enumerate(places):
        name = str(index + 1) if close else f"stage {index + 1}"
        half = text_width(name) / 2
        canvas.line(place, box.top - 6, place, box.bottom, "stage-line")
        canvas.text(min(max(place, half), canvas.width - half), box.top - 11, name, "label stage-name", "middle")
    if close and places:
        canvas.text(places[0] - 10, box.top - 11, "stages", "label stage-name", "end")


def _legend(canvas: Canvas, names: Sequence[tuple[str, str]]) -> None:
    left = 0.0
    for name, css in names:
        canvas.rect(left, 2, 11, 11, css)
        canvas.text(left + 16, 12, name, "label muted")
        left += 16 + text_width(name) + 18


def _nice_top(value: float) -> float:
    """The end of an axis that holds `value`: the next tick above it."""
    if value <= 0:
        return 0.0
    marks = ticks(0, value * 1.25, 4)
    return next((mark for mark in marks if mark >= value), value)


# Points and their names


@dataclass(frozen=True)
class _Placed:
    """A point at its place; `label` is (x, y, anchor) of its name, None where the plan is named at another point."""

    point: Point
    x: float
    y: float
    below: bool  # under the end of the axis
    label: tuple[float, float, str] | None = None

    @property
    def name(self) -> str:
        """What stands beside the point."""
        value = f": {self.point.accuracy * 100:.1f}\N{NO-BREAK SPACE}%" if self.below else ""
        return self.point.plan + value


@dataclass(frozen=True)
class _Column:
    """Names one under the other at x; they cover [left, right]."""

    x: float
    anchor: str
    left: float
    right: float
    items: list[_Placed]


def _placed(
    points: Sequence[Point], everything: Sequence[Point], x: Scale, y: Scale, width: int, *, bottom: float
) -> list[_Placed]:
    """Points of one cluster side by side, and their names in a column beside it, as near to their heights as fits.

    A plan that is there with several budgets among `everything` is named at the largest. `bottom` is the lowest
    height of a name.
    """
    apart = 13.0 if width == WIDE else 8.0
    bearer = {p.plan: p for p in sorted(everything, key=lambda p: p.tokens)}
    clusters = _clusters(points, x, apart)
    placed: list[_Placed] = []
    columns: list[_Column] = []
    for number, (start, members) in enumerate(clusters):
        stacked = [
            _Placed(p, start + index * apart, min(y(p.accuracy), y.start - 7), p.accuracy < y.low)
            for index, p in enumerate(members)
        ]
        limit = clusters[number + 1][0] - 8 if number + 1 < len(clusters) else x.stop + 22
        named = [item for item in stacked if bearer[item.point.plan] is item.point]
        columns.append(_column(named, start, start + apart * (len(members) - 1), limit))
        placed += stacked
    labels: dict[int, tuple[float, float, str]] = {}
    for group in _side_by_side(columns):  # names of columns that run into each other share the heights
        items = sorted(((item, column) for column in group for item in column.items), key=lambda pair: pair[0].y)
        heights = spread_out([item.y for item, _ in items], _LINE, y.stop + 4, bottom)
        labels |= {
            id(item): (column.x, height, column.anchor) for (item, column), height in zip(items, heights, strict=True)
        }
    return [replace(item, label=labels.get(id(item))) for item in placed]


def _column(named: list[_Placed], start: float, end: float, limit: float) -> _Column:
    """The names right of the cluster [start, end] if they end before `limit`, else left of it."""
    widest = max((text_width(item.name) for item in named), default=0.0)
    if end + 16 + widest <= limit or start - 16 - widest < 0:
        return _Column(end + 16, "start", end + 16, end + 16 + widest, named)
    return _Column(start - 16, "end", start - 16 - widest, start - 16, named)


def _side_by_side(columns: Sequence[_Column]) -> list[list[_Column]]:
    """Columns in groups that overlap from left to right."""
    groups: list[list[_Column]] = []
    for column in sorted((c for c in columns if c.items), key=lambda c: c.left):
        if groups and column.left < max(c.right for c in groups[-1]) + 4:
            groups[-1].append(column)
        else:
            groups.append([column])
    return groups


def _clusters(points: Sequence[Point], x: Scale, apart: float) -> list[tuple[float, list[Point]]]:
    """(place of the first point, points by falling accuracy) of each group that has to stand side by side."""
    groups: list[list[Point]] = []
    for point in sorted(points, key=lambda p: (p.tokens, p.plan)):
        groups.append([point])
        while len(groups) > 1 and _start(groups[-1], x, apart) < _start(groups[-2], x, apart) + apart * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [(_start(group, x, apart), sorted(group, key=lambda p: (-p.accuracy, p.plan))) for group in groups]


def _start(group: Sequence[Point], x: Scale, apart: float) -> float:
    """Where the first point of a group stands, so that the group is around its own place and on the axis."""
    long = apart * (len(group) - 1)
    return max(x.start, min(sum(x(p.tokens) for p in group) / len(group) - long / 2, x.stop - long))


def _draw_points(canvas: Canvas, placed: Sequence[_Placed], y: Scale) -> None:
    for plan in dict.fromkeys(p.point.plan for p in placed):  # one plan at several budgets: joined
        same = sorted((p.x, p.y) for p in placed if p.point.plan == plan)
        if len(same) > 1:
            canvas.path(same, "join")
    for p in placed:
        if p.label:
            canvas.line(p.x, p.y, p.label[0] + (-4 if p.label[2] == "start" else 4), p.label[1], "leader")
    for p in placed:
        css = "own" if p.point.own else "other"
        text = f"{p.point.plan}: {p.point.accuracy * 100:.1f} % at {p.point.tokens:.1f} tokens"
        if p.below:
            canvas.path([(p.x - 5, p.y - 9), (p.x + 5, p.y - 9), (p.x, p.y + 1)], f"point {css}", closed=True)
        else:
            if p.point.interval:
                low, high = (min(max(y(bound), y.stop), y.start) for bound in p.point.interval)
                canvas.line(p.x, low, p.x, high, f"interval {css}")
            canvas.circle(p.x, p.y, 5.5 if p.point.own else 4, f"point {css}", text)
        if p.label:
            weight = "label strong" if p.point.own else "label"
            canvas.text(p.label[0], p.label[1] + FONT * 0.35, p.name, weight, p.label[2])
