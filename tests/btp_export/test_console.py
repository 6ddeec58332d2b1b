"""Results on standard output, everything else on standard error."""

import io
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from btp_export import console
from btp_export.results.base import Number, Result
from btp_export.results.doctor import Version
from graphs.records.shapes import ShapeProfile


class Example(Result):
    """A document with everything that JSON has no word for."""

    path: Path
    floor: Number
    ceiling: Number
    record: ShapeProfile
    nested: tuple[dict[str, Any], ...]
    format: Literal["btp-example/1"] = "btp-example/1"


def example() -> Example:
    profile = ShapeProfile(
        name="p", image_size=(1, 2), grid=(1, 1), prefix_tokens=0, image_tokens=1, text_tokens=1, new_tokens=1
    )
    nested = ({"tuple": (1, 2), "nan": math.nan, "path": Path("c")},)
    return Example(path=Path("a/b"), floor=-math.inf, ceiling=np.float64("nan"), record=profile, nested=nested)


def test_json_is_one_document_of_plain_types(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit(example(), as_json=True, render=lambda _: pytest.fail("not rendered"))
    text = capsys.readouterr().out
    out = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert next(iter(out)) == "format" and out.pop("format") == "btp-example/1"
    assert out.pop("record")["image_size"] == [1, 2]
    assert out == {
        "path": "a/b", "floor": None, "ceiling": None, "nested": [{"tuple": [1, 2], "nan": None, "path": "c"}],
    }  # fmt: skip
    assert Example.model_validate_json(text).to_json() == text


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit(example(), as_json=False, render=lambda result: f"[bold]{result.path}[/bold] :smile:")
    assert capsys.readouterr().out == "[bold]a/b[/bold] :smile:\n"


def test_only_results_reach_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with console.stdout_for_results():
        print("a library talks")
        console.note("we talk")
        with console.progress("work", total=2) as bar:
            bar.step()
            bar(2, 2, "done")
        console.stream("piece")
        console.emit(Version(version="1"), as_json=True)
    captured = capsys.readouterr()
    assert captured.out == 'piece{\n "format": "btp-version/1",\n "version": "1"\n}\n'
    assert captured.err == "a library talks\nwe talk\n"
    assert sys.stdout is not sys.stderr


def test_what_libraries_print_loses_its_control_characters(capfd: pytest.CaptureFixture[str]) -> None:
    """In Python and in C: tokenizers print keys of their files."""
    with console.stdout_for_results():
        print("a \x1b[31mred key")
        os.write(1, "another \x1b]0;title\x07 \u202e é".encode())
        console.stream("result")
    captured = capfd.readouterr()
    assert captured.out == "result"
    assert "red key" in captured.err and "title" in captured.err and "é" in captured.err
    assert not {"\x1b", "\x07"} & set(captured.err)


def test_progress_says_how_long_it_will_take(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 105.0, 120.0, 121.0, 140.0])
    monkeypatch.setattr("btp_export.console.time.monotonic", lambda: next(clock))
    with console.progress("work") as bar:
        bar(1, 8)  # 5 s: too early to say anything
        bar(2, 8, "layer 2")  # 20 s for 2 of 8: 60 s left
        bar(3, 8)  # 1 s after the last line
        bar(4, 8)  # 40 s for 4 of 8
    assert capsys.readouterr().err.splitlines() == [
        "work: 2 of 8, about 60 s left (layer 2)",
        "work: 4 of 8, about 40 s left",
    ]


def test_a_live_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with console.progress("work", total=4) as bar:
        bar.step(2, "half")
    assert capsys.readouterr().out == ""


def test_errors_take_three_lines_at_most(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_lines(["first\nline", "second", "third", "fourth"])
    assert capsys.readouterr().err == "error: first line\n  second\n  third\n"


def test_another_kind_of_work_has_a_clock_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("btp_export.console.time.monotonic", lambda: now)
    bar = console.Bar("work", None)
    now = 100.0
    bar(4, 4, "pictures")
    now = 120.0
    bar(1, 10, "layers")
    assert "1 of 10, about 180 s left (layers)" in capsys.readouterr().err  # nine more of 20 s each


def test_phases_are_parts_of_one_whole() -> None:
    told: list[tuple[int, int, str]] = []
    phases = console.Phases(lambda done, total, text="": told.append((done, total, text)), {"a": 1, "b": 3})
    phases.named("a")(1, 2)
    phases.named("b")(0, 5, "begun")
    phases.named("b")(5, 5, "")
    assert told == [(125, 1000, "a"), (250, 1000, "b: begun"), (1000, 1000, "b")]
    console.Phases(None, {"a": 1}).named("a")(1, 1)


@pytest.mark.parametrize("columns", ["0", "1", "20", "40"])
def test_narrow_terminals_show_every_number_and_word(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    rows = [["prefill_0", "1.000000000000", "0.999999978"], ["select_0", "1.000000000001", "1.19e-07"]]
    console.emit(
        Version(version="1"), as_json=False, render=lambda _: console.table(["graph", "cosine", "norm ratio"], rows)
    )
    shown = capsys.readouterr().out.split()
    assert all(cell in shown for row in rows for cell in row), shown


@given(data=st.data(), columns=st.sampled_from([0, 1, 20, 40, 60, 80]))
def test_tables_lose_no_number_and_no_word(data: st.DataObject, columns: int) -> None:
    """And are no wider than the terminal, or what their words need."""
    count = data.draw(st.integers(2, 6))
    words = st.lists(st.text("ab", min_size=1, max_size=12), min_size=1, max_size=5).map(" ".join)
    head = data.draw(st.lists(words, min_size=count, max_size=count))
    rows = data.draw(st.lists(st.lists(words, min_size=count, max_size=count), min_size=1, max_size=3))
    drawn, file = console.table(head, rows, text=data.draw(st.integers(0, count))), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        console._print(file, drawn)
    lines = file.getvalue().splitlines()
    cells = [cell for row in (head, *rows) for cell in row]
    assert {word for cell in cells for word in cell.split()} <= set(" ".join(lines).split())
    longest = [max(len(word) for row in (head, *rows) for word in row[place].split()) for place in range(count)]
    assert max(map(len, lines)) <= max(columns or 80, sum(longest) + 3 * count - 1)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_long_path_makes_no_table_wider_than_its_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    row = ["TensorRT", f"10.3.0 is in /{'a' * 150}/dist-packages", "make the environment with its packages", "1.25"]
    drawn = console.table(["engine builder", "state", "purpose", "seconds"], [row], text=3)
    console.emit(Version(version="1"), as_json=False, render=lambda _: drawn)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns and any("1.25" in line for line in lines)
    assert {"environment", "packages", "10.3.0", "TensorRT"} <= set(" ".join(lines).split())
