"""Calibration: measure the unpruned model on a small set, and make the balanced plan for a budget.

1. One pass of the streamed reference counts changed image tokens per layer and measures what dropping every image
   token before each layer does to the next token (calibrate/statistics.py).
2. The counts propose a few placements of the stages for the budget (calibrate/stages.py), for two bounds on the drop,
   with token counts that fall like the released ones and with flat ones.
3. A second pass runs them all on part of the set, and the one whose next-token distribution stays nearest to the full
   model's (mean KL divergence) becomes the plan. Nothing else is searched.

The plan's `calibration` record holds what all this was computed from. Same inputs, same settings, same plan.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from calibrate.budget import (
    DEFAULT_COMPRESSION,
    EXPONENTS,
    FLAT_EXPONENTS,
    LAMBDA_START,
    Shape,
    balanced_stages,
    token_budget,
)
from calibrate.records import ReferenceInput, RunRecord
from calibrate.reference import StreamedReference
from calibrate.stages import Placement, check_keeps, final_layer, is_dead, layers_for, placements
from calibrate.statistics import ChangeObserver, DropObserver, bootstrap_spread
from graphs.plan import PruningPlan

DROP_BOUNDS = (0.02, 0.1)  # nats; the stage that drops all comes where the mean divergence stays within one of them
MEASURED_SAMPLES = 24  # at most so many samples measure dropping and candidates
PLACEMENTS = 4  # candidates for each bound, and each way in which counts fall
TAU_LADDER = (0.95, 0.97, 0.98, 0.99)  # tried where the model's own threshold finds nothing

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Threshold:
    """tau and why it is what it is."""

    value: float
    reason: str


@dataclass(frozen=True)
class Measured:
    """What the first pass found: mean counts [L] at `threshold`, and the observers themselves."""

    threshold: Threshold
    counts: np.ndarray
    change: ChangeObserver
    drop: DropObserver
    full: list[RunRecord]

    @property
    def divergence(self) -> np.ndarray:
        """Mean KL in nats of the next-token distribution if all image tokens go before layer 0, 1, ...: [L]."""
        mean: np.ndarray = self.drop.divergence.mean(axis=0)
        return mean


@dataclass(frozen=True)
class Candidate:
    """A plan under consideration and how far its next-token distributions are from the full model's (mean KL, nats)."""

    plan: PruningPlan
    bound: float
    divergence: float = float("nan")
    agreement: float = float("nan")


