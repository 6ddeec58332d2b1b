"""Where to prune: stage layers from the changed-token counts.

Layers in which many image tokens change are where image information moves; once it has moved, a token that is dropped
takes less with it. So dropping a share of the tokens right before layer l costs

    cost(l) = share * (what still changes at l or later / all change  +  1 / l)

where 1 / l is for a choice made on the evidence of few layers. Among all sets of stage layers that meet the budget the
cheapest is taken. The last stage drops what is left:

- measured, when calibration has it: before the earliest layer at which losing every image token leaves the next-token
  distribution within a bound (attention on the image stays high long after the image no longer matters, so that
  mass is no guide);
- otherwise right after the last layer whose count is at least 5 % of the highest.

On the published counts for LLaVA-1.5-7B (algorithm.md, between two odd layers the mean) and 78 % this gives stages at
3, 8, 11 and 22; the released settings are 3, 6, 14 and 22. Everything here is deterministic.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calibrate.place.counts import EXPONENTS, Shape, counts_for, exponents_for, token_budget
from graphs.records.errors import InputError

CHANGE_FLOOR = 0.05  # of the highest count: below it a layer no longer counts as moving image information
_DEAD = 0.05  # mean share of the tokens that change in the busiest layer; below it the counts say nothing
_RATIOS = (0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.02)  # rho for which a placement is looked for, in this order
_RATIOS_TRIED = 3  # how many of them share the places where several placements are wanted
_MOST_SETS = 50_000


@dataclass(frozen=True)
class Placement:
    """Stage layers with their counts; the last count may be 0. `cost` is by the rule above."""

    layers: tuple[int, ...]
    keeps: tuple[int, ...]
    cost: float


def is_dead(counts: np.ndarray, image_tokens: int) -> bool:
    """Whether changed-token counts [L] are too small to tell layers apart (an untrained model, or a wrong tau)."""
    return bool(counts.max(initial=0.0) < _DEAD * image_tokens)


def remaining_change(counts: np.ndarray) -> np.ndarray:
    """For each layer the share of all change that lies there or later, [L + 1]; an even decline if nothing changes."""
    counts = np.asarray(counts, dtype=np.float64)
    if counts.sum() <= 0:
        counts = np.ones_like(counts)
    tail: np.ndarray = np.concatenate([np.cumsum(counts[::-1])[::-1], [0.0]])
    share: np.ndarray = tail / tail[0]
    return share


def final_layer(counts: np.ndarray, divergence: np.ndarray | None, bound: float) -> int:
    """The layer of the stage that drops all tokens, 1 <= layer <= L - 1.

    `counts` [L] mean changed tokens; `divergence` [L] mean KL in nats of the next-token distribution if all image
    tokens are dropped before that layer (or None). The layer is the earliest from which on it stays within `bound`.
    """
    layers = len(counts)
    if divergence is not None:
        above = np.flatnonzero(np.asarray(divergence) > bound)
        return int(np.clip(above[-1] + 1 if len(above) else 1, 1, max(1, layers - 1)))
    busy = np.flatnonzero(np.asarray(counts) >= CHANGE_FLOOR * max(float(np.max(counts)), 1e-12))
    return int(np.clip(busy[-1] + 1 if len(busy) else layers // 2, 1, max(1, layers - 1)))


def placements(
    counts: np.ndarray,
    final: int,
    shape: Shape,
    compression: float,
    *,
    limit: int = 1,
    exponents: Sequence[float] = EXPONENTS,
    exactly: bool = False,
) -> list[Placement]:
    """Up to `limit` placements that reach `compression` with everything dropped at `final`, the default first.

    The default is the cheapest one with counts that fall by half (or faster where the budget does not allow it); with
    a larger `limit` come the next cheapest ones and those whose counts fall faster, all at least two steps of layers
    apart. As many stages keep tokens as there are `exponents`, which say how their counts fall
    (calibrate/place/counts.py); fewer where there is no room for them, unless it must be `exactly` so many. Raises
    InputError for a compression that cannot be reached.
    """
    budget = token_budget(compression, shape.num_layers, shape.image_tokens)
    if budget >= final * shape.image_tokens:
        return [_late(budget, shape)]
    least = len(exponents) if exactly else 1
    for stages in range(min(len(exponents), final - 1), least - 1, -1):
        placements: list[Placement] = []
        for ratio in _RATIOS:
            room = min(-(-limit // _RATIOS_TRIED), limit - len(placements))
            placements += _cheapest(counts, final, shape, budget, exponents[:stages], ratio, room, placements)
            if len(placements) >= limit:
                break
        if placements:
            return placements
    return [Placement((1,), (0,), float("inf"))]


def counts_at(
    layers: Sequence[int], shape: Shape, compression: float, *, exponents: Sequence[float] = EXPONENTS
) -> Placement:
    """Counts for given stage layers, the last of which drops everything, that meet `compression`.

    Raises InputError for layers that do not rise within the decoder, and for a compression they cannot meet.
    """
    check_layers(layers, shape)
    budget = token_budget(compression, shape.num_layers, shape.image_tokens)
    *keeping, final = layers
    if not keeping and final * shape.image_tokens <= budget:
        return Placement((final,), (0,), 0.0)
    keeps = keeping and counts_for(
        keeping,
        exponents_for(len(keeping), exponents),
        budget=budget,
        num_layers=shape.num_layers,
        image_tokens=shape.image_tokens,
        final=final,
    )
    if not keeps:
        raise InputError(
            f"stages at layers {', '.join(map(str, layers))} cannot save {compression:.3g} of the image tokens",
            wanted=f"earlier layers: up to layer {layers[0]} every token is seen",
            do="--stages with earlier layers, or less --compression",
        )
    return Placement((*keeping, final), (*keeps, 0), 0.0)


def check_layers(layers: Sequence[int], shape: Shape) -> None:
    """Raise InputError unless the layers rise from 1 or more to below the number of layers."""
    rising = all(a < b for a, b in itertools.pairwise((0, *layers, shape.num_layers)))
    if not layers or not rising:
        raise InputError(
            f"--stages {','.join(map(str, layers))}",
            wanted=f"rising layers from 1 to {shape.num_layers - 1}",
            do="for example --stages 3,6,14,22; the last one drops all image tokens",
        )


def layers_for(
    counts: np.ndarray, keeps: Sequence[int], final: int, shape: Shape, compression: float
) -> tuple[int, ...]:
    """Stage layers for given counts `keeps` (falling; a last 0 is placed at `final` or earlier).

    The cheapest layers whose average meets `compression`; if none does, the earliest layers.
    Raises InputError as `check_keeps`.
    """
    keeps = tuple(keeps)
    check_keeps(keeps, shape)
    budget = (1.0 - compression) * shape.num_layers * shape.image_tokens
    partial = keeps[:-1] if keeps[-1] == 0 else keeps
    stop = max(final, len(partial) + 1) if keeps[-1] == 0 else shape.num_layers
    stop = min(stop, shape.num_layers - 1) if keeps[-1] == 0 else stop
    if not partial:
        return (max(1, min(stop, math.floor(budget / shape.image_tokens))),)
    fractions = [keep / shape.image_tokens for keep in partial]
    sets = _sets(stop, len(partial))
    sets = sets[_average(sets, fractions, stop) <= budget / shape.image_tokens + 1e-9]
    if len(sets):
        best = sets[int(np.argmin(_costs(counts, sets, fractions, stop)))]
        layers = tuple(int(layer) for layer in best)
    else:
        layers, stop = tuple(range(1, len(partial) + 1)), len(partial) + 1
    return (*layers, stop) if keeps[-1] == 0 else layers


def check_keeps(keeps: Sequence[int], shape: Shape) -> None:
    """Raise InputError unless the counts fall from below V to 0 or more, in fewer stages than there are layers."""
    falling = all(a > b for a, b in itertools.pairwise((shape.image_tokens, *keeps)))
    if not keeps or not falling or keeps[-1] < 0:
        raise InputError(
            f"--keep {','.join(map(str, keeps))}",
            wanted=f"falling counts below {shape.image_tokens}, the last one may be 0",
            do="for example --keep 288,144,48,0",
        )
    if len(keeps) >= shape.num_layers:
        raise InputError(f"{len(keeps)} stages", wanted=f"fewer than {shape.num_layers} layers", do="--keep less")


def _late(budget: int, shape: Shape) -> Placement:
    """A budget that allows more than the final layer needs: drop as late as it allows, partly one layer before."""
    full, rest = divmod(budget, shape.image_tokens)
    if full >= shape.num_layers:
        return Placement((), (), 0.0)
    stages = [(full, rest)] if rest else []
    if full + bool(rest) < shape.num_layers:
        stages.append((full + bool(rest), 0))
    return Placement(tuple(layer for layer, _ in stages), tuple(keep for _, keep in stages), 0.0)


def _cheapest(
    counts: np.ndarray,
    final: int,
    shape: Shape,
    budget: int,
    exponents: Sequence[float],
    ratio: float,
    limit: int,
    others: Sequence[Placement],
) -> list[Placement]:
    """The cheapest placements for counts near V ratio^exponents, unlike one another and unlike `others`."""
    fractions = tuple(ratio**exponent for exponent in exponents)
    sets = _affordable(final, fractions, budget / shape.image_tokens + 1e-9)
    costs = _costs(counts, sets, fractions, final)
    chosen: list[Placement] = []
    for place in np.argsort(costs, kind="stable"):
        layers, cost = tuple(int(layer) for layer in sets[place]), float(costs[place])
        if len(chosen) == limit:
            break
        if any(sum(abs(a - b) for a, b in zip(layers, other.layers, strict=False)) < 2 for other in (*others, *chosen)):
            continue
        keeps = counts_for(
            layers,
            exponents,
            budget=budget,
            num_layers=shape.num_layers,
            image_tokens=shape.image_tokens,
            final=final,
        )
        if keeps is not None:
            chosen.append(Placement((*layers, final), (*keeps, 0), cost))
    return chosen


@functools.lru_cache(maxsize=32)  # bootstrap samples ask for the same few again and again
def _affordable(final: int, fractions: tuple[float, ...], allowed: float) -> np.ndarray:
    """Sets of stage layers [n, stages] whose token shares, summed over the layers below `final`, are `allowed`."""
    sets = _sets(final, len(fractions))
    return sets[_average(sets, fractions, final) <= allowed]


def _average(sets: np.ndarray, fractions: Sequence[float], stop: int) -> np.ndarray:
    """Token shares summed over the layers below `stop`, for each of the sets of stage layers [n, stages]: [n]."""
    bounds = np.concatenate([np.zeros((len(sets), 1)), sets, np.full((len(sets), 1), stop)], axis=1)
    summed: np.ndarray = np.diff(bounds, axis=1) @ np.array([1.0, *fractions])
    return summed


def _costs(counts: np.ndarray, sets: np.ndarray, fractions: Sequence[float], final: int) -> np.ndarray:
    """The module's cost of each of the sets [n, stages], with everything dropped at `final`: [n]."""
    price = remaining_change(counts)[:-1] + 1.0 / np.maximum(np.arange(len(counts)), 1)
    held = np.array([1.0, *fractions, 0.0])
    drops = held[:-1] - held[1:]
    costs: np.ndarray = price[sets] @ drops[:-1] + price[min(final, len(price) - 1)] * drops[-1]
    return costs


def _sets(final: int, stages: int) -> np.ndarray:
    """Rising layers in [1, final), `stages` of them, [n, stages]; evenly thinned out where there would be too many."""
    layers = list(range(1, final))
    while len(layers) > stages and math.comb(len(layers), stages) > _MOST_SETS:
        layers = layers[::2]
    return np.array(list(itertools.combinations(layers, stages)), dtype=np.int64).reshape(-1, stages)
