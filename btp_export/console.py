"""What every command shares: results on standard output, everything else on standard error.

A command ends with one `emit(...)`. Before that it may call `note(...)` and open `progress(...)`; both write to
standard error only, so that `--json` leaves exactly one JSON document on standard output.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Protocol, TextIO, TypeVar

import typer

from graphs.records.progress import Report

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]


class Printable(Protocol):
    """A document of btp_export/results/."""

    def to_json(self) -> str:
        """The document as JSON text."""


Shown = TypeVar("Shown", bound=Printable)


class Phases:
    """Several kinds of work as one: `shares` are their parts of the whole, so the remaining time is of all of it."""

    STEPS = 1000

    def __init__(self, report: Report | None, shares: Mapping[str, float]) -> None:
        self._report, self._shares, self._all = report, shares, sum(shares.values())

    def named(self, phase: str) -> Report:
        """A report for one of the phases, with words of its own."""
        before = 0.0
        for name, share in self._shares.items():
            if name == phase:
                break
            before += share

        def report(done: int, total: int, text: str = "") -> None:
            if self._report is not None:
                part = (before + self._shares[phase] * done / max(total, 1)) / self._all
                words = phase if text in ("", phase) else f"{phase}: {text}"
                self._report(int(part * self.STEPS), self.STEPS, words)

        return report


def emit(result: Shown, *, as_json: bool, render: Callable[[Shown], Any] | None = None) -> None:
    """Print a command's result on standard output.

    With `as_json` it is exactly that document. Without, it is what `render(result)` returns (text or anything rich can
    print; None prints nothing).
    """
    if as_json:
        _stdout().write(result.to_json())
    elif render is not None and (shown := render(result)) is not None:
        _print(_stdout(), shown)
    _stdout().flush()


def note(text: str) -> None:
    """Say something on standard error."""
    _print(sys.stderr, text)


@contextmanager
def progress(title: str, total: int | None = None) -> Iterator["Bar"]:
    """A progress bar with the remaining time on standard error.

    On a terminal it is a live bar; elsewhere a line every ten seconds. The bar is a `Report` that can be passed to
    the layers below, and has `step()` for loops that own it.
    """
    bar = _LiveBar(title, total) if sys.stderr.isatty() else Bar(title, total)
    try:
        yield bar
    finally:
        bar.close()


class Bar:
    """Progress as plain lines, for logs: "title: 12 of 64, about 40 s left"."""

    INTERVAL = 10.0  # seconds between lines

    def __init__(self, title: str, total: int | None) -> None:
        self.title, self.total, self.done, self.text = title, total, 0, ""
        self._start = self._said = self._told = time.monotonic()

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """`done` of `total` steps are finished."""
        now = time.monotonic()
        if done == 0:
            self._start = now  # how long preparations took says nothing of the steps
        elif done < self.done:  # another kind of work began when the last of the former was told
            self._start = self._told
        self._told = now
        self.done, self.total, self.text = done, total, text
        self._show(now)

    def step(self, count: int = 1, text: str = "") -> None:
        """`count` more steps are finished."""
        self.done, self.text = self.done + count, text
        self._show(time.monotonic())

    def close(self) -> None:
        """Take the bar away."""

    def _show(self, now: float) -> None:
        if now - self._said < self.INTERVAL or not self.total or not self.done:
            return
        self._said = now
        left = (now - self._start) / self.done * max(self.total - self.done, 0)
        text = f" ({self.text})" if self.text else ""
        note(f"{self.title}: {self.done} of {self.total}, about {left:.0f} s left{text}")


class _LiveBar(Bar):
    """The same on a terminal, drawn by rich."""

    def __init__(self, title: str, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        super().__init__(title, total)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task(title, total=total, text="")
        self._progress.start()

    def close(self) -> None:
        self._progress.stop()

    def _show(self, now: float) -> None:
        self._progress.update(self._task, completed=self.done, total=self.total, text=self.text)


def dummy_lines(dummy_weights: bool) -> list[str]:
    """What must stand above the results of a bundle with made-up weights; nothing for any other."""
    from graphs.records.manifest import DUMMY_WEIGHTS

    return [DUMMY_WEIGHTS] if dummy_weights else []


def table(columns: list[str], rows: list[list[str]], *, title: str = "", text: int = 1) -> Any:
    """A table for `render`; the first `text` columns are left-aligned, the others (numbers) right-aligned."""
    from rich import box
    from rich.table import Table

    made = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number < text else "right")
    for row in rows:
        made.add_row(*row)
    return made


def show_lines(lines: list[str], *, prefix: str = "error: ") -> None:
    """Print an error's one to three lines on standard error, each shortened to one line of text."""
    for number, line in enumerate(lines[:3]):
        flat = " ".join(line.split())
        sys.stderr.write((prefix if number == 0 else "  ") + flat + "\n")
    sys.stderr.flush()


_saved_stdout: TextIO | None = None


@contextmanager
def stdout_for_results() -> Iterator[None]:
    """Inside, only `emit` reaches standard output; what libraries print goes to standard error."""
    global _saved_stdout
    before, _saved_stdout = _saved_stdout, sys.stdout
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout, _saved_stdout = _saved_stdout, before


def stream(text: str) -> None:
    """Write a piece of a result on standard output at once, without a line end (text as it is generated)."""
    _stdout().write(text)
    _stdout().flush()


def _stdout() -> TextIO:
    return _saved_stdout if _saved_stdout is not None else sys.stdout


def _print(file: TextIO, shown: Any) -> None:
    if isinstance(shown, str):
        file.write(shown.rstrip("\n") + "\n")
        file.flush()
        return
    from rich.console import Console, Group

    if isinstance(shown, Group):  # text beside tables is not wrapped: a path must stay in one piece
        for part in shown.renderables:
            _print(file, part)
        return
    Console(file=file, highlight=False, markup=False, emoji=False).print(shown)
