"""What a plan costs: its prefill as a share of the unpruned model's, in operations or in measured time.

The cost of a plan is

    fixed + decoder_rate * operations of the decoder + selection_rate * operations of the selections

with the operations of graphs/pruning/operations.py. In operations alone (0, 1, 1) this counts the arithmetic. The three
numbers fitted to a measurement make it milliseconds: `fixed` is what a prefill takes whatever its length (launches,
reading the weights), the rates are the machine's. Two lengths determine them; with more they are a least-squares fit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
        found = operations.cost(self.decoder, plan, self.profile)
        decoder, selection = found.decoder / self.profile.batch, sum(found.selection) / self.profile.batch
        return self.fixed + self.decoder_rate * decoder + self.selection_rate * selection

    def share(self, plan: PruningPlan) -> float:
        """The cost as a share of the unpruned model's."""
        return self.of(plan) / self.of(plan.without_stages())

    def summary(self) -> dict[str, Any]:
        """As a plan's record holds it."""
        fitted = {"fixed": self.fixed, "decoder_rate": self.decoder_rate, "selection_rate": self.selection_rate}
        return {"unit": self.unit, "source": self.source, **({} if self.unit == "operations" else fitted)}


def measured_cost(path: Path, decoder: DecoderSpec, profile: ShapeProfile) -> PrefillCost:
    """The cost in milliseconds from the document of `btp-export bench --json` or `btp-export profile --json`.

    Raises InputError for another file, for a measurement of another model or shape, and for times from which no cost
    per token follows (a pruned prefill that was not faster).
    """
    document = _read(path)
    try:
        parts = "parts" in document
        return (_from_profile if parts else _from_bench)(document, path, decoder, profile)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"{path} holds no prefill times with their operations",
            wanted="what `btp-export bench --json` or `btp-export profile --json` printed",
            do="btp-export bench BUNDLE --json > bench.json",
        ) from error


def _read(path: Path) -> Mapping[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read {path}: {error}", wanted="the JSON document of a bench or profile", do="--latency-from FILE"
        ) from error
    if not isinstance(document, dict):
        raise InputError(f"{path} holds a {type(document).__name__}", wanted="a JSON object", do="--latency-from FILE")
    return document


def _from_bench(document: Mapping[str, Any], path: Path, decoder: DecoderSpec, profile: ShapeProfile) -> PrefillCost:
    """Two lengths: the unpruned prefill, and the pruned one without its selections."""
    if isinstance(document.get("bench"), dict):  # the document of the whole job
        document = document["bench"]
    prefill, operations, batch = document["prefill"], document["flops"], int(document["batch"])
    select_ms, select_work = sum(map(float, document["select_ms"])), float(operations["selection"]) / batch
    work = [float(operations[name]) / batch for name in ("full", "pruned")]
    times = [float(prefill["full_ms"]) / batch, (float(prefill["pruned_ms"]) - select_ms) / batch]
    _check_same(work[0], path, decoder, profile)
    fixed, rate = fit_line(work, times)
    if rate <= 0:
        raise InputError(
            f"{path}: pruned prefill {times[1]:.3g} ms without its selections, the whole one {times[0]:.3g} ms",
            wanted="a measurement in which fewer operations take less time",
            do="measure again on a quiet machine, or leave --latency-from out",
        )
    return PrefillCost(
        decoder,
        profile,
        fixed=fixed,
        decoder_rate=rate,
        selection_rate=select_ms / batch / select_work if select_work else rate,
        unit="milliseconds",
        source=f"measured: {document.get('device', 'cpu')}, {document['precision']}, batch {batch}",
    )


def _from_profile(document: Mapping[str, Any], path: Path, decoder: DecoderSpec, profile: ShapeProfile) -> PrefillCost:
    """Every prefill part is some layers at one length: a line through their times for one layer."""
    batch = int(document["batch"])
    parts = [*document["parts"], *((document.get("unpruned") or {}).get("parts") or ())]
    segments = [part for part in parts if part["kind"] == "prefill"]
    layers = [int(part["layers"][1]) - int(part["layers"][0]) for part in segments]
    if (
        int(document["image_tokens"]) != profile.image_tokens
        or max((part["layers"][1] for part in segments), default=decoder.num_layers) != decoder.num_layers
    ):
        raise InputError(
            f"{path} measures {document['image_tokens']} image tokens",
            wanted=f"{profile.image_tokens} through {decoder.num_layers} layers",
            do="profile a bundle of the same model and image size",
        )
    if len({int(part["tokens"]) for part in segments}) < 2:
        raise InputError(
            f"{path} measures prefills of {len(segments)} parts, of one length only",
            wanted="segments of different lengths: engines of a pruned bundle, not assembled whole",
            do="btp-export build BUNDLE --assemble segments --unpruned, then profile",
        )
    work = [float(operations.layer(decoder, int(part["tokens"]))) for part in segments]
    times = [float(part["ms"]) / count / batch for part, count in zip(segments, layers, strict=True)]
    fixed, rate = fit_line(work, times)
    if rate <= 0:
        raise InputError(
            f"{path}: shorter segments take no less time", wanted="a steady measurement", do="measure again"
        )
    heads = [float(part["ms"]) / batch for part in parts if part["kind"] == "head"]
    head = max(0.0, sum(heads) / len(heads) - rate * 2 * decoder.hidden_size * decoder.vocab_size) if heads else 0.0
    selects = [part for part in document["parts"] if part["kind"] == "select"]
    select_work = sum(float(part["flops"]) for part in selects)
    return PrefillCost(
        decoder,
        profile,
        fixed=decoder.num_layers * fixed + head,
        decoder_rate=rate,
        selection_rate=sum(float(part["ms"]) for part in selects) / select_work if select_work else rate,
        unit="milliseconds",
        source=f"measured: {document['target']}, {document['precision']}, batch {batch}",
    )


def fit_line(work: Sequence[float], times: Sequence[float]) -> tuple[float, float]:
    """times ~ fixed + rate * work by least squares, with fixed >= 0: (fixed, rate)."""
    x, y = np.asarray(work, dtype=np.float64), np.asarray(times, dtype=np.float64)
    rate = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    fixed = float(y.mean() - rate * x.mean())
    if fixed >= 0:
        return fixed, rate
    return 0.0, float((x * y).sum() / (x * x).sum())


def _check_same(full: float, path: Path, decoder: DecoderSpec, profile: ShapeProfile) -> None:
    shape = Shape("any", decoder.num_layers, profile.image_tokens, profile.grid, profile.blocks)
    mine = operations.cost(decoder, shape.unpruned, profile).decoder / profile.batch
    if not mine / _SAME <= full <= mine * _SAME:
        raise InputError(
            f"{path} measures a prefill of {full:.3g} operations",
            wanted=f"about {mine:.3g}, as this model takes with {profile.image_tokens} image tokens",
            do="measure a bundle of the same model and image size",
        )
