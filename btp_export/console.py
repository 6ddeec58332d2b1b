"""What every command shares: results on standard output, everything else on standard error.

A command ends with one `emit(...)`. Before that it may call `note(...)` and open `progress(...)`; both write to
standard error only. While a command runs, what libraries print goes there too, so that `--json` leaves exactly one JSON
document on standard output. All text passes graphs/records/printable.py on its way.
"""

import codecs
import ctypes
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TextIO, TypeVar

import typer

from graphs.records.errors import InputError
from graphs.records.printable import json_safe, one_line, printable
from graphs.records.progress import Report

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]


class Printable(Protocol):
    """A document of btp_export/results/."""

    def to_json(self) -> str:
        """The document as JSON text."""


Shown = TypeVar("Shown", bound=Printable)
WORD = 20  # characters of text to which a column may be narrowed


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
    shown = _json(result) if as_json else render(result) if render is not None else None
    if shown is not None:
        _print(_stdout(), shown)


def _json(result: Printable) -> str:
    """One document, in ASCII where the reader's encoding, or a file name that is no text, demands it."""
    document = result.to_json()
    try:
        document.encode(getattr(_stdout(), "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json_safe(document, ascii_only=True)
    return json_safe(document)


def note(text: str) -> None:
    """Print a line on standard error."""
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
        self._start = self._last_line = self._last_report = time.monotonic()

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """`done` of `total` steps are finished."""
        now = time.monotonic()
        if done == 0:
            self._start = now  # how long preparations took says nothing of the steps
        elif done < self.done:  # another kind of work began when the last step of the former was reported
            self._start = self._last_report
        self._last_report = now
        self.done, self.total, self.text = done, total, text
        self._show(now)

    def step(self, count: int = 1, text: str = "") -> None:
        """`count` more steps are finished."""
        self.done, self.text = self.done + count, text
        self._show(time.monotonic())

    def close(self) -> None:
        """Take the bar away."""

    def _show(self, now: float) -> None:
        if now - self._last_line < self.INTERVAL or not self.total or not self.done:
            return
        self._last_line = now
        left = (now - self._start) / self.done * max(self.total - self.done, 0)
        text = f" ({self.text})" if self.text else ""
        note(one_line(f"{self.title}: {self.done} of {self.total}, about {left:.0f} s left{text}"))


class _LiveBar(Bar):
    """The same on a terminal, drawn by rich."""

    def __init__(self, title: str, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        super().__init__(title, total)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task(title, total=total, text="")
        self._progress.start()

    def close(self) -> None:
        self._progress.stop()

    def _show(self, now: float) -> None:
        self._progress.update(self._task, completed=self.done, total=self.total, text=printable(self.text)[:80])


def dummy_lines(dummy_weights: bool) -> list[str]:
    """What must stand above the results of a bundle with made-up weights; nothing for any other."""
    from graphs.records.manifest import DUMMY_WEIGHTS

    return [DUMMY_WEIGHTS] if dummy_weights else []


def table(columns: list[str], rows: list[list[str]], *, title: str = "", text: int = 1) -> Any:
    """A table for `render`; the first `text` columns are left-aligned, the others (numbers) right-aligned."""
    from rich import box
    from rich.table import Table

    shown = Table(title=printable(title) or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        shown.add_column(column, justify="left" if number < text else "right")
    for row in rows:
        shown.add_row(*map(printable, row))
    return shown


def show_lines(lines: list[str], *, prefix: str = "error: ") -> None:
    """Print an error's one to three lines on standard error, each shortened to one line of text."""
    for number, line in enumerate(lines[:3]):
        note((prefix if number == 0 else "  ") + one_line(line))


_results: TextIO | None = None  # where results go while standard output leads to standard error


@contextmanager
def stdout_for_results() -> Iterator[None]:
    """Inside, only results reach standard output; what libraries print, in Python or C, goes to standard error.

    There it loses its control characters as everything does: tokenizers print keys of their files.
    Raises InputError if standard output is closed, before the work whose result it would take.
    """
    global _results
    if sys.stdout is None:
        raise InputError(
            "standard output is closed", wanted="a terminal, file or pipe for the result", do="add > /dev/null"
        )
    before, stdout = _results, sys.stdout
    saved = os.dup(1)
    _results = _reopened(stdout, saved)
    stdout.flush()
    try:
        with _printable_stderr() as descriptor:
            os.dup2(descriptor, 1)
            sys.stdout = _PrintableStderr()
            try:
                yield
            finally:
                ctypes.CDLL(None).fflush(None)  # what C libraries have printed and hold back
                os.dup2(saved, 1)
    finally:
        sys.stdout, results, _results = stdout, _results, before
        if results is not stdout:
            with suppress(OSError):  # what could not be written has been reported
                results.close()  # and `saved` with it
        else:
            os.close(saved)


class _PrintableStderr(io.TextIOBase):
    """Standard error for Python's prints."""

    def write(self, text: str) -> int:
        _write(sys.stderr, printable(text))
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


@contextmanager
def _printable_stderr() -> Iterator[int]:
    """A descriptor for what C libraries print: a thread takes it to standard error without control characters."""
    reader, writer = os.pipe()
    thread = threading.Thread(target=_copy_printable, args=(reader,), daemon=True)
    thread.start()
    try:
        yield writer
    finally:
        os.close(writer)
        thread.join(1.0)  # a child that still has the other end goes on printing


def _copy_printable(reader: int) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with open(reader, "rb", buffering=0) as source:
        while data := source.read(65536):
            with suppress(OSError):  # closed: there is nowhere left to report it
                os.write(2, printable(decoder.decode(data)).encode())


def _reopened(stdout: TextIO, descriptor: int) -> TextIO:
    """Standard output by another descriptor; as it is where Python's does not lead to the process's (in tests)."""
    try:
        own = stdout.fileno() == 1
    except (OSError, ValueError):
        own = False
    if not own:
        return stdout
    return open(descriptor, "w", encoding=stdout.encoding, errors="backslashreplace")


def stream(text: str) -> None:
    """Write a piece of a result on standard output at once, without a line end (text as it is generated)."""
    _write(_stdout(), printable(text))


def _stdout() -> TextIO:
    return _results if _results is not None else sys.stdout


def _drawn(console: "Console", shown: Any) -> str:
    with console.capture() as lines:
        console.print(shown)
    return lines.get()


def _is_cut(shown: "Table", lines: str) -> bool:
    """Whether a number or a word of a table is not in its lines."""
    cells = [str(cell) for column in shown.columns for cell in (column.header, *column.cells)]
    words = {word for cell in cells for word in cell.split()}
    return not {word for word in words if len(word) <= WORD} <= set(lines.split())


def _fit(shown: "Table", width: int) -> int:
    """Give a table's columns the room that their numbers and words need; the columns of a terminal that this takes.

    rich narrows the widest column first and cuts its numbers off, which leaves no result. Of words longer than WORD,
    such as paths, the beginning is shown. A terminal that is narrower still wraps the lines itself.
    """
    cells = [[str(cell) for cell in (column.header, *column.cells)] for column in shown.columns]
    longest = [max((len(word) for cell in own for word in cell.split()), default=0) for own in cells]
    numbers = [column.justify == "right" for column in shown.columns]
    least = [size if number else min(size, WORD) for size, number in zip(longest, numbers, strict=True)]
    most = [max(map(len, own)) for own in cells]
    spare = width - sum(least) - 3 * len(least) + 1  # two spaces around each, one between two
    for column, size, whole in zip(shown.columns, least, most, strict=True):
        column.width = size + max(0, min(whole - size, spare))
        spare -= column.width - size
    return max(width, width - spare)


def _print(file: TextIO, shown: Any) -> None:
    if isinstance(shown, str):
        _write(file, printable(shown).rstrip("\n") + "\n")
        return
    from rich.console import Console, Group
    from rich.table import Table

    if isinstance(shown, Group):  # text beside tables is not wrapped: a path must stay in one piece
        for part in shown.renderables:
            _print(file, part)
        return
    drawn = Console(file=file, highlight=False, markup=False, emoji=False)
    lines = _drawn(drawn, shown)
    if isinstance(shown, Table) and _is_cut(shown, lines):
        drawn.width = _fit(shown, drawn.width)
        lines = _drawn(drawn, shown)
    _write(file, lines)


def _write(file: TextIO, text: str) -> None:
    """Write and flush. Raises InputError, except for a pipe that nobody reads, which cli.main treats by itself."""
    try:
        file.write(text)
        file.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        if file is sys.stderr:
            return  # there is nowhere left to report it
        raise InputError(f"standard output: {error.strerror}", do="give it more space, or another file") from error
