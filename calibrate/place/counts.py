"""From a budget to integer counts: how many tokens each stage keeps.

A plan of stages at layers l_1 < ... < l_n that keep k_1 > ... > k_n sees on average
(l_1 V + (l_2 - l_1) k_1 + ... + (L - l_n) k_n) / L image tokens. Counts fall as the released settings fall:
k_i = V rho^e_i with e = (1, 2, log2 12), for which rho = 1/2 gives the 288, 144 and 48 of 576. One number, rho, is
solved so that the budget is met; floors and a last adjustment make the counts integers that never exceed it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan, Stage, with_keep

DEFAULT_COMPRESSION = 0.78  # the paper's: 129 of 576 tokens on average
EXPONENTS = (1.0, 2.0, math.log2(12.0))
FLAT_EXPONENTS = (1.0, 1.2, 1.5)  # counts that fall little: for models whose image tokens all matter until they go


@dataclass(frozen=True)
class Shape:
    """The decoder and picture a plan is made for: L layers, V image tokens on a grid of rows and columns.

    `blocks` are the token blocks of a picture that is not one grid (graphs/records/token_layout.py). `class_token`:
    whether the vision tower has one, so that plans may score by its attention.
    """

    model_type: str
    num_layers: int
    image_tokens: int
    grid: tuple[int, int]
    blocks: tuple[tuple[int, int], ...] = ()
    class_token: bool = False

    @staticmethod
    def of(plan: PruningPlan) -> Shape:
        """The shape a plan is for."""
        return Shape(plan.model_type, plan.num_layers, plan.image_tokens, plan.grid, plan.blocks)

    @property
    def most_seeds(self) -> int:
        """Tokens of the fixed spatial set, V/4, or all that have a place on the grid where that is fewer."""
        placed = sum(rows * columns for rows, columns in self.blocks or (self.grid,))
        return min(self.image_tokens // 4, placed)

    @property
    def unpruned(self) -> PruningPlan:
        """The plan that keeps every token, as PruningPlan.without_stages gives it."""
        return self.plan(())

    def plan(self, stages: Sequence[Stage], **settings: object) -> PruningPlan:
        """A plan of `stages` for this shape."""
        return PruningPlan.model_validate(
            {
                "model_type": self.model_type,
                "num_layers": self.num_layers,
                "image_tokens": self.image_tokens,
                "grid": self.grid,
                "blocks": self.blocks,
                "stages": tuple(stages),
                **settings,
            }
        )


def exponents_for(stages: int, family: Sequence[float] = EXPONENTS) -> tuple[float, ...]:
    """Exponents of `stages` stages: those of the family, continued by the step from its second last to its last."""
    step = family[-1] - family[-2]
    more = (family[-1] + step * n for n in range(1, stages - len(family) + 1))
    return (*family[:stages], *more)


def exponents_of(keeps: Sequence[int], image_tokens: int) -> tuple[float, ...]:
    """Exponents to the base 1/2 with which `counts_for` gives these counts (all above 0) again at their own budget."""
    return tuple(max(1e-6, -math.log2(keep / image_tokens)) for keep in keeps)


def tokens_within(compression: float, num_layers: int, image_tokens: int) -> int:
    """The most image tokens, summed over the layers, that a plan of `compression` (0 <= c < 1) may see.

    Raises InputError for a compression that leaves no token a layer, which no plan can reach.
    """
    if not 0.0 <= compression < 1.0:
        raise InputError(f"compression {compression}", wanted="a number from 0 to below 1", do="--compression 0.78")
    budget = math.floor((1.0 - compression) * num_layers * image_tokens + 1e-6)
    if budget < num_layers:
        raise InputError(
            f"compression {compression} leaves less than one image token",
            wanted=f"at most {1 - 1 / image_tokens:.4f}",
            do="ask for less",
        )
    return budget


def token_budget(compression: float, num_layers: int, image_tokens: int) -> int:
    """The same for a plan whose stages lie inside the decoder: its first layer sees the whole picture.

    Raises InputError for a compression that no such plan can reach.
    """
    budget = tokens_within(compression, num_layers, image_tokens)
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
    return _counts_for(tuple(layers), tuple(exponents), budget, num_layers, image_tokens, final)


@functools.lru_cache(maxsize=4096)  # bootstrap samples place their stages at the same few layers again and again
def _counts_for(
    layers: tuple[int, ...],
    exponents: tuple[float, ...],
    budget: int,
    num_layers: int,
    image_tokens: int,
    final: int | None,
) -> tuple[int, ...] | None:
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


def refitted(plan: PruningPlan, compression: float) -> PruningPlan:
    """The same stage layers and balance with counts for another budget; the plan itself where it already meets it.

    Raises InputError if the budget cannot be met at these layers.
    """
    shape = Shape.of(plan)
    budget = token_budget(compression, shape.num_layers, shape.image_tokens)
    used = sum(plan.tokens_per_layer())
    if used <= budget < used + shape.num_layers:
        return plan
    keeping = [stage for stage in plan.stages if stage.keep]
    drops = [stage for stage in plan.stages if not stage.keep]
    layers = [stage.layer for stage in keeping]
    exponents = exponents_of([stage.keep for stage in keeping], shape.image_tokens)
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
        stages.append(with_keep(stage, keep, tokens))
        tokens = keep
    return plan.model_copy(update={"stages": (*stages, *drops)})
