"""Which image tokens the stages keep, in the two ways of numbering them.

A graph knows only the tokens it is given, so its indices are relative: among the tokens that the stage chose from.
People, pictures and comparisons count among all V of the picture: absolute. In both the list has an entry for every
stage, an empty one for a stage that keeps none (keep 0), for which a graph gives no indices at all.

Arrays are [k] for one sample or [n, k] for a batch.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.integer[Any]]


def every_stage(given: Mapping[int, Indices], keeps: Sequence[int], *, samples: int | None = None) -> list[Indices]:
    """One entry for each stage, of what graphs give by its number; `keeps` are the stages' counts.

    `samples` is n for batches, None for one sample. Raises KeyError if a stage that keeps tokens has no entry.
    """
    empty = np.empty((0,) if samples is None else (samples, 0), np.int32)
    return [given[stage] if keep else empty for stage, keep in enumerate(keeps)]


def absolute(relative: Sequence[Indices]) -> list[Indices]:
    """Indices of each stage among the V of the picture, from those among the tokens it chose from."""
    kept: list[Indices] = []
    for indices in relative:
        kept.append(np.take_along_axis(kept[-1], indices.astype(np.intp), axis=-1) if kept else indices)
    return kept


def relative(kept: Sequence[npt.ArrayLike]) -> list[Indices]:
    """The other way, for one sample: indices [k] of each stage among the tokens it chose from.

    Raises ValueError for a token that the stage before did not keep.
    """
    stages = [np.asarray(indices, dtype=np.int64) for indices in kept]
    return [*stages[:1], *(_places(before, own) for before, own in itertools.pairwise(stages))]


def _places(tokens: Indices, wanted: Indices) -> Indices:
    """Where each of `wanted` stands in `tokens`, both [k]."""
    places = {int(token): place for place, token in enumerate(tokens)}
    missing = [int(token) for token in wanted if int(token) not in places]
    if missing:
        raise ValueError(f"token {missing[0]} is kept by a stage that did not see it")
    return np.array([places[int(token)] for token in wanted], dtype=np.int64)
