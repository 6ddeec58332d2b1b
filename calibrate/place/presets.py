"""Plans by name: the released settings of BTP, and the methods it is compared with as special cases of one plan.

The released settings of a model are passed in: its family has them (btp_export/families/).

Every preset is scaled to the model: published layers by L / L_published, counts by V. Asked for a compression, counts
are solved so that the plan comes as near to it from below as integer counts allow. Asked for average tokens, to be
compared with another plan, it comes as near as they allow from either side: within half a token, and within 1 % where
that is more. `vtw` moves by whole layers; with a budget between two layers it withdraws part of the tokens one layer
early (docs/decisions/vtw-between-layers.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from calibrate.place.counts import Shape, counts_for
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan, Stage

REMAINDER = 1 / 8  # of the tokens, kept to the last layer where pictures are read


@dataclass(frozen=True)
class ReleasedStage:
    """One stage of released settings: counts as shares of `keep`, and keep and seeds as shares of V.

    `factor` is pool / attention quota. `diversity` None: all that the attention quota leaves.
    """

    layer: int
    keep: float
    attention: float
    factor: float
    diversity: float | None
    seeds: float = 0.0


@dataclass(frozen=True)
class ReleasedSettings:
    """What the authors of BTP released for one model: stages, the layer that drops everything, and its layers L.

    `caution` says what others found the settings to lose, in a sentence for whoever uses them.
    """

    stages: tuple[ReleasedStage, ...]
    drop_layer: int
    num_layers: int
    caution: str = ""


@dataclass(frozen=True)
class Preset:
    """A named recipe: `make(shape, budget, released)`.

    `budget` is in tokens summed over the layers, None for the recipe's own setting. `released` are the settings that
    the model's family brings, which only a recipe with `uses_released` looks at.
    """

    name: str
    summary: str
    make: Callable[[Shape, int | None, ReleasedSettings | None], PruningPlan]
    uses_released: bool = False


def preset(
    name: str,
    *,
    model_type: str,
    num_layers: int,
    image_tokens: int,
    grid: tuple[int, int],
    blocks: tuple[tuple[int, int], ...] = (),
    released: ReleasedSettings | None = None,
    average_tokens: float | None = None,
    compression: float | None = None,
    class_token: bool = False,
) -> PruningPlan:
    """The plan of that name for a decoder of L layers and V image tokens on `grid` (or in `blocks`).

    Without a budget it has its method's own published setting; `btp-paper` takes it from `released`. Raises InputError
    for an unknown name, `btp-paper` without settings, `visionzip-select` without a `class_token`, two budgets, and a
    budget that the method cannot reach.
    """
    if name not in PRESETS:
        raise InputError(f"no preset is called {name!r}", wanted=", ".join(PRESETS), do="btp-export plan --list")
    if average_tokens is not None and compression is not None:
        raise InputError("both an average and a compression", wanted="one of them", do="leave one out")
    shape = Shape(model_type, num_layers, image_tokens, grid, blocks, class_token)
    if average_tokens is not None:
        return _nearest(PRESETS[name], shape, released, average_tokens)
    return PRESETS[name].make(shape, None if compression is None else _budget(compression, shape), released)


def _nearest(entry: Preset, shape: Shape, released: ReleasedSettings | None, average_tokens: float) -> PruningPlan:
    """The plan from below, or the one for half a token more, whichever average is nearer."""
    budget = _budget(1.0 - average_tokens / shape.image_tokens, shape)
    below = entry.make(shape, budget, released)
    half = min(budget + -(-shape.num_layers // 2), shape.num_layers * shape.image_tokens)
    return min((below, entry.make(shape, half, released)), key=lambda plan: abs(plan.average_tokens - average_tokens))


def _budget(compression: float, shape: Shape) -> int:
    if not 0.0 <= compression < 1.0:
        raise InputError(f"compression {compression}", wanted="a number from 0 to below 1", do="--compression 0.78")
    return math.floor((1.0 - compression) * shape.num_layers * shape.image_tokens + 1e-6)


def scaled_layers(layers: Sequence[int], published: int, num_layers: int) -> tuple[int, ...]:
    """Published layers brought to a decoder of `num_layers`, rounded, rising, at least 1, below `num_layers`.

    Fewer come back where the decoder has no room for all; the last ones are kept.
    """
    scaled: list[int] = []
    for layer in layers:
        least = scaled[-1] + 1 if scaled else 1
        scaled.append(max(least, math.floor(layer * num_layers / published + 0.5)))
    excess = scaled[-1] - (num_layers - 1)
    if excess > 0:
        top = num_layers - len(scaled)
        scaled = [min(layer, top + n) for n, layer in enumerate(scaled)]
    return tuple(layer for layer in scaled if layer >= 1)


def _none(shape: Shape, budget: int | None, _: ReleasedSettings | None) -> PruningPlan:
    """Nothing is pruned, whatever the budget: the plan the others are measured against."""
    return shape.unpruned


def _settings_of(released: ReleasedSettings | None, shape: Shape, name: str) -> ReleasedSettings:
    if released is None:
        raise InputError(
            f"{name} for {shape.model_type}",
            wanted="a model whose family has released settings",
            do="another preset, or btp-export calibrate",
        )
    return released


def _btp_paper(shape: Shape, budget: int | None, released: ReleasedSettings | None) -> PruningPlan:
    released = _settings_of(released, shape, "btp-paper")
    layers = scaled_layers(
        [*(stage.layer for stage in released.stages), released.drop_layer], released.num_layers, shape.num_layers
    )
    settings = released.stages[len(released.stages) + 1 - len(layers) :] if len(layers) > 1 else ()
    # A count of 1 is the least a stage can keep, and counts must fall.
    keeps = [
        max(len(settings) - n, math.floor(shape.image_tokens * stage.keep + 1e-9)) for n, stage in enumerate(settings)
    ]
    if budget is not None and layers:
        exponents = [-math.log2(stage.keep) for stage in settings]
        layers, keeps = _fit(layers, exponents, shape, budget, drops=True, name="btp-paper")
        settings = settings[len(settings) - len(keeps) :]
    stages, tokens = [], shape.image_tokens
    for n, (layer, keep, stage) in enumerate(zip(layers, keeps, settings, strict=False)):
        stages.append(_released_stage(layer, keep, stage, tokens, shape, first=n == 0))
        tokens = keep
    return shape.plan([*stages, *(Stage(layer=layer, keep=0) for layer in layers[len(keeps) :])])


def _btp_paper_corrected(shape: Shape, budget: int | None, released: ReleasedSettings | None) -> PruningPlan:
    """The released stages with 12.5 % of the tokens kept to the end, as the paper's appendix has it."""
    released = _settings_of(released, shape, "btp-paper-corrected")
    *first, last = released.stages
    stages = (*first, replace(last, keep=max(last.keep, REMAINDER)))
    layers = scaled_layers([stage.layer for stage in stages], released.num_layers, shape.num_layers)
    settings = stages[len(stages) - len(layers) :]
    keeps = [max(len(settings) - n, math.floor(shape.image_tokens * stage.keep)) for n, stage in enumerate(settings)]
    if budget is not None:
        exponents = [-math.log2(stage.keep) for stage in settings]
        layers, keeps = _fit(layers, exponents, shape, budget, drops=False, name="btp-paper-corrected")
    pruned, tokens = [], shape.image_tokens
    for n, (layer, keep, stage) in enumerate(zip(layers, keeps, settings, strict=True)):
        pruned.append(_released_stage(layer, keep, stage, tokens, shape, first=n == 0))
        tokens = keep
    return shape.plan(pruned)


