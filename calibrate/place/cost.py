"""What a plan costs: its prefill as a share of the unpruned model's, in operations or in measured time.

The cost of a plan is

    fixed + decoder_rate * operations of the decoder + selection_rate * operations of the selections

with the operations of graphs/pruning/operations.py. In operations alone (0, 1, 1) this counts the arithmetic. The three
numbers fitted to a measurement make it milliseconds: `fixed` is what a prefill takes whatever its length (launches,
reading the weights), the rates are the machine's. Two lengths determine them; with more they are a least-squares fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibrate.place.counts import Shape
from graphs.pruning import operations
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import DecoderSpec

# No selection takes as few operations beside the whole prefill: scores alone of a 7B are six times as many.
_LEAST_SELECTION = 1e-7
_SAME = 1.5  # a measurement whose unpruned operations differ by more than this factor is of another model or shape


@dataclass(frozen=True)
class PrefillCost:
    """The cost of a plan's prefill for one sample, by the formula above."""

    decoder: DecoderSpec
    profile: ShapeProfile
    fixed: float = 0.0
    decoder_rate: float = 1.0
    selection_rate: float = 1.0
    unit: str = "operations"
    source: str = "operations in matrix products"

    def of(self, plan: PruningPlan) -> float:
        """The cost in `unit`."""
        work = operations.cost(self.decoder, plan, self.profile)
        decoder, selection = work.decoder / self.profile.batch, sum(work.selection) / self.profile.batch
        return self.fixed + self.decoder_rate * decoder + self.selection_rate * selection

    def share(self, plan: PruningPlan) -> float:
        """The cost as a share of the unpruned model's."""
        return self.of(plan) / self.of(plan.without_stages())

    def summary(self) -> dict[str, Any]:
        """As a plan's record holds it."""
        fitted = {"fixed": self.fixed, "decoder_rate": self.decoder_rate, "selection_rate": self.selection_rate}
        return {"unit": self.unit, "source": self.source, **({} if self.unit == "operations" else fitted)}


@dataclass(frozen=True)
class MeasuredPrefills:
    """Prefills of a batch without and with pruning, as `btp-export bench` times them: milliseconds and operations."""

    full_ms: float
    pruned_ms: float  # selections included
    select_ms: float
    full: float  # operations in matrix products
    pruned: float  # without the selections'
    selection: float
    batch: int
    machine: str  # what measured, for the plan's record


@dataclass(frozen=True)
class MeasuredSegment:
    """Decoder layers [start, stop) on `tokens` tokens of each sample: milliseconds of a batch."""

    start: int
    stop: int
    tokens: int
    ms: float


@dataclass(frozen=True)
class MeasuredParts:
    """The parts of a prefill, as `btp-export profile` times them, of a batch."""

    segments: Sequence[MeasuredSegment]  # pruned, and unpruned ones if there are any
    head_ms: Sequence[float]
    select_ms: float
    selection: float  # operations in matrix products
    image_tokens: int
    batch: int
    machine: str


def measured_cost(
    measured: MeasuredPrefills | MeasuredParts, source: Path | str, decoder: DecoderSpec, profile: ShapeProfile
) -> PrefillCost:
    """The cost in milliseconds from a measurement; `source` names it in errors.

    Raises InputError for a measurement of another model or shape, and for times from which no cost per token follows
    (a pruned prefill that was not faster).
    """
    if isinstance(measured, MeasuredPrefills):
        return _from_prefills(measured, source, decoder, profile)
    return _from_parts(measured, source, decoder, profile)


def _from_prefills(
    measured: MeasuredPrefills, source: Path | str, decoder: DecoderSpec, profile: ShapeProfile
) -> PrefillCost:
    """Two lengths: the unpruned prefill, and the pruned one without its selections."""
    batch = measured.batch
    work = [measured.full / batch, measured.pruned / batch]
    times = [measured.full_ms / batch, (measured.pruned_ms - measured.select_ms) / batch]
    _check_same(work[0], source, decoder, profile)
    if work[0] == work[1]:
        raise InputError(
            f"{source} measures a bundle that prunes nothing",
            wanted="prefills of two lengths",
            do="measure a pruned bundle, or leave --latency-from out",
        )
    fixed, rate = fit_line(work, times)
    if rate <= 0:
        raise InputError(
            f"{source}: pruned prefill {times[1]:.3g} ms without its selections, the whole one {times[0]:.3g} ms",
            wanted="a measurement in which fewer operations take less time",
            do="measure again on a quiet machine, or leave --latency-from out",
        )
    return PrefillCost(
        decoder,
        profile,
        fixed=fixed,
        decoder_rate=rate,
        selection_rate=_selection_rate(measured, rate, source, decoder, profile),
        unit="milliseconds",
        source=f"measured: {measured.machine}, batch {batch}",
    )


