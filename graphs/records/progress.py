"""How long work says where it is. The layers below the command line take these as arguments and never print."""

from collections.abc import Callable
from typing import Protocol

Note = Callable[[str], None]  # one sentence for the user, said at once

_STEPS = 1000  # a part of a whole, whatever its own length


class Report(Protocol):
    """Where long work is."""

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """`done` of `total` steps are finished; `text` says what is being done now."""


def labelled(report: Report | None, label: str) -> Report | None:
    """A report that always says `label`."""
    if report is None:
        return None

    def with_label(done: int, total: int, text: str = "") -> None:
        report(done, total, label)

    return with_label


def part_of(report: Report | None, number: int, parts: int) -> Report | None:
    """The report of part `number` of `parts` equal parts, as a report of the whole."""
    if report is None:
        return None

    def of_the_whole(done: int, total: int, text: str = "") -> None:
        report(round(_STEPS * (number + done / total)), _STEPS * parts, text)

    return of_the_whole


def silent(done: int, total: int, text: str = "") -> None:
    """A Report that tells nobody."""