def _released_stage(layer: int, keep: int, settings: ReleasedStage, tokens: int, shape: Shape, *, first: bool) -> Stage:
    """Shares to integers as the released code does: quotas are cut, pool = factor x cut quota, cut."""
    quota, share = math.floor(settings.attention * keep + 1e-9), settings.diversity
    seeds = min(keep, shape.grid[0] * shape.grid[1], math.floor(settings.seeds * shape.image_tokens))
    return Stage(
        layer=layer,
        keep=keep,
        attention_quota=quota,
        pool=max(quota, min(tokens, math.floor(settings.factor * quota + 1e-9))),
        boundary=keep,
        diversity_quota=keep - quota if share is None else min(keep, math.floor(share * keep + 1e-9)),
        seeds=seeds if first else 0,
    )


def _fit(
    layers: Sequence[int], exponents: Sequence[float], shape: Shape, budget: int, *, drops: bool, name: str
) -> tuple[tuple[int, ...], list[int]]:
    """Layers and counts V rho^exponent within `budget`; layers move down evenly where the budget is too small.

    With `drops` the last of `layers` is where everything goes. The first factor is taken for which rho is between a
    quarter and three quarters, so that neither layers nor counts bear the whole budget; else any that works.
    """
    spare: tuple[tuple[int, ...], list[int]] | None = None
    for step in range(40):
        factor = 1.0 - step / 40
        moved = scaled_layers(layers, shape.num_layers, shape.num_layers) if step == 0 else _moved(layers, factor)
        stages, final = (moved[:-1], moved[-1]) if drops else (moved, None)
        keeps = stages and counts_for(
            stages, exponents, budget=budget, num_layers=shape.num_layers, image_tokens=shape.image_tokens, final=final
        )
        if not keeps:
            continue
        rho = (keeps[0] / shape.image_tokens) ** (1 / exponents[0])
        if 0.25 <= rho <= 0.75:
            return moved, list(keeps)
        spare = spare or (moved, list(keeps))
    if spare is None:
        raise InputError(
            f"{name} cannot come down to {budget / shape.num_layers:.1f} average tokens with {shape.num_layers} layers",
            wanted="a larger budget",
            do="ask for less compression",
        )
    return spare