def _from_parts(
    measured: MeasuredParts, source: Path | str, decoder: DecoderSpec, profile: ShapeProfile
) -> PrefillCost:
    """Every prefill part is some layers at one length: a line through their times for one layer."""
    segments, batch = measured.segments, measured.batch
    last = max((segment.stop for segment in segments), default=decoder.num_layers)
    if measured.image_tokens != profile.image_tokens or last != decoder.num_layers:
        raise InputError(
            f"{source} measures {measured.image_tokens} image tokens",
            wanted=f"{profile.image_tokens} through {decoder.num_layers} layers",
            do="profile a bundle of the same model and image size",
        )
    if len({segment.tokens for segment in segments}) < 2:
        raise InputError(
            f"{source} measures prefills of {len(segments)} parts, of one length only",
            wanted="segments of different lengths: engines of a pruned bundle, not assembled whole",
            do="btp-export build BUNDLE --assemble segments --unpruned, then profile",
        )
    work = [float(operations.layer(decoder, segment.tokens)) for segment in segments]
    fixed, rate = fit_line(work, [segment.ms / (segment.stop - segment.start) / batch for segment in segments])
    if rate <= 0:
        raise InputError(
            f"{source}: shorter segments take no less time", wanted="a steady measurement", do="measure again"
        )
    heads = [ms / batch for ms in measured.head_ms]
    head = max(0.0, sum(heads) / len(heads) - rate * 2 * decoder.hidden_size * decoder.vocab_size) if heads else 0.0
    return PrefillCost(
        decoder,
        profile,
        fixed=decoder.num_layers * fixed + head,
        decoder_rate=rate,
        selection_rate=_selection_rate(measured, rate, source, decoder, profile),
        unit="milliseconds",
        source=f"measured: {measured.machine}, batch {batch}",
    )


def _selection_rate(
    measured: MeasuredPrefills | MeasuredParts, rate: float, source: Path | str, decoder: DecoderSpec,
    profile: ShapeProfile,
) -> float:  # fmt: skip
    """Milliseconds an operation of the selections; the decoder's where a measurement has none."""
    if not measured.selection:
        return rate
    least = _LEAST_SELECTION * _unpruned(decoder, profile) * measured.batch
    if measured.selection < least:
        raise InputError(
            f"{source} measures selections of {measured.selection:.3g} operations",
            wanted=f"at least {least:.3g}, which scores alone take, or 0",
            do="measure again, or leave --latency-from out",
        )
    return measured.select_ms / measured.selection


def fit_line(work: Sequence[float], times: Sequence[float]) -> tuple[float, float]:
    """times ~ fixed + rate * work by least squares, with fixed >= 0: (fixed, rate)."""
    x, y = np.asarray(work, dtype=np.float64), np.asarray(times, dtype=np.float64)
    rate = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    fixed = float(y.mean() - rate * x.mean())
    if fixed >= 0:
        return fixed, rate
    return 0.0, float((x * y).sum() / (x * x).sum())


def _check_same(full: float, source: Path | str, decoder: DecoderSpec, profile: ShapeProfile) -> None:
    expected = _unpruned(decoder, profile)
    if not expected / _SAME <= full <= expected * _SAME:
        raise InputError(
            f"{source} measures a prefill of {full:.3g} operations",
            wanted=f"about {expected:.3g}, as this model takes with {profile.image_tokens} image tokens",
            do="measure a bundle of the same model and image size",
        )


def _unpruned(decoder: DecoderSpec, profile: ShapeProfile) -> float:
    """Operations of one sample's prefill without pruning."""
    shape = Shape("any", decoder.num_layers, profile.image_tokens, profile.grid, profile.blocks)
    return operations.cost(decoder, shape.unpruned, profile).decoder / profile.batch
