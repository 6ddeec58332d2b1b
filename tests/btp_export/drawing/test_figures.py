"""The figures: scales, ticks, and that nothing in them runs into each other."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btp_export.drawing import figures
from btp_export.drawing.figures import Bar, Point
from btp_export.drawing.svg import FONT, Canvas, Scale, number, spread_out, text_width, ticks

Box = tuple[float, float, float, float]


def _texts(svg: str) -> list[tuple[Box, str]]:
    """(left, top, right, bottom) of every text, by the figures' own estimate of widths."""
    collected = []
    pattern = r'<text x="([\d.-]+)" y="([\d.-]+)" class="[^"]*" text-anchor="(\w+)">([^<]*)</text>'
    for x, y, anchor, text in re.findall(pattern, svg):
        width = text_width(text)
        left = float(x) - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        collected.append(((left, float(y) - FONT * 0.75, left + width, float(y)), text))
    return collected


def _drawings(figure: str) -> list[tuple[str, float]]:
    """The two drawings of a figure, (svg, width)."""
    svgs = re.findall(r"<svg .*?</svg>", figure, re.S)
    assert len(svgs) == 2
    return [(svg, float(re.findall(r'viewBox="0 0 ([\d.]+) ', svg)[0])) for svg in svgs]


def _assert_clear(figure: str) -> None:
    for svg, width in _drawings(figure):
        texts = _texts(svg)
        for box, text in texts:
            assert box[0] >= -1 and box[2] <= width + 1, f"{text!r} leaves the drawing"
        for (a, one), (b, two) in itertools.combinations(texts, 2):
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert apart, f"{one!r} and {two!r} overlap"


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(st.floats(20, 400), min_size=1, max_size=3),
    accuracies=st.lists(st.floats(0.0, 1.0), min_size=9, max_size=9),
)
def test_names_of_plans_do_not_overlap(tokens: list[float], accuracies: list[float]) -> None:
    names = ("none", "btp", "btp-paper", "fastv", "pyramiddrop", "divprune", "vtw", "random", "dart")
    points = [
        Point(name, 576.0 if name == "none" else tokens[0] * (1 - 0.004 * n), accuracy, None, name == "btp")
        for n, (name, accuracy) in enumerate(zip(names, accuracies, strict=True))
    ]
    figure = figures.accuracy_plot(points, 576, title="plans")
    for svg, _ in _drawings(figure):
        places = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)
        arrows = re.findall(r'class="point (?:other|own)"/>', svg)
        assert len(places) + len(arrows) == len(names) - 1
        assert svg.count('class="full-line"') == 2, "the unpruned model is a line, and a sample of it beside its name"
        named = [text for _, text in _texts(svg) if text.split(":")[0] in names]
        assert len(named) == len(names), "every plan is named once"
        for (x1, y1), (x2, y2) in itertools.combinations([(float(x), float(y)) for x, y in places], 2):
            assert abs(x1 - x2) >= 7.9 or abs(y1 - y2) >= 7.9, "points stand clear of each other"
    _assert_clear(figure)


def test_plans_of_several_budgets_are_joined_and_named_once() -> None:
    points = [Point(name, tokens, 0.9) for name in ("btp", "fastv") for tokens in (63.0, 129.0)]
    for svg, _ in _drawings(figures.accuracy_plot(points, 576, title="budgets")):
        assert svg.count('class="join"') == 2
        assert [text for _, text in _texts(svg)].count("btp") == 1


def test_intervals_reach_to_their_values() -> None:
    point = Point("btp", 129.0, 0.9, (0.85, 0.93), True)
    svg, _ = _drawings(figures.accuracy_plot([point, Point("none", 576.0, 0.95)], 576, title="intervals"))[0]
    marks = {text: box[3] - FONT * 0.35 for box, text in _texts(svg) if text.endswith("%")}
    (low, at_low), (high, at_high) = sorted(
        (float(text.split("\N{NO-BREAK SPACE}")[0]), y) for text, y in marks.items()
    )[:: len(marks) - 1]
    y1, y2 = (float(v) for v in re.findall(r'y1="([\d.]+)" x2="[\d.]+" y2="([\d.]+)" class="interval own"', svg)[0])
    per_point = (at_high - at_low) / (high - low)
    assert y1 == pytest.approx(at_low + (85 - low) * per_point, abs=0.1)
    assert y2 == pytest.approx(at_low + (93 - low) * per_point, abs=0.1)


@pytest.mark.parametrize("layers", [1, 12, 28, 40, 80])
def test_layers_of_any_model_fit(layers: int) -> None:
    stages = sorted({1, layers // 3, layers // 2, layers - 1} - {0})
    pruned = [max(0, 576 - 150 * sum(layer >= stage for stage in stages)) for layer in range(layers)]
    for figure in (
        figures.token_steps(pruned, 576, stages, title="tokens"),
        figures.layer_bars([1e-3 * n for n in range(layers)], stages, title="bars", unit="nats"),
        figures.layer_bars([0.0] * layers, stages, title="nothing", unit="tokens", spread=[0.0] * layers),
    ):
        for svg, width in _drawings(figure):
            assert all(box[0] >= -1 and box[2] <= width + 1 for box, _ in _texts(svg))
            assert svg.count('class="stage-line"') == len(stages)


def test_steps_lie_at_their_token_counts() -> None:
    svg, _ = _drawings(figures.token_steps([576, 576, 288, 288, 0, 0], 576, [2, 4], title="steps"))[0]
    path = re.findall(r'<path d="([^"]*)" class="curve"', svg)[0]
    heights = [float(y) for _, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]
    bottom, top = heights[-1], heights[0]
    assert heights[4] == pytest.approx((bottom + top) / 2) and heights[3] == top


def test_stacked_parts_are_as_long_as_their_times() -> None:
    bars = [Bar("full", (("a", "x", 10.0), ("b", "y", 30.0))), Bar("less", (("a", "x", 10.0), ("b", "y", 5.0)))]
    figure = figures.stacked_bars(bars, title="times")
    _assert_clear(figure)
    for svg, width in _drawings(figure):
        lengths = [float(w) for w in re.findall(r'width="([\d.]+)" height="18"', svg)]
        assert lengths[1] == pytest.approx(3 * lengths[0], abs=0.05) and lengths[3] == pytest.approx(
            lengths[2] / 2, abs=0.05
        )
        assert sum(lengths[:2]) < width


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-6, 1e6))
def test_ticks_are_round_and_inside(low: float, span: float) -> None:
    marks = ticks(low, low + span)
    assert all(low - span * 1e-6 <= mark <= low + span * (1 + 1e-6) for mark in marks)
    assert len(marks) <= 11


@given(st.lists(st.floats(0, 300), max_size=15).map(sorted))
def test_spread_out_keeps_order_and_distance(wanted: list[float]) -> None:
    places = spread_out(wanted, 15.0, 0.0, 300.0)
    assert all(b - a >= 15.0 - 1e-6 for a, b in itertools.pairwise(places))
    assert not places or places[-1] <= 300.0


def test_small_things_of_drawing() -> None:
    assert [number(v) for v in (1.0, 1.25, -0.001, 3.14159)] == ["1", "1.25", "0", "3.14"]
    assert Scale(2, 2, 5, 9)(2) == 5
    canvas = Canvas(10, 10)
    canvas.text(1, 2, '<b>"&')
    assert str(canvas.svg('a "title" <x>')).count("<") == 4