def _moved(layers: Sequence[int], factor: float) -> tuple[int, ...]:
    moved: list[int] = []
    for layer in layers:
        moved.append(max(moved[-1] + 1 if moved else 1, math.floor(layer * factor + 0.5)))
    return tuple(moved)


def _attention_stage(layer: int, keep: int) -> Stage:
    """The best `keep` tokens by attention, no rebalance: the pool is the quota."""
    return Stage(layer=layer, keep=keep, attention_quota=keep, pool=keep, boundary=keep)


def _fastv(shape: Shape, budget: int | None, _: ReleasedSettings | None) -> PruningPlan:
    """One early stage by attention (published: layer 2 of 32, half kept)."""
    layers = scaled_layers((2,), 32, shape.num_layers)
    keeps = [shape.image_tokens // 2]
    if budget is not None:
        layers, keeps = _fit(layers, (1.0,), shape, budget, drops=False, name="fastv")
    return shape.plan([_attention_stage(layer, keep) for layer, keep in zip(layers, keeps, strict=True)])


def _pyramiddrop(shape: Shape, budget: int | None, _: ReleasedSettings | None) -> PruningPlan:
    """Half of the tokens again and again, by attention (published: at layers 8, 16 and 24 of 32)."""
    layers = scaled_layers((8, 16, 24), 32, shape.num_layers)
    exponents = (1.0, 2.0, 3.0)[: len(layers)]
    if budget is None:
        keeps = [max(len(layers) - n, shape.image_tokens >> (n + 1)) for n in range(len(layers))]
    else:
        layers, keeps = _fit(layers, exponents, shape, budget, drops=False, name="pyramiddrop")
    return shape.plan([_attention_stage(layer, keep) for layer, keep in zip(layers, keeps, strict=True)])


def _divprune(shape: Shape, budget: int | None, _: ReleasedSettings | None) -> PruningPlan:
    """Farthest-point selection before layer 0 (published: 9.8 % kept)."""
    keep = _keep_from_start(shape, budget, 0.098)
    return shape.plan([Stage(layer=0, keep=keep, boundary=keep, diversity_quota=keep)])


def _scope(shape: Shape, budget: int | None, _: ReleasedSettings | None) -> PruningPlan:
    """Coverage before layer 0, gains weighed by saliency (published: 64 of 576 tokens, saliency from the tower)."""
    keep = _keep_from_start(shape, budget, 1 / 9)
    return shape.plan(
        [Stage(layer=0, keep=keep, importance="norm", diversity="coverage", features="centred", weights="scores")]
    )


def _visionzip_select(shape: Shape, budget: int | None, _: ReleasedSettings | None) -> PruningPlan:
    """What VisionZip keeps as it is, before layer 0: dominant tokens by the class token's attention, then contextual
    ones (published: 54 and 10 of 576). The contextual ones are the most spread-out of the rest here, and not merged.
    """
    if not shape.class_token:
        raise InputError(
            f"visionzip-select for {shape.model_type}",
            wanted="a model whose vision tower has a class token (of a bundle: one that was exported by this version)",
            do="scope or divprune, which need none",
        )
    keep = _keep_from_start(shape, budget, 1 / 9)
    dominant = max(1, math.floor(keep * 54 / 64 + 0.5))
    stage = Stage(
        layer=0,
        keep=keep,
        importance="vision-cls",
        attention_quota=dominant,
        pool=dominant,
        boundary=shape.image_tokens,
    )
    return shape.plan([stage])


def _vtw(shape: Shape, budget: int | None, _: ReleasedSettings | None) -> PruningPlan:
    """All tokens go at one layer (published: half way), a fixed random set one layer earlier to meet a budget."""
    if budget is None:
        return shape.plan([Stage(layer=max(1, shape.num_layers // 2), keep=0)])
    layer, rest = divmod(budget, shape.image_tokens)
    stages = [_attention_stage(layer, rest)] if rest else []
    if layer + len(stages) < shape.num_layers:
        stages.append(Stage(layer=layer + len(stages), keep=0))
    return shape.plan(stages, importance="random" if rest else "last-token")


def _random(shape: Shape, budget: int | None, _: ReleasedSettings | None) -> PruningPlan:
    """Tokens drawn at random before layer 0 (once, when the plan is made: graphs are static)."""
    keep = _keep_from_start(shape, budget, 0.22)
    return shape.plan([_attention_stage(0, keep)], importance="random")


def _dart(shape: Shape, budget: int | None, _: ReleasedSettings | None) -> PruningPlan:
    """A few pivots and the tokens least similar to them, before layer 0."""
    keep = _keep_from_start(shape, budget, 0.22)
    return shape.plan([_attention_stage(0, keep)], importance="pivot-distance")


def _keep_from_start(shape: Shape, budget: int | None, share: float) -> int:
    keep = math.floor(share * shape.image_tokens) if budget is None else budget // shape.num_layers
    return max(1, min(keep, shape.image_tokens - 1))


PRESETS: dict[str, Preset] = {
    entry.name: entry
    for entry in (
        Preset("none", "nothing is pruned", _none),
        Preset(
            "btp-paper",
            "the released settings of Balanced Token Pruning, scaled to the model",
            _btp_paper,
            uses_released=True,
        ),
        Preset(
            "btp-paper-corrected",
            "the released stages, but 12.5 % of the tokens stay to the end",
            _btp_paper_corrected,
            uses_released=True,
        ),
        Preset("fastv", "one early stage by attention", _fastv),
        Preset("pyramiddrop", "several stages by attention", _pyramiddrop),
        Preset("divprune", "the most spread-out tokens, before layer 0", _divprune),
        Preset("scope", "the tokens that cover the picture, weighed by their norm, before layer 0", _scope),
        Preset(
            "visionzip-select",
            "the tokens that the vision tower's class token looks at, before layer 0",
            _visionzip_select,
        ),
        Preset("vtw", "all tokens until one layer, none after it", _vtw),
        Preset("random", "tokens by lot, before layer 0", _random),
        Preset("dart", "pivots and the tokens least like them, before layer 0", _dart),
    )
}
