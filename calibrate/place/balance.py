"""How the stages of a balanced plan divide their places, with every switch that the paper's ablations turn.

A stage that keeps k tokens gives attention the share lambda of its places and diversity the rest; lambda rises with
depth to 1.0. In the first stage part of diversity's places go to the fixed spatial set. Attention over-selects a pool,
wider the less it decides, and takes from it first what lies early (the rebalance).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from calibrate.place.counts import Shape
from graphs.records.errors import InputError
from graphs.records.plan import Importance, PruningPlan, SpatialMetric, Stage

# Attention's share in the first stage: the paper's for LLaVA-1.6, between its best two for LLaVA-1.5.
LAMBDA_START = 0.4
# Pool over quota in the released settings: the less attention decides, the wider it is over-selected.
_POOL_FACTORS = ((0.3, 3.7), (0.9, 1.5), (1.0, 1.2))
# Rules a calibrated plan can select by; "random" and "pivot-distance" belong to baselines.
IMPORTANCES: tuple[Importance, ...] = ("last-token", "mean-text", "similar-text")


@dataclass(frozen=True)
class Recipe:
    """The switches. `balance` is lambda of each stage that keeps tokens, None for the progression from 0.4 to 1.0."""

    importance: Importance = "last-token"
    spatial_metric: SpatialMetric = "euclidean"
    rebalance: bool = True
    spatial: bool = True
    balance: tuple[float, ...] | None = None

    def plan(self, shape: Shape, layers: Sequence[int], keeps: Sequence[int]) -> PruningPlan:
        """The plan that keeps `keeps` tokens from `layers` on. Raises InputError as `shares`."""
        return _plan(self, shape, tuple(layers), tuple(keeps))

    def stages(self, shape: Shape, layers: Sequence[int], keeps: Sequence[int]) -> tuple[Stage, ...]:
        """Its stages; the spatial set is V/4 tokens, as the released 144 of 576."""
        shares = self.shares(sum(keep > 0 for keep in keeps))
        stages, tokens = [], shape.image_tokens
        for n, (layer, keep) in enumerate(zip(layers, keeps, strict=True)):
            seeds = shape.most_seeds if n == 0 and self.spatial else 0
            share = shares[n] if keep else 0.0
            stages.append(stage_of(layer, keep, share, tokens=tokens, seeds=seeds, rebalance=self.rebalance))
            tokens = keep
        return tuple(stages)

    def shares(self, stages: int) -> tuple[float, ...]:
        """lambda of `stages` stages. Raises InputError if the recipe names another number of them."""
        if self.balance is None:
            return balance(stages) if stages else ()
        if len(self.balance) != stages:
            raise InputError(
                f"--balance {','.join(f'{share:g}' for share in self.balance)} for {stages} stages that keep tokens",
                wanted=f"{stages} shares of attention, one for each (none for the stage that drops all)",
                do=f"--balance {','.join(f'{share:g}' for share in balance(stages))}" if stages else "leave it out",
            )
        return self.balance

    def switches(self) -> dict[str, Any]:
        """The switches as the plan's record holds them."""
        return {
            "rebalance": self.rebalance,
            "spatial": self.spatial,
            "balance": None if self.balance is None else list(self.balance),
        }


@functools.lru_cache(maxsize=1024)  # bootstrap samples come to the same few again and again
def _plan(recipe: Recipe, shape: Shape, layers: tuple[int, ...], keeps: tuple[int, ...]) -> PruningPlan:
    stages = recipe.stages(shape, layers, keeps)
    return shape.plan(stages, importance=recipe.importance, spatial_metric=recipe.spatial_metric)


def balance(stages: int, start: float = LAMBDA_START) -> tuple[float, ...]:
    """lambda of each stage that keeps tokens: an arithmetic progression from `start` to 1.0 (one stage: 1.0)."""
    if stages == 1:
        return (1.0,)
    return tuple(start + (1.0 - start) * n / (stages - 1) for n in range(stages))


def pool_factor(share: float) -> float:
    """Pool over attention quota at lambda = `share`, interpolated between the released settings."""
    points = _POOL_FACTORS
    if share <= points[0][0]:
        return points[0][1]
    for (left, high), (right, low) in itertools.pairwise(points):
        if share <= right:
            return high + (low - high) * (share - left) / (right - left)
    return points[-1][1]


def stage_of(layer: int, keep: int, share: float, *, tokens: int, seeds: int = 0, rebalance: bool = True) -> Stage:
    """A stage that gives attention `share` of its `keep` places among `tokens`; diversity gets the rest.

    Of the rest up to `seeds` places go to the fixed spatial set, where the farthest-point selection then starts from.
    Without `rebalance` the pool is the quota itself: the best by attention, wherever they lie.
    """
    if keep == 0:
        return Stage(layer=layer, keep=0)
    quota = min(keep, math.floor(share * keep + 0.5))
    pool = max(quota, min(tokens, math.floor(pool_factor(share) * quota))) if rebalance else quota
    spatial = min(seeds, keep - quota)
    return Stage(
        layer=layer,
        keep=keep,
        attention_quota=quota,
        pool=pool,
        boundary=keep,
        diversity_quota=keep - quota - spatial,
        seeds=spatial,
    )
