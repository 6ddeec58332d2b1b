"""Choosing the next token from logits: greedy, or by temperature and top-p (nucleus sampling, Holtzman et al. 2020).

Tokens weigh whole numbers: trunc(2^30 x 2^y) with y = (logit - largest) x log2(e) / temperature, at least -31. Powers
are those of a polynomial whose products and sums are each rounded once, and sums of the weights are exact in any order.
So the same logits and seed give the same token on every machine, by btp_host (engines/native/host_library.cc) or numpy.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from engines.native.host import HostLibrary, host_library
from graphs.records.errors import CheckError, InputError

Vector = np.ndarray[Any, np.dtype[Any]]
BLOCK: Final = 256  # weights summed together
PIECE: Final = 2**14  # logits weighed together, which the processor keeps at hand from one operation to the next
NEAR: Final = 15.0  # temperatures below the largest logit: a token further down weighs less than e^-15 of the largest
FAR: Final = 20.0  # the same, where it is asked how many tokens weigh less than that
GROUP: Final = 8  # logits looked at together: their comparisons are one word
LEVELS: Final = (2**20, 2**10, 1)  # a nucleus is looked for among tokens of these weights: nearly always few do
LARGEST_WEIGHT: Final = 2**30
# 2^30 x 2^f for f from -1/2 to 1/2, within 2e-7 of it: factors of f^5 to f^0.
POWERS: Final = tuple(
    np.float32(float.fromhex(text))
    for text in ("0x1.5bba14p+20", "0x1.3cea88p+23", "0x1.c6b752p+25", "0x1.ebf9bcp+27", "0x1.62e42ap+29", "0x1p+30")
)
LOG2_E: Final = math.log2(math.e)
ROUNDED: Final = np.float32(1.5 * 2**23)  # added to a number, its last bits are the number rounded to a whole one
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
        return choose(logits, rng, temperature=self.temperature, top_p=self.top_p, library=host_library())


def probabilities(logits: Vector, *, temperature: float, top_p: float) -> Vector:
    """What each of the vocab tokens is drawn with, float64 [vocab], sums to 1.

    Temperature 0 puts everything on the largest logit, the lowest id among equals. Otherwise softmax(logits /
    temperature), tokens of less than 2^-30 of the largest's left out, cut to the most probable tokens whose sum first
    reaches `top_p` and scaled to 1 again.

    Raises CheckError if a logit is NaN or all are minus infinity: the model's numbers overflowed.
    """
    likeliest = _largest(logits)
    dense = np.zeros(logits.size)
    if temperature == 0:
        dense[likeliest] = 1
        return dense
    logits = np.asarray(logits, np.float32)
    tokens = _all(logits, logits[likeliest], _scale(temperature))
    kept = tokens if top_p == 1 else _nucleus(tokens, top_p)
    assert kept is not None, "of all tokens a nucleus is certain"
    dense[slice(None) if kept.ids is None else kept.ids] = kept.weights
    dense /= dense.sum()
    return dense


def choose(
    logits: Vector,
    rng: np.random.Generator,
    *,
    temperature: float,
    top_p: float,
    library: HostLibrary | None = None,
) -> int:
    """One token id from logits [vocab], with one number from `rng`; at temperature 0 none is drawn.

    `library` draws the same token as numpy, in less time. Raises as `probabilities`.
    """
    if temperature == 0:
        return _largest(logits)
    logits = np.asarray(logits, np.float32)
    share = rng.random()
    if library is not None:
        token = library.choose(logits, _scale(temperature), top_p, share)
        if token is not None:
            return token
    return _choose_by_numpy(logits, share, temperature, top_p)


def _choose_by_numpy(logits: Vector, share: float, temperature: float, top_p: float) -> int:
    """In few passes over the vocabulary.

    It looks at the tokens near the largest logit first, which nearly always decide, whatever the others weigh exactly.
    """
    largest = logits[_largest(logits)]
    for tokens in _candidates(logits, largest, temperature):
        possible = tokens if top_p == 1 else _nucleus(tokens, top_p)
        token = None if possible is None else _draw(possible, share)
        if token is not None:
            return token
    raise AssertionError("the last candidates are all tokens, of which one is drawn")


@dataclass(frozen=True)
class _Tokens:
    """Tokens in rising order of their ids.

    ids: None where they are 0, 1, 2 and so on. weights: whole numbers. missing: what all other tokens together weigh at
    most; each weighs less than LEVELS[1].
    """

    ids: Vector | None
    weights: Vector
    missing: int


def _largest(logits: Vector) -> int:
    """The id of the largest logit, the lowest among equals. Raises CheckError if it is not a finite number."""
    likeliest = int(logits.argmax())  # the first NaN if there is one
    if not math.isfinite(logits[likeliest]):
        raise CheckError(
            f"the largest of the model's logits is {logits[likeliest]}",
            wanted="finite numbers",
            do="btp-export verify shows which graph overflows; --precision float32 may help",
        )
    return likeliest


def _scale(temperature: float) -> float:
    """From a difference of logits to a power of 2: finite and not 0, so minus infinity stays what it is."""
    return min(max(LOG2_E / temperature, SMALLEST), LARGEST)


def _candidates(logits: Vector, largest: Any, temperature: float) -> Iterator[_Tokens]:
    """Tokens to choose from: those near the largest logit if they are few, the same with a closer bound, then all."""
    scale = _scale(temperature)
    near, bound = _cut(largest, NEAR, scale)
    tokens = _near(logits, near, largest, scale) if bound < LEVELS[1] else None
    if tokens is not None:
        yield replace(tokens, missing=logits.size * bound)
        far, farther = _cut(largest, FAR, scale)
        yield replace(tokens, missing=np.count_nonzero(logits >= far) * bound + logits.size * farther)
    yield _all(logits, largest, scale)


def _cut(largest: Any, distance: float, scale: float) -> tuple[Any, int]:
    """A logit that lies `distance` temperatures below the largest, and what tokens below it weigh at most.

    Weights are within 5e-6: scale, difference and product are rounded, so y down to -31 is within 6e-6 and its power
    within 4e-6; the polynomial is within 2e-7.
    """
    with np.errstate(over="ignore"):  # minus infinity at a huge temperature
        cut = largest.dtype.type(float(largest) - distance * LOG2_E / scale)
    power = (float(cut) - float(largest)) * scale
    return cut, int(LARGEST_WEIGHT * 2.0**power * (1 + 1e-5)) + 1


def _near(logits: Vector, cut: Any, largest: Any, scale: float) -> _Tokens | None:
    """The tokens from the cut on; None if they are so many that nothing is saved."""
    if logits.size % GROUP:
        return None
    hits = (logits >= cut).view(np.uint64) != 0
    if np.count_nonzero(hits) > hits.size // 4:
        return None
    groups = np.flatnonzero(hits)
    scores = logits.reshape(-1, GROUP).take(groups, axis=0).ravel()
    places = np.flatnonzero(scores >= cut)
    ids = groups.take(places // GROUP) * GROUP + places % GROUP
    return _Tokens(ids, _weights(scores.take(places), largest, scale), missing=0)


def _all(logits: Vector, largest: Any, scale: float) -> _Tokens:
    return _Tokens(None, _weights(logits, largest, scale), missing=0)


def _weights(logits: Vector, largest: Any, scale: float) -> Vector:
    """float32, whole numbers from 0 to 2^30."""
    weights = np.empty(logits.size, np.float32)
    for first in range(0, logits.size, PIECE):
        piece = slice(first, first + PIECE)
        _weigh(logits[piece], largest, scale, weights[piece])
    return weights


def _weigh(logits: Vector, largest: Any, scale: float, weights: Vector) -> None:
    """As engines/native/token_weights.h, to the last bit."""
    with np.errstate(over="ignore"):  # a tiny temperature pushes all but the largest to minus infinity
        powers = logits - np.float32(largest)
        powers *= np.float32(scale)
    np.maximum(powers, np.float32(-31), out=powers)
    shifted = powers + ROUNDED
    exponents = shifted.view(np.uint32) << np.uint32(23)
    shifted -= ROUNDED
    powers -= shifted
    np.multiply(powers, POWERS[0], out=weights)
    for factor in POWERS[1:-1]:
        weights += factor
        weights *= powers
    weights += POWERS[-1]
    weights.view(np.uint32)[...] += exponents
    np.trunc(weights, out=weights)


def _nucleus(tokens: _Tokens, top_p: float) -> _Tokens | None:
    """The likeliest tokens whose weights first reach `top_p` of all; None if the missing ones may change which."""
    weights = tokens.weights
    total = float(weights.sum(dtype=np.float64))
    wanted, at_most = top_p * total, top_p * (total + tokens.missing)
    for least in LEVELS[:2] if tokens.missing else LEVELS:
        places = np.flatnonzero(weights >= least)
        part = weights[places].astype(np.float64)
        if part.sum() >= at_most:
            break
    ranked = np.sort(part)[::-1]
    sums = np.cumsum(ranked)
    last = int(sums.searchsorted(wanted))
    if last == sums.size or sums[last] < at_most:
        return None
    surely = part > ranked[last]
    ties = np.flatnonzero(part == ranked[last])[: last + 1 - np.count_nonzero(surely)]  # the lowest ids among equals
    surely[ties] = True
    kept = places[surely]
    return _Tokens(kept if tokens.ids is None else tokens.ids[kept], part[surely], missing=0)


def _draw(tokens: _Tokens, share: float) -> int | None:
    """The first token up to which all weigh more than `share` of the total.

    None if that depends on where the missing tokens stand and what they weigh.
    """
    sums = np.add.reduceat(tokens.weights, np.arange(0, tokens.weights.size, BLOCK), dtype=np.float64)
    bounds = sums.cumsum()
    total = float(bounds[-1])
    least, most = share * total, share * (total + tokens.missing)
    block = int(bounds.searchsorted(most, side="right"))
    if block == bounds.size:
        return None
    before = bounds[block] - sums[block]
    inside = before + tokens.weights[block * BLOCK : (block + 1) * BLOCK].cumsum(dtype=np.float64)
    place = int(inside.searchsorted(most, side="right"))
    if (inside[place - 1] if place else before) + tokens.missing > least:
        return None
    place += block * BLOCK
    return place if tokens.ids is None else int(tokens.ids[place])


GREEDY = Sampling()
