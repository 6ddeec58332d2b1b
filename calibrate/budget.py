"""From a budget to integer counts: how many tokens each stage keeps, and how a stage divides them.

A plan of stages at layers l_1 < ... < l_n that keep k_1 > ... > k_n sees on average
(l_1 V + (l_2 - l_1) k_1 + ... + (L - l_n) k_n) / L image tokens. Counts fall as the released settings fall:
k_i = V rho^e_i with e = (1, 2, log2 12), for which rho = 1/2 gives the 288, 144 and 48 of 576. One number, rho, is
solved so that the budget is met; floors and a last adjustment make the counts integers that never exceed it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from graphs.errors import InputError
from graphs.plan import PruningPlan, Stage

DEFAULT_COMPRESSION = 0.78  # the paper's: 129 of 576 tokens on average
EXPONENTS = (1.0, 2.0, math.log2(12.0))
FLAT_EXPONENTS = (1.0, 1.2, 1.5)  # counts that fall little: for models whose image tokens all matter until they go
# Attention's share in the first stage: the paper's for LLaVA-1.6, between its best two for LLaVA-1.5.
LAMBDA_START = 0.4
# Pool over quota in the released settings: the less attention decides, the wider it is over-selected.
_POOL_FACTORS = ((0.3, 3.7), (0.9, 1.5), (1.0, 1.2))


@dataclass(frozen=True)
class Shape:
    """The decoder and picture a plan is made for: L layers, V image tokens on a grid of rows and columns."""

    model_type: str
    num_layers: int
    image_tokens: int
    grid: tuple[int, int]

    def plan(self, stages: Sequence[Stage], **settings: object) -> PruningPlan:
        """A plan of `stages` for this shape."""
        return PruningPlan.model_validate(
            {
                "model_type": self.model_type,
                "num_layers": self.num_layers,
                "image_tokens": self.image_tokens,
                "grid": self.grid,
                "stages": tuple(stages),
                **settings,
            }
        )


def token_budget(compression: float, num_layers: int, image_tokens: int) -> int:
    """The most image tokens, summed over the layers, that a plan of `compression` (0 <= c < 1) may see.

    Raises InputError for a compression that no plan can reach, whose first layer sees the whole picture.
    """
    if not 0.0 <= compression < 1.0:
        raise InputError(f"compression {compression}", wanted="a number from 0 to below 1", do="--compression 0.78")
    budget = math.floor((1.0 - compression) * num_layers * image_tokens + 1e-6)
    if budget < image_tokens:
        raise InputError(
            f"compression {compression} leaves less than one of {num_layers} layers",
            wanted=f"at most {1 - 1 / num_layers:.3f}: the first layer sees the whole picture",
            do="ask for less, or take the preset divprune, which prunes before the first layer",
        )
    return budget


def counts_for(
    layers: Sequence[int],
    exponents: Sequence[float],
    *,
    budget: int,
    num_layers: int,
    image_tokens: int,
    final: int | None = None,
) -> tuple[int, ...] | None:
    """Falling counts >= 1 for stages at `layers`, then none from layer `final` on (if given), within `budget`.

    `budget` is in tokens summed over layers and is met as nearly as integers allow. None if it cannot be met.
    """
    stops = [*layers[1:], num_layers if final is None else final]
    spans = [stop - start for start, stop in zip(layers, stops, strict=True)]
    room = budget - layers[0] * image_tokens
    if min(spans) < 1 or room < sum(span * keep for span, keep in zip(spans, range(len(spans), 0, -1), strict=True)):
        return None

    def counts(rho: float) -> list[int]:
        keeps, above = [], image_tokens
        for n, exponent in enumerate(exponents):
            keep = min(math.floor(image_tokens * rho**exponent + 1e-9), above - 1)
            above = max(keep, len(exponents) - n)
            keeps.append(above)
        return keeps

    def cost(keeps: Sequence[int]) -> int:
        return sum(span * keep for span, keep in zip(spans, keeps, strict=True))

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(counts(middle)) <= room else (low, middle)
    # The bisection ends a hair below a count that is exactly reached, so look at both ends.
    keeps = next(keeps for keeps in (counts(high), counts(low)) if cost(keeps) <= room or keeps == counts(low))
    if cost(keeps) > room or keeps[0] >= image_tokens:
        return None
    for n in sorted(range(len(keeps)), key=lambda n: spans[n]):
        above = keeps[n - 1] if n else image_tokens
        keeps[n] += min((room - cost(keeps)) // spans[n], above - 1 - keeps[n])
    return tuple(keeps)


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


def stage_of(layer: int, keep: int, share: float, *, tokens: int, seeds: int = 0) -> Stage:
    """A stage that gives attention `share` of its `keep` places among `tokens`; diversity gets the rest.

    Of the rest up to `seeds` places go to the fixed spatial set, where the farthest-point selection then starts from.
    """
    if keep == 0:
        return Stage(layer=layer, keep=0)
    quota = min(keep, math.floor(share * keep + 0.5))
    pool = max(quota, min(tokens, math.floor(pool_factor(share) * quota)))
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


def balanced_stages(
    layers: Sequence[int], keeps: Sequence[int], shape: Shape, *, start: float = LAMBDA_START
) -> tuple[Stage, ...]:
    """The stages of a balanced plan: lambda rises to 1.0 over the stages that keep tokens, the first has spatial seeds.

    The spatial set is V/4 tokens, as the released 144 of 576.
    """
    shares = [*balance(sum(keep > 0 for keep in keeps), start)] if any(keeps) else []
    stages, tokens = [], shape.image_tokens
    for n, (layer, keep) in enumerate(zip(layers, keeps, strict=True)):
        seeds = min(shape.image_tokens // 4, shape.grid[0] * shape.grid[1]) if n == 0 else 0
        share = shares[n] if keep else 0.0
        stages.append(stage_of(layer, keep, share, tokens=tokens, seeds=seeds))
        tokens = keep
    return tuple(stages)


def refitted(plan: PruningPlan, compression: float) -> PruningPlan:
    """The same stage layers and balance with counts for another budget; the plan itself where it already meets it.

    Raises InputError if the budget cannot be met at these layers.
    """
    shape = Shape(plan.model_type, plan.num_layers, plan.image_tokens, plan.grid)
    budget = token_budget(compression, shape.num_layers, shape.image_tokens)
    used = sum(plan.tokens_per_layer())
    if used <= budget < used + shape.num_layers:
        return plan
    keeping = [stage for stage in plan.stages if stage.keep]
    drops = [stage for stage in plan.stages if not stage.keep]
    layers = [stage.layer for stage in keeping]
    exponents = [max(1e-6, -math.log2(stage.keep / shape.image_tokens)) for stage in keeping]
    final = drops[0].layer if drops else None
    keeps = layers and counts_for(
        layers, exponents, budget=budget, num_layers=shape.num_layers, image_tokens=shape.image_tokens, final=final
    )
    if not keeps:
        raise InputError(
            f"compression {compression} cannot be met with stages at layers {', '.join(map(str, layers)) or 'none'}",
            wanted="a budget these layers can meet",
            do=f"btp-export calibrate --compression {compression} chooses layers for it",
        )
    stages, tokens = [], shape.image_tokens
    for stage, keep in zip(keeping, keeps, strict=True):
        stages.append(_rescaled(stage, keep, tokens))
        tokens = keep
    return plan.model_copy(update={"stages": (*stages, *drops)})


def _rescaled(stage: Stage, keep: int, tokens: int) -> Stage:
    """`stage` with another count; its quotas, pool and seeds keep their shares."""
    share = keep / stage.keep
    quota = min(keep, round(stage.attention_quota * share))
    return Stage(
        layer=stage.layer,
        keep=keep,
        attention_quota=quota,
        pool=max(quota, min(tokens, round(stage.pool * share))),
        boundary=min(tokens, round(stage.boundary * share)),
        diversity_quota=min(keep, round(stage.diversity_quota * share)),
        seeds=min(keep, stage.seeds),
    )
