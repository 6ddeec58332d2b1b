"""A profile's rows and its main numbers in words, for the console, the plot and the report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from btp_export.results.profile import Profile, ProfiledPart

ALL = "prefill all"  # the row of the whole prefill: segments and selections


@dataclass(frozen=True)
class Row:
    """One part, or the prefill in all. `full_ms`: the same without pruning, None where there is no such part."""

    name: str
    kind: str
    bound: str
    tokens: int | None
    flops: int
    nbytes: int
    ms: float
    floor_ms: float
    full_ms: float | None

    @property
    def share(self) -> float | None:
        """The least time as a share of the measured one."""
        return self.floor_ms / self.ms if self.ms else None


def part_rows(profile: Profile) -> list[Row]:
    """All parts in running order; behind the last segment the prefill in all, which is what pruning makes shorter.

    A segment is only set beside an unpruned one of the same layers.
    """
    full = profile.unpruned.parts if profile.unpruned else ()
    same = {(part.name, part.layers): part.ms for part in full}
    rows = [_row(part, same.get((part.name, part.layers))) for part in profile.parts]
    chain = [row for row in rows if row.kind in ("prefill", "select")]
    if len(chain) > 1:
        whole = math.fsum(part.ms for part in full if part.kind == "prefill") if full else None
        rows.insert(rows.index(chain[-1]) + 1, _sum(chain, whole))
    return rows


def _row(part: ProfiledPart, full_ms: float | None) -> Row:
    return Row(
        part.name,
        part.kind,
        part.bound,
        part.tokens,
        part.flops,
        part.bytes,
        part.ms,
        part.floor_ms,
        full_ms,
    )


def _sum(rows: Sequence[Row], full_ms: float | None) -> Row:
    return Row(
        ALL,
        "prefill",
        "",
        None,
        sum(row.flops for row in rows),
        sum(row.nbytes for row in rows),
        math.fsum(row.ms for row in rows),
        math.fsum(row.floor_ms for row in rows),
        full_ms,
    )


def summary_lines(profile: Profile) -> list[str]:
    """First token, decoding, the share of selection, and how much faster than without pruning."""
    totals, speedup = profile.totals, profile.speedup
    lines = [f"first token {totals.first_token_ms:.2f} ms, each further {totals.decode_ms:.2f} ms"]
    if totals.select_share is not None:
        lines.append(f"selection takes {totals.select_share:.1%} of the prefill")
    if speedup is not None:
        pairs = [f"{name.replace('_', ' ')} {value:.2f} x" for name, value in speedup if value is not None]
        lines.append(f"faster than without pruning: {', '.join(pairs)}")
    return lines


def break_even_line(profile: Profile) -> str:
    """From how many image tokens pruning pays, or why that cannot be said."""
    even = profile.break_even
    if even.image_tokens is None:
        text = f"break-even cannot be stated: {even.reason}"
    else:
        beyond = ", outside what was measured" if even.extrapolated else ""
        text = f"pruning pays in prefill from about {even.image_tokens} image tokens on{beyond}"
    if even.saved_ms is not None:
        text += f"; with {profile.image_tokens} it saves {even.saved_ms:.2f} ms"
    if even.after_new_tokens:
        text += f", made up for after {even.after_new_tokens} new tokens"
    return text


def layer_line(profile: Profile) -> str:
    """How the time of a layer goes with its tokens, "" where it was not measured."""
    even = profile.break_even
    flat = None if even.floor_ms_per_layer is None else f"{even.floor_ms_per_layer:.3g} ms"
    slope = None if even.ms_per_token_and_layer is None else f"{even.ms_per_token_and_layer * 1000:.3g} us a token"
    if flat and slope and even.corner_tokens is not None:
        return f"a layer takes {flat} up to about {even.corner_tokens:.0f} tokens, then {slope}"
    if slope:
        return f"a layer takes {slope} at all measured lengths; what few tokens take was not measured"
    return f"a layer takes {flat} at all measured lengths: its weights' bytes set the time" if flat else ""
