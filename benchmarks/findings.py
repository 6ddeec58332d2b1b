"""What a benchmark of `python -m benchmarks` finds: numbers, each with its limit, or why there is none."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from btp_export.measuring.bench import speedup_interval
from graphs.records.errors import BtpError


@dataclass(frozen=True)
class Wishes:
    """How much is measured. `quick`: tiny models, to try the programs; their times say nothing.

    threads: of every program. rounds: turns of each. folder: where models are made, several GB. part: of a benchmark
    that has several models, only those whose name holds it.
    """

    folder: Path
    threads: int
    rounds: int = 5
    quick: bool = False
    part: str = ""
    note: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Row:
    """One number. limit: what it should be at most, or at least with `more_is_better`; None where there is none.

    detail: the times a ratio was made of, and between what numbers the ratio lies. missing: why there is no number.
    rounds: turns of each program that were asked for. load: of the machine in the minute before, the measurement's own
    included.
    """

    what: str
    value: float | None
    unit: str
    limit: float | None = None
    limit_from: str = ""
    more_is_better: bool = False
    detail: str = ""
    missing: str = ""
    rounds: int | None = None
    load: float | None = None

    @property
    def holds(self) -> bool | None:
        """Whether the limit is kept; None where there is no limit or no number."""
        if self.value is None or self.limit is None:
            return None
        return self.value >= self.limit if self.more_is_better else self.value <= self.limit


class NotHere(Exception):
    """This machine cannot run the benchmark; the text says what is missing."""


def skipped(what: str, error: Exception | str) -> Row:
    """A row without a number, and why."""
    told = isinstance(error, (BtpError, NotHere, str))  # by us; of other errors the last line says the most
    text = str(error) if told else f"{type(error).__name__}: {''.join(str(error).strip().splitlines()[-1:])}"
    return Row(what, None, "", missing=" ".join(text.split()))


def ratio(what: str, ours: Sequence[float], other: Sequence[float], *, unit: str, limit: float, why: str) -> Row:
    """Our time as a multiple of another's, of times measured in turns."""
    value = median(ours) / median(other)
    interval = speedup_interval(ours, other)
    within = "" if interval is None else f", {interval[0]:.2f} to {interval[1]:.2f}"
    detail = f"{number(median(ours))} {unit} against {number(median(other))} {unit}{within}"
    return Row(what, value, "x", limit, why, detail=detail)


def number(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def markdown(found: Iterable[tuple[str, Row]]) -> str:
    """Rows of several benchmarks as one table."""
    columns = ("benchmark", "what", "measured", "limit", "where the limit comes from", "", "rounds", "load")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(_cells(name, row))} |" for name, row in found)])


def _cells(name: str, row: Row) -> Iterator[str]:
    yield name
    yield row.what
    yield f"skipped: {row.missing}" if row.value is None else f"{number(row.value)} {row.unit}".strip()
    bound = "at least" if row.more_is_better else "at most"
    yield "" if row.limit is None else f"{bound} {number(row.limit)} {row.unit}".strip()
    yield row.limit_from
    yield row.detail + {True: "", False: " **missed**", None: ""}[row.holds]
    yield "" if row.rounds is None else str(row.rounds)
    yield "" if row.load is None else f"{row.load:.1f}"


def document(found: Iterable[tuple[str, Row]]) -> list[dict[str, Any]]:
    """The same for JSON."""
    return [{"benchmark": name, **vars(row), "holds": row.holds} for name, row in found]
