"""Candidate plans for a budget, from what the first pass found.

The budget is a compression, given counts, or a share of the unpruned prefill's cost (calibrate/place/cost.py). For a
share the stages are placed as for the compression that comes nearest to it, and each candidate's counts are then solved
so that its own cost meets the share.

Where the user asks for nothing but a budget, plans of other kinds are candidates too (calibrate/place/alternatives.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from calibrate.measure.statistics import Statistics
from calibrate.place.alternatives import alternatives
from calibrate.place.balance import Recipe
from calibrate.place.cost import PrefillCost
from calibrate.place.counts import (
    DEFAULT_COMPRESSION,
    EXPONENTS,
    FLAT_EXPONENTS,
    Shape,
    counts_for,
    exponents_for,
    exponents_of,
    token_budget,
    tokens_within,
)
from calibrate.place.device_cost import DeviceCost, spend_what_is_free
from calibrate.place.presets import ReleasedSettings
from calibrate.place.stages import Placement, check_keeps, check_layers, counts_at, final_layer, layers_for, placements
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan

DROP_BOUNDS = (0.02, 0.1)  # nats; the stage that drops all comes where the mean divergence stays within one of them
PLACEMENTS = 4  # candidates for each bound, and each way in which counts fall
STAGES = "stages"  # the method of plans whose layers follow the changed tokens
_STEPS = 24  # of a bisection


@dataclass(frozen=True)
class Budget:
    """How much a plan may keep: one of the three, or none of them for the default compression.

    `share` is of the unpruned prefill's cost; `keep` are the counts themselves.
    """

    compression: float | None = None
    keep: tuple[int, ...] | None = None
    share: float | None = None

    @property
    def requested(self) -> float:
        """The compression that is asked for, or the default where something else is."""
        return DEFAULT_COMPRESSION if self.compression is None else self.compression


@dataclass(frozen=True)
class Request:
    """What plan is asked for: a budget, stage `layers` if they are given, the recipe, the bounds on dropping all.

    `released` are the settings of the model's family, which the preset `btp-paper` is made of.
    """

    budget: Budget = field(default_factory=Budget)
    layers: tuple[int, ...] | None = None
    recipe: Recipe = field(default_factory=Recipe)
    drop_bounds: tuple[float, ...] = DROP_BOUNDS
    released: ReleasedSettings | None = None

    @property
    def is_free(self) -> bool:
        """Whether nothing but a budget is asked for, so that a plan of any kind will do."""
        chosen = self.layers is not None or self.budget.keep is not None or self.recipe != Recipe()
        return not chosen and self.drop_bounds == DROP_BOUNDS

    def before_the_decoder(self, shape: Shape) -> bool:
        """Whether only plans that prune before layer 0 can meet the budget."""
        if not self.is_free or self.budget.share is not None:
            return False
        return tokens_within(self.budget.requested, shape.num_layers, shape.image_tokens) < shape.image_tokens

    def check(self, shape: Shape, cost: PrefillCost | None = None) -> None:
        """Raise InputError for what no plan of this shape can have."""
        budget = self.budget
        if sum(value is not None for value in (budget.compression, budget.keep, budget.share)) > 1:
            raise InputError("more than one budget", wanted="a compression, counts, or a share", do="leave others out")
        if budget.keep is None and budget.share is None:
            (tokens_within if self.is_free else token_budget)(budget.requested, shape.num_layers, shape.image_tokens)
        if budget.keep is not None:
            check_keeps(budget.keep, shape)
            self.recipe.shares(sum(keep > 0 for keep in budget.keep))
        if self.layers is not None:
            self._check_layers(shape)
        if budget.share is not None:
            if not 0.0 < budget.share < 1.0:
                raise InputError(
                    f"--latency-share {budget.share}", wanted="above 0 and below 1", do="--latency-share 0.3"
                )
            if cost is None:
                raise InputError("a latency share without a cost", wanted="the cost of the model's layers")

    def _check_layers(self, shape: Shape) -> None:
        layers, keep = self.layers or (), self.budget.keep
        check_layers(layers, shape)
        if keep is None:
            self.recipe.shares(len(layers) - 1)
            counts_at(layers, shape, self.budget.requested if self.budget.share is None else 0.0)
        elif len(layers) != len(keep):
            raise InputError(
                f"--stages with {len(layers)} layers and --keep with {len(keep)} counts",
                wanted="a count for each layer",
                do="give as many of both",
            )


@dataclass(frozen=True)
class Evidence:
    """What the proposals go by: mean changed tokens [L], and mean KL [L] if all image tokens go before a layer."""

    counts: np.ndarray
    divergence: np.ndarray

    @staticmethod
    def of(statistics: Statistics, tau: float, *, flat: bool = False) -> Evidence:
        """The means; with `flat` the counts are taken to say nothing."""
        counts = statistics.counts_at(tau).mean(axis=0)
        return Evidence(np.zeros_like(counts) if flat else counts, statistics.divergence.mean(axis=0))

    def final(self, bound: float) -> int:
        """The layer of the stage that drops everything."""
        layer = final_layer(self.counts, self.divergence, bound)
        if layer > 1:
            return layer
        # The picture does not matter to the answers: only the counts can say where it stops to.
        return final_layer(self.counts, None, bound)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A plan under consideration, and what it did to the answers of the samples it was judged on.

    `method` is its kind, `bound` the one on dropping all where the placement went by it. `divergence` (KL in nats, mean
    over the answer's tokens), `agreement` (share of them with the same likeliest token) and `exact` (1.0 where that is
    all of them), [samples] each.
    """

    plan: PruningPlan
    method: str = STAGES
    bound: float | None = None
    divergence: np.ndarray = field(default_factory=lambda: np.zeros(0))
    agreement: np.ndarray = field(default_factory=lambda: np.zeros(0))
    exact: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def mean(self) -> float:
        """Mean divergence."""
        return float(self.divergence.mean())

    def by_kind(self, kinds: Sequence[str]) -> dict[str, float]:
        """Mean divergence for each kind of picture; `kinds` name those of the samples, in their order."""
        judged = np.array(kinds[: len(self.divergence)])
        return {kind: float(self.divergence[judged == kind].mean()) for kind in sorted(set(judged.tolist()))}

    def worst_by_kind(self, kinds: Sequence[str]) -> dict[str, int]:
        """The sample of each kind whose answer is moved the most; of equals the first."""
        worst: dict[str, int] = {}
        for number, kind in enumerate(kinds[: len(self.divergence)]):
            if kind not in worst or self.divergence[number] > self.divergence[worst[kind]]:
                worst[kind] = number
        return dict(sorted(worst.items()))

    def summary(self) -> dict[str, Any]:
        """As the plan's record holds it."""
        return {
            "method": self.method,
            "layers": [stage.layer for stage in self.plan.stages],
            "keep": [stage.keep for stage in self.plan.stages],
            "drop_bound": self.bound,
            "samples": len(self.divergence),
            "divergence": round(self.mean, 6),
            "divergence_90": round(float(np.quantile(self.divergence, 0.9)), 6),
            "divergence_worst": round(float(self.divergence.max()), 6),
            "agreement": round(float(self.agreement.mean()), 6),
            "exact": round(float(self.exact.mean()), 6),
        }


