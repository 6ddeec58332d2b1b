"""Choosing the next token from logits: greedy, or by temperature and top-p (nucleus sampling, Holtzman et al. 2020)."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from graphs.records.errors import CheckError, InputError

Vector = np.ndarray[Any, np.dtype[Any]]


def check_settings(temperature: float, top_p: float, seed: int = 0) -> None:
    """Raise InputError unless temperature >= 0, 0 < top_p <= 1 and seed >= 0."""
    if seed < 0:
        raise InputError(f"seed {seed}", wanted="0 or a positive number", do="--seed 0")
    if not (np.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature {temperature}", wanted="0 (greedy) or a positive number", do="--temperature 0.7")
    if not 0 < top_p <= 1:
        raise InputError(f"top-p {top_p}", wanted="a number above 0 and up to 1", do="--top-p 0.9")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits. Raises InputError as `check_settings`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self.temperature, self.top_p, self.seed)

    def choose(self, logits: Vector, rng: np.random.Generator) -> int:
        """One token id from logits [vocab]."""
        return choose(logits, rng, temperature=self.temperature, top_p=self.top_p)


def probabilities(logits: Vector, *, temperature: float, top_p: float) -> Vector:
    """What each of the vocab tokens is drawn with, float64 [vocab], sums to 1.

    Temperature 0 puts everything on the largest logit, the lowest id among equals. Otherwise softmax(logits /
    temperature), cut to the most probable tokens whose sum first reaches `top_p` and scaled to 1 again.

    Raises CheckError if a logit is NaN or all are minus infinity: the model's numbers overflowed.
    """
    largest = float(logits.max())
    if not np.isfinite(largest):
        raise CheckError(
            f"the largest of the model's logits is {largest}",
            wanted="finite numbers",
            do="btp-export verify shows which graph overflows; --precision float32 may help",
        )
    if temperature == 0:
        certain = np.zeros(logits.size)
        certain[logits.argmax()] = 1
        return certain
    with np.errstate(over="ignore"):  # a tiny temperature pushes all but the largest to minus infinity, as it should
        weights: Vector = np.exp((logits.astype(np.float64) - largest) / temperature)
    weights /= weights.sum()
    if top_p < 1:
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[before >= top_p]] = 0
        weights /= weights.sum()
    return weights


def choose(logits: Vector, rng: np.random.Generator, *, temperature: float, top_p: float) -> int:
    """Draw one token id from logits [vocab]; at temperature 0 nothing is drawn from `rng`."""
    weights = probabilities(logits, temperature=temperature, top_p=top_p)
    if temperature == 0:
        return int(weights.argmax())
    # The last token with weight ends the range, so that rounding in the sum can never choose a token without weight.
    bounds = np.cumsum(weights)
    return int(min(np.searchsorted(bounds, rng.random(), side="right"), np.flatnonzero(weights)[-1]))


GREEDY = Sampling()
