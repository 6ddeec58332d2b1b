"""Choosing the next token from logits: greedy, or by temperature and top-p (nucleus sampling, Holtzman et al. 2020)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from graphs.records.errors import CheckError, InputError

Vector = np.ndarray[Any, np.dtype[Any]]
BLOCK: Final = 256  # weights summed together
NEAR: Final = 15.0  # temperatures below the largest logit: a token further down weighs less than e^-15 of the largest
FAR: Final = 20.0  # the same, where it is asked how many tokens weigh less than that
ROUNDING: Final = 1e-5  # of a float32 sum of BLOCK weights, generously
GROUP: Final = 8  # logits looked at together: their comparisons are one word
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


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
    likeliest = _largest(logits)
    dense = np.zeros(logits.size)
    if temperature == 0:
        dense[likeliest] = 1
        return dense
    tokens = _all(logits, float(logits[likeliest]), temperature)
    kept = tokens if top_p == 1 else _nucleus(tokens, top_p)
    assert kept is not None, "of all tokens a nucleus is certain"
    dense[kept.ids(np.arange(kept.weights.size))] = kept.weights
    dense /= dense.sum()
    return dense


def choose(logits: Vector, rng: np.random.Generator, *, temperature: float, top_p: float) -> int:
    """Draw one token id from logits [vocab]; at temperature 0 nothing is drawn from `rng`.

    This is done for every token, so it makes few passes over the vocabulary: it looks at the tokens near the largest
    logit first, which nearly always decide, whatever the others weigh exactly. Raises as `probabilities`.
    """
    likeliest = _largest(logits)
    if temperature == 0:
        return likeliest
    share: float | None = None
    for tokens in _candidates(logits, float(logits[likeliest]), temperature):
        possible = tokens if top_p == 1 else _nucleus(tokens, top_p)
        if possible is None:
            continue
        if possible.weights.size == 1:
            return int(possible.ids(0))
        share = rng.random() if share is None else share
        place = _draw(possible, share)
        if place is not None:
            return int(possible.ids(place))
    raise AssertionError("the last candidates are all tokens, of which one is drawn")


@dataclass(frozen=True)
class _Tokens:
    """Tokens in rising order of their ids, by their places here.

    weights: float32, softmax's numerators; the largest is 1. missing: what all other tokens together weigh at most.
    ids: a place, or an array of them, to the token's id.
    """

    weights: Vector
    missing: float
    ids: Callable[[Any], Any]


def _largest(logits: Vector) -> int:
    """The id of the largest logit, the lowest among equals. Raises CheckError if it is not a finite number."""
    likeliest = int(logits.argmax())  # the first NaN if there is one
    if not np.isfinite(logits[likeliest]):
        raise CheckError(
            f"the largest of the model's logits is {logits[likeliest]}",
            wanted="finite numbers",
            do="btp-export verify shows which graph overflows; --precision float32 may help",
        )
    return likeliest


def _candidates(logits: Vector, largest: float, temperature: float) -> Iterator[_Tokens]:
    """Tokens to choose from: those near the largest logit if they are few, the same with a closer bound, then all."""
    near = _near(logits, largest, temperature)
    if near is not None:
        yield near
        further = np.count_nonzero(logits >= _below(logits, largest, FAR * temperature))
        yield replace(near, missing=further * math.exp(-NEAR) + logits.size * math.exp(-FAR))
    yield _all(logits, largest, temperature)


def _near(logits: Vector, largest: float, temperature: float) -> _Tokens | None:
    """The tokens within NEAR temperatures of the largest logit; None if they are so many that nothing is saved."""
    if logits.size % GROUP:
        return None
    hits = (logits >= _below(logits, largest, NEAR * temperature)).view(np.uint64) != 0
    if np.count_nonzero(hits) > hits.size // 4:
        return None
    groups = np.flatnonzero(hits)
    scores = logits.reshape(-1, GROUP).take(groups, axis=0).ravel()
    return _Tokens(
        _weights(scores, largest, temperature),
        missing=logits.size * math.exp(-NEAR),
        ids=lambda places: groups[places // GROUP] * GROUP + places % GROUP,
    )


def _below(logits: Vector, largest: float, distance: float) -> Any:
    """`distance` below the largest, as one of the logits; minus infinity at a huge temperature."""
    with np.errstate(over="ignore"):
        return logits.dtype.type(largest - distance)


def _all(logits: Vector, largest: float, temperature: float) -> _Tokens:
    return _Tokens(_weights(logits, largest, temperature), missing=0.0, ids=lambda places: places)


def _weights(logits: Vector, largest: float, temperature: float) -> Vector:
    weights: Vector = logits - np.float32(largest)
    if temperature != 1:
        factor = min(max(1 / temperature, SMALLEST), LARGEST)  # never 0: minus infinity stays what it is
        with np.errstate(over="ignore"):  # a tiny temperature pushes all but the largest to minus infinity
            weights *= np.float32(factor)
    np.exp(weights, out=weights)
    return weights


def _nucleus(tokens: _Tokens, top_p: float) -> _Tokens | None:
    """The likeliest tokens whose weights first reach `top_p` of all; None if the missing ones may change which."""
    weights = tokens.weights
    total = float(_sums(weights).sum())
    wanted, at_most = top_p * total, top_p * (total + tokens.missing)
    for least in (1e-3, 1e-6, 0.0):  # nearly always a few hundred tokens do, and only those are sorted
        places = np.flatnonzero(weights >= least)
        part = weights[places].astype(np.float64)
        if part.sum() >= at_most:
            break
    ranked = np.sort(part)[::-1]
    before = np.cumsum(ranked) - ranked
    count, most = np.searchsorted(before, (wanted, at_most)).tolist()  # those before which less than that has come
    if count != most or (tokens.missing and part.sum() < at_most):
        return None
    surely = part > ranked[count - 1]
    ties = np.flatnonzero(part == ranked[count - 1])[: count - int(surely.sum())]  # the lowest ids among equals
    surely[ties] = True
    kept = tokens.ids(places[surely])
    return _Tokens(part[surely], missing=0.0, ids=lambda places: kept[places])


def _sums(weights: Vector) -> Vector:
    """float64 sums of blocks of BLOCK weights, then of the rest: faster than one sum, and exact enough."""
    whole = weights.size // BLOCK * BLOCK
    blocks = (weights[:whole].reshape(-1, BLOCK) @ np.ones(BLOCK, weights.dtype)).astype(np.float64)
    return blocks if whole == weights.size else np.append(blocks, weights[whole:].sum(dtype=np.float64))


def _draw(tokens: _Tokens, share: float) -> int | None:
    """Where the sum of the weights up to there first exceeds `share` of the whole.

    None if that depends on where the missing tokens stand and what they weigh.
    """
    weights, sums = tokens.weights, _sums(tokens.weights)
    bounds = sums.cumsum()
    total = float(bounds[-1])
    wanted = share * (total + tokens.missing)
    block = int(bounds.searchsorted(wanted, side="right"))
    if block == bounds.size:  # by rounding: the last block with weight
        block = int(np.flatnonzero(sums)[-1])
    before = float(bounds[block] - sums[block])
    inside = weights[block * BLOCK : (block + 1) * BLOCK].cumsum(dtype=np.float64)
    place = int(inside.searchsorted(wanted - before, side="right"))
    if place == inside.size:  # by rounding too: the last token with weight, never one without
        place = int(inside.searchsorted(inside[-1]))
    if tokens.missing:
        below, above = before + float(inside[place - 1] if place else 0), before + float(inside[place])
        slack = ROUNDING * total
        if below + tokens.missing + slack > share * total or above <= wanted + slack:
            return None
    return block * BLOCK + place


GREEDY = Sampling()