def propose(
    evidence: Evidence, shape: Shape, request: Request, cost: PrefillCost | None = None, *, limit: int = PLACEMENTS
) -> list[Candidate]:
    """Candidate plans within the budget, cheapest by the counts first; `limit` for each bound and way of falling.

    Raises InputError for a share that no candidate meets, and as `Request.check`.
    """
    candidates: dict[tuple[Any, ...], Candidate] = {}
    least = 1.0
    for bound in () if request.before_the_decoder(shape) else request.drop_bounds:
        for placement in _placements(evidence, evidence.final(bound), shape, request, cost, limit):
            plan = request.recipe.plan(shape, placement.layers, placement.keeps)
            if request.budget.share is not None and cost is not None:
                share = cost.share(plan)
                least = min(least, share)
                if share > request.budget.share + 1e-9:
                    continue
            candidates.setdefault(plan.stages, Candidate(plan, bound=bound))
    if request.is_free and limit == PLACEMENTS:
        for candidate in _others(evidence, shape, request, cost):
            candidates.setdefault((candidate.plan.importance, *candidate.plan.stages), candidate)
    if not candidates:
        raise InputError(
            f"--latency-share {request.budget.share}: the least found is {least:.3f}",
            wanted="a share that a plan can reach, whose first layers see the whole picture",
            do=f"--latency-share {least + 0.01:.2f}",
        )
    if isinstance(cost, DeviceCost):
        return [
            replace(candidate, plan=spend_what_is_free(candidate.plan, cost.free_tokens))
            for candidate in candidates.values()
        ]
    return list(candidates.values())


