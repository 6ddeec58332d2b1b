"""How much a calibration depends on the pictures it saw: the same choice made again on bootstrap samples of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from calibrate.measure.statistics import BOOTSTRAP_SIZES, Statistics
from calibrate.place.candidates import Candidate, Evidence
from graphs.records.errors import InputError

ROUNDS = 200  # bootstrap samples of each size; placing the stages takes less than a millisecond


def stage_spread(
    statistics: Statistics,
    tau: float,
    place: Callable[[Evidence], tuple[int, ...]],
    candidates: Sequence[Candidate],
    *,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """By sample size: the stage layers that the counts place first, and whether the same candidate is chosen.

    `same`: the share of bootstrap samples that place the stages as all samples do; `low` and `high`: between which
    layers 90 % of them put each stage (of those with as many stages); `chosen_again`: the share in which the
    candidate with the least divergence is the same, of those that were judged on the most samples.
    """
    rng = np.random.default_rng(seed)
    counts = statistics.counts_at(tau)
    whole = place(Evidence(counts.mean(axis=0), statistics.divergence.mean(axis=0)))
    most = max(len(candidate.divergence) for candidate in candidates)
    finalists = [candidate for candidate in candidates if len(candidate.divergence) == most]
    divergence = np.stack([candidate.divergence for candidate in finalists])  # [finalists, samples]
    spread = {}
    for size in BOOTSTRAP_SIZES:
        placed, chosen = [], []
        for _ in range(ROUNDS):
            seen = rng.integers(len(counts), size=size)
            measured = rng.integers(len(statistics.divergence), size=size)
            judged = rng.integers(most, size=size)
            evidence = Evidence(counts[seen].mean(axis=0), statistics.divergence[measured].mean(axis=0))
            placed.append(_placed(place, evidence))
            chosen.append(int(divergence[:, judged].mean(axis=1).argmin()))
        alike = np.array([layers for layers in placed if len(layers) == len(whole)] or [whole])
        best = int(divergence.mean(axis=1).argmin())
        spread[str(size)] = {
            "same": placed.count(whole) / ROUNDS,
            "low": [int(layer) for layer in np.quantile(alike, 0.05, axis=0, method="nearest")],
            "high": [int(layer) for layer in np.quantile(alike, 0.95, axis=0, method="nearest")],
            "chosen_again": chosen.count(best) / ROUNDS,
        }
    return spread


def _placed(place: Callable[[Evidence], tuple[int, ...]], evidence: Evidence) -> tuple[int, ...]:
    try:
        return place(evidence)
    except InputError:  # the budget cannot be met with what this sample says
        return ()