def calibrate(
    reference: StreamedReference,
    inputs: Sequence[ReferenceInput],
    shape: Shape,
    *,
    compression: float | None = None,
    keep: Sequence[int] | None = None,
    tau: float | None = None,
    model_tau: float = 0.93,
    seed: int = 0,
    source: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> PruningPlan:
    """The balanced plan for `compression` (default 0.78) or for given counts `keep`.

    `tau` is the threshold the user asked for, `model_tau` the model's own; `source` says where the inputs came from
    and goes into the plan's record. Raises InputError for a budget that cannot be reached.
    """
    wanted = DEFAULT_COMPRESSION if compression is None else compression
    check_budget(shape, wanted, keep)
    measured = measure(reference, inputs, shape, tau=tau, model_tau=model_tau, progress=_part(progress, 0))
    notes: list[str] = []
    if is_dead(measured.counts, shape.image_tokens):
        notes.append("hardly any image token changes at this threshold: all layers were taken to change alike")
        measured = _without_signal(measured)
    candidates = propose(measured, shape, compression=wanted, keep=keep)
    candidates = judge(reference, inputs, candidates, measured, progress=_part(progress, 1))
    best = min(range(len(candidates)), key=lambda n: candidates[n].divergence)
    if not np.ptp([candidate.divergence for candidate in candidates]) > 1e-6:
        notes.append("no candidate changes the model's answers: the cheapest placement by the counts was taken")
        best = 0
    record = _record(measured, candidates, best, wanted if keep is None else None, seed, len(inputs), source, notes)
    return candidates[best].plan.model_copy(update={"calibration": record})


def check_budget(shape: Shape, compression: float | None, keep: Sequence[int] | None) -> None:
    """Raise InputError for a compression or counts that no plan of this shape can have."""
    token_budget(DEFAULT_COMPRESSION if compression is None else compression, shape.num_layers, shape.image_tokens)
    if keep is not None:
        check_keeps(keep, shape)


def measure(
    reference: StreamedReference,
    inputs: Sequence[ReferenceInput],
    shape: Shape,
    *,
    tau: float | None,
    model_tau: float,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """One unpruned pass over all inputs."""
    taus = (tau,) if tau is not None else tuple(dict.fromkeys((model_tau, *(t for t in TAU_LADDER if t > model_tau))))
    change = ChangeObserver(taus)
    drop = DropObserver(min(MEASURED_SAMPLES, len(inputs)))
    full = reference.run(inputs, shape.plan(()), observers=(change, drop), progress=progress)
    threshold = _threshold(change, tau, model_tau, shape.image_tokens)
    return Measured(threshold, change.count_matrix(threshold.value).mean(axis=0), change, drop, full)


def _threshold(change: ChangeObserver, tau: float | None, model_tau: float, image_tokens: int) -> Threshold:
    if tau is not None:
        return Threshold(tau, "given")
    for value in change.taus:
        if not is_dead(change.count_matrix(value).mean(axis=0), image_tokens):
            if value == model_tau:
                return Threshold(value, "the model's setting")
            return Threshold(value, f"raised from {model_tau}, at which hardly any image token counts as changed")
    return Threshold(model_tau, "the model's setting; no threshold up to the highest tried finds changed tokens")


def _without_signal(measured: Measured) -> Measured:
    return Measured(measured.threshold, np.zeros_like(measured.counts), measured.change, measured.drop, measured.full)


def propose(measured: Measured, shape: Shape, *, compression: float, keep: Sequence[int] | None) -> list[Candidate]:
    """Candidate plans, cheapest by the counts first; all meet the budget (or have the given counts)."""
    candidates: dict[tuple[Any, ...], Candidate] = {}
    for bound in DROP_BOUNDS:
        final = final_layer(measured.counts, measured.divergence, bound)
        if final <= 1:  # the picture does not matter to the answers: only the counts can say where it stops to
            final = final_layer(measured.counts, None, bound)
        if keep is not None:
            layers = layers_for(measured.counts, keep, final, shape, compression)
            found = [Placement(layers, tuple(keep), 0.0)]
        else:
            found = [
                placement
                for exponents in (EXPONENTS, FLAT_EXPONENTS)
                for placement in placements(
                    measured.counts, final, shape, compression, limit=PLACEMENTS, exponents=exponents
                )
            ]
        for placement in found:
            stages = balanced_stages(placement.layers, placement.keeps, shape, start=LAMBDA_START)
            candidates.setdefault(stages, Candidate(shape.plan(stages), bound))
    return list(candidates.values())


def judge(
    reference: StreamedReference,
    inputs: Sequence[ReferenceInput],
    candidates: Sequence[Candidate],
    measured: Measured,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Candidate]:
    """The candidates with their divergence and agreement, measured on the first samples in one streamed pass."""
    few = inputs[:MEASURED_SAMPLES]
    runs = reference.run(few, [candidate.plan for candidate in candidates], progress=progress)
    judged = []
    for n, candidate in enumerate(candidates):
        mine = runs[n * len(few) : (n + 1) * len(few)]
        kl = [divergence(full.logits[0], run.logits[0]) for full, run in zip(measured.full, mine, strict=False)]
        same = [full.next_tokens[0] == run.next_tokens[0] for full, run in zip(measured.full, mine, strict=False)]
        judged.append(Candidate(candidate.plan, candidate.bound, float(np.mean(kl)), float(np.mean(same))))
    return judged


def divergence(full: np.ndarray, pruned: np.ndarray) -> float:
    """KL(full || pruned) in nats between the softmax distributions of two rows of logits [vocabulary]."""
    log_p, log_q = _log_softmax(full), _log_softmax(pruned)
    return max(0.0, float(np.sum(np.exp(log_p) * (log_p - log_q))))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def _record(
    measured: Measured,
    candidates: Sequence[Candidate],
    best: int,
    compression: float | None,
    seed: int,
    samples: int,
    source: dict[str, Any] | None,
    notes: Sequence[str],
) -> dict[str, Any]:
    """What the plan was computed from; the same calibration gives the same record."""
    change, drop, tau = measured.change, measured.drop, measured.threshold
    return {
        "samples": samples,
        "source": source or {},
        "seed": seed,
        "threshold": {"value": tau.value, "reason": tau.reason},
        "changed_tokens": _rounded(change.count_matrix(tau.value).mean(axis=0)),
        "changed_tokens_spread": bootstrap_spread(change.count_matrix(tau.value), seed=seed),
        "attention_mass": _rounded(change.attention_mass().mean(axis=0)),
        "attention_top_shares": change.mean_top_shares(),
        "drop_divergence": _rounded(drop.divergence.mean(axis=0)),
        "drop_agreement": _rounded(drop.agreement.mean(axis=0)),
        "requested_compression": compression,
        "balance_start": LAMBDA_START,
        "candidates": [
            {
                "layers": [stage.layer for stage in candidate.plan.stages],
                "keep": [stage.keep for stage in candidate.plan.stages],
                "drop_bound": candidate.bound,
                "divergence": round(candidate.divergence, 6),
                "agreement": round(candidate.agreement, 6),
            }
            for candidate in candidates
        ],
        "chosen": best,
        "notes": list(notes),
        "tools": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")},
        },
    }


def _part(progress: Progress | None, part: int) -> Callable[[int, int], None] | None:
    """Progress of one of the two passes, as a part of the whole."""
    if progress is None:
        return None
    texts = ("measuring the layers", "trying placements")
    return lambda done, total: progress(part * total + done, 2 * total, texts[part])


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in values]