def _others(evidence: Evidence, shape: Shape, request: Request, cost: PrefillCost | None) -> Iterator[Candidate]:
    """The plans of other kinds that there are at this budget."""
    final = evidence.final(request.drop_bounds[0])
    share = request.budget.share
    most = shape.num_layers * shape.image_tokens
    for alternative in alternatives(shape, final=final, released=request.released):
        if share is None or cost is None:
            plan = alternative.make(tokens_within(request.budget.requested, shape.num_layers, shape.image_tokens))
        else:
            plan = _most_within(alternative.make, most, share, cost)
        if plan is not None and plan.stages:
            yield Candidate(plan, alternative.method)


def _most_within(
    make: Callable[[int], PruningPlan | None], most: int, share: float, cost: PrefillCost
) -> PruningPlan | None:
    """The plan of the most tokens, at most `most` summed over the layers, whose prefill costs at most that share."""
    best, low, high = None, 0, most
    while low < high:
        middle = (low + high + 1) // 2
        plan = make(middle)
        if plan is None or cost.share(plan) <= share:
            best, low = plan or best, middle
        else:
            high = middle - 1
    return best


def _placements(
    evidence: Evidence, final: int, shape: Shape, request: Request, cost: PrefillCost | None, limit: int
) -> list[Placement]:
    """Placements for one final layer; for a share their counts are solved for it."""
    keep, share = request.budget.keep, request.budget.share
    if keep is not None:
        layers = request.layers or layers_for(evidence.counts, keep, final, shape, DEFAULT_COMPRESSION)
        return [Placement(layers, keep, 0.0)]
    if share is None or cost is None:
        return _placed(evidence, final, shape, request, request.budget.requested, limit)

    def met(compression: float) -> bool:
        (first, *_) = _placed(evidence, final, shape, request, compression, 1)
        return cost.share(request.recipe.plan(shape, first.layers, first.keeps)) <= share

    low, high = 0.0, 1.0 - 1.0 / shape.num_layers - 1e-9
    if request.layers is not None:
        high = min(high, _most(request.layers, shape))
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if met(middle) else (middle, high)
    placements = _placed(evidence, final, shape, request, high, limit)
    ceiling = share * cost.of(shape.unpruned)
    solved = [largest_within(placement, shape, request.recipe, cost, ceiling) for placement in placements]
    return [fitted or placement for fitted, placement in zip(solved, placements, strict=True)]


def _placed(
    evidence: Evidence, final: int, shape: Shape, request: Request, compression: float, limit: int
) -> list[Placement]:
    """Placements for a compression, with counts that fall as the released ones and with flat ones."""
    families = (EXPONENTS, FLAT_EXPONENTS)[:limit]
    if request.layers is not None:
        return [counts_at(request.layers, shape, compression, exponents=family) for family in families]
    balance = request.recipe.balance
    stages = len(EXPONENTS) if balance is None else len(balance)
    return [
        placement
        for family in families
        for placement in placements(
            evidence.counts,
            final,
            shape,
            compression,
            limit=limit,
            exponents=exponents_for(stages, family),
            exactly=balance is not None,
        )
    ]


def _most(layers: Sequence[int], shape: Shape) -> float:
    """The compression of the least counts that given stage layers can have."""
    *keeping, final = layers
    tokens = (keeping or [final])[0] * shape.image_tokens + (final - (keeping or [final])[0]) * len(keeping)
    return max(0.0, 1.0 - tokens / (shape.num_layers * shape.image_tokens))


def largest_within(
    placement: Placement, shape: Shape, recipe: Recipe, cost: PrefillCost, ceiling: float, tokens: int | None = None
) -> Placement | None:
    """The same layers with the largest counts, falling alike, that cost at most `ceiling`; None if none do.

    `tokens`, summed over the layers, are not exceeded either where they are given.
    """

    def affordable(tried: Placement) -> bool:
        return cost.of(recipe.plan(shape, tried.layers, tried.keeps)) <= ceiling

    drops = bool(placement.keeps) and placement.keeps[-1] == 0
    keeping = placement.keeps[:-1] if drops else placement.keeps
    if not keeping:
        return placement if affordable(placement) else None
    exponents = exponents_of(keeping, shape.image_tokens)
    best, low, high = None, 0, shape.num_layers * shape.image_tokens if tokens is None else tokens
    while low < high:
        middle = (low + high + 1) // 2
        keeps = counts_for(
            placement.layers[: len(keeping)],
            exponents,
            budget=middle,
            num_layers=shape.num_layers,
            image_tokens=shape.image_tokens,
            final=placement.layers[-1] if drops else None,
        )
        tried = None if keeps is None else replace(placement, keeps=(*keeps, 0) if drops else keeps)
        if tried is None:  # too little for even one token a stage
            low = middle
        elif affordable(tried):
            best, low = tried, middle
        else:
            high = middle - 1
    return best
