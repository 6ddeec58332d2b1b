"""Choosing the next token from logits: greedy, or by temperature and top-p (nucleus sampling, Holtzman et al. 2020)."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from graphs.records.errors import CheckError, InputError

Vector = np.ndarray[Any, np.dtype[Any]]
BLOCK: Final = 256  # weights summed together


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
    ids, weights = _possible(logits, temperature=temperature, top_p=top_p)
    dense = np.zeros(logits.size)
    dense[ids] = weights
    dense /= dense.sum()
    return dense


def choose(logits: Vector, rng: np.random.Generator, *, temperature: float, top_p: float) -> int:
    """Draw one token id from logits [vocab]; at temperature 0 nothing is drawn from `rng`.

    This is done for every token, so it makes few passes over the vocabulary. Raises as `probabilities`.
    """
    ids, weights = _possible(logits, temperature=temperature, top_p=top_p)
    if weights.size == 1:
        return int(ids.start if isinstance(ids, slice) else ids[0])
    place = _draw(weights, rng.random())
    return place if isinstance(ids, slice) else int(ids[place])


def _possible(logits: Vector, *, temperature: float, top_p: float) -> tuple[Vector | slice, Vector]:
    """The tokens that can be drawn, in rising order, and their weights, which need not sum to 1."""
    likeliest = int(logits.argmax())  # the first NaN if there is one
    largest = float(logits[likeliest])
    if not np.isfinite(largest):
        raise CheckError(
            f"the largest of the model's logits is {largest}",
            wanted="finite numbers",
            do="btp-export verify shows which graph overflows; --precision float32 may help",
        )
    if temperature == 0:
        return np.array([likeliest]), np.ones(1)
    weights: Vector = logits - np.float32(largest)
    if temperature != 1:
        with np.errstate(over="ignore"):  # a tiny temperature pushes all but the largest to minus infinity
            weights *= np.float32(min(1 / temperature, float(np.finfo(np.float32).max)))
    np.exp(weights, out=weights)
    return (slice(0, weights.size), weights) if top_p == 1 else _nucleus(weights, top_p)


def _nucleus(weights: Vector, top_p: float) -> tuple[Vector, Vector]:
    """The likeliest tokens whose weights first reach `top_p` of all, the largest of which is 1."""
    wanted = top_p * float(_sums(weights).sum())
    for least in (1e-3, 1e-6, 0.0):  # nearly always a few hundred tokens do, and only those are sorted
        ids = np.flatnonzero(weights >= least)
        part = weights[ids].astype(np.float64)
        if part.sum() >= wanted:
            break
    ranked = np.sort(part)[::-1]
    count = int(np.searchsorted(np.cumsum(ranked) - ranked, wanted))  # those before which less than that has come
    surely = part > ranked[count - 1]
    ties = np.flatnonzero(part == ranked[count - 1])[: count - int(surely.sum())]  # the lowest ids among equals
    surely[ties] = True
    return ids[surely], part[surely]


def _sums(weights: Vector) -> Vector:
    """float64 sums of blocks of BLOCK weights, then of the rest: faster than one sum, and exact enough."""
    whole = weights.size // BLOCK * BLOCK
    blocks = weights[:whole].reshape(-1, BLOCK) @ np.ones(BLOCK, weights.dtype)
    return np.append(blocks.astype(np.float64), weights[whole:].sum(dtype=np.float64))


def _draw(weights: Vector, share: float) -> int:
    """Where the sum of the weights up to there first exceeds `share` of the whole."""
    sums = _sums(weights)
    bounds = np.cumsum(sums)
    block = min(int(np.searchsorted(bounds, share * bounds[-1], side="right")), int(np.flatnonzero(sums)[-1]))
    inside = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    rest = share * bounds[-1] - (bounds[block] - sums[block])
    # The last token with weight ends the range, so that rounding in the sum can never choose a token without weight.
    last = int(np.searchsorted(inside, inside[-1]))
    return block * BLOCK + min(int(np.searchsorted(inside, rest, side="right")), last)


GREEDY = Sampling()
