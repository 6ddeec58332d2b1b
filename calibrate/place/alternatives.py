"""Plans of other kinds within a budget, to be tried beside the balanced stages (calibrate/place/candidates.py).

- **input**: everything is decided before layer 0, by coverage of the picture's features. At a small budget nothing else
  can be afforded: three full layers of 32 are 85 % of what 11 % of the tokens cost.
- **mixture**: coverage before layer 0, then stages by attention in the middle, where the question is known. The last
  ones go at the layer that drops everything, or stay to the end.
- **remainder**: balanced stages of which the last keeps some tokens to the end, for pictures that are read (the
  appendix of Balanced Token Pruning keeps 12.5 %).
- the **baselines** (calibrate/place/presets.py), each at the same budget.

Each is made for a number of tokens summed over the layers, which it uses as nearly as whole counts allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from calibrate.place.balance import Recipe
from calibrate.place.counts import EXPONENTS, Shape, counts_for
from calibrate.place.presets import PRESETS, Preset, ReleasedSettings, scaled_layers
from graphs.records.errors import InputError
from graphs.records.plan import Importance, PruningPlan, Stage

# The layers of a mixture's stages by attention, as shares of the decoder's depth.
MIXTURE_DEPTHS: tuple[tuple[float, ...], ...] = ((0.25,), (0.375,), (0.5,), (0.3, 0.6))
# How the counts fall: exponents to one base, the first of which is the count before layer 0.
MIXTURE_EXPONENTS = (1.0, 1.5, 2.0)
REMAINDER_LAYERS = (3, 6, 14)  # of 32: the released ones
REMAINDER_EXPONENTS = (EXPONENTS, (1.0, 1.6, 2.4))


@dataclass(frozen=True)
class Alternative:
    """A kind of plan: `make` gives one of at most so many tokens summed over the layers, None where there is none."""

    method: str
    make: Callable[[int], PruningPlan | None]


def alternatives(shape: Shape, *, final: int, released: ReleasedSettings | None = None) -> list[Alternative]:
    """All kinds. `final` is the layer from which on the model is known to do without the picture; `released` are the
    settings that `btp-paper` stands for. Tokens before layer 0 are weighed by their norm, and where the tower has a
    class token by its attention too.
    """
    saliency: tuple[Importance, ...] = ("norm", "vision-cls") if shape.class_token else ("norm",)
    return [
        *_before_the_decoder(shape, saliency),
        *_mixtures(shape, final, saliency[0]),
        *_remainders(shape),
        *_baselines(shape, released),
    ]


def covering(keep: int, saliency: Importance | None, *, centred: bool = True) -> Stage:
    """The stage before layer 0 that keeps `keep` tokens by coverage, gains weighed by `saliency` where it is given."""
    return Stage(
        layer=0,
        keep=keep,
        importance=saliency,
        diversity="coverage",
        features="centred" if centred else "raw",
        weights="none" if saliency is None else "scores",
    )


def _before_the_decoder(shape: Shape, saliency: Sequence[Importance]) -> Iterator[Alternative]:
    def of(rule: Importance | None, centred: bool) -> Callable[[int], PruningPlan | None]:
        def make(budget: int) -> PruningPlan | None:
            keep = min(budget // shape.num_layers, shape.image_tokens - 1)
            return shape.plan([covering(keep, rule, centred=centred)]) if keep else None

        return make

    yield from (Alternative(f"coverage x {rule}", of(rule, True)) for rule in saliency)
    yield Alternative("coverage", of(None, True))
    yield Alternative("coverage, raw features", of(None, False))


def _mixtures(shape: Shape, final: int, saliency: Importance) -> Iterator[Alternative]:
    for depths in MIXTURE_DEPTHS:
        layers = (0, *(max(n + 1, round(depth * shape.num_layers)) for n, depth in enumerate(depths)))
        for drop in (final, None):
            end = shape.num_layers if drop is None else drop
            if all(a < b for a, b in zip(layers, (*layers[1:], end), strict=True)):
                yield Alternative("mixture", _mixture(shape, layers, MIXTURE_EXPONENTS[: len(layers)], drop, saliency))


def _mixture(
    shape: Shape, layers: Sequence[int], exponents: Sequence[float], final: int | None, saliency: Importance
) -> Callable[[int], PruningPlan | None]:
    def make(budget: int) -> PruningPlan | None:
        keeps = counts_for(
            layers, exponents, budget=budget, num_layers=shape.num_layers, image_tokens=shape.image_tokens, final=final
        )
        if keeps is None:
            return None
        later = [by_attention(layer, keep) for layer, keep in zip(layers[1:], keeps[1:], strict=True)]
        drop = [] if final is None else [Stage(layer=final, keep=0)]
        return shape.plan([covering(keeps[0], saliency), *later, *drop])

    return make


def by_attention(layer: int, keep: int) -> Stage:
    """The best `keep` tokens by attention; the pool is the quota, as survivors of a coverage have no late bias to
    mend.
    """
    return Stage(layer=layer, keep=keep, attention_quota=keep, pool=keep, boundary=keep)


def _remainders(shape: Shape) -> Iterator[Alternative]:
    layers = scaled_layers(REMAINDER_LAYERS, 32, shape.num_layers)
    for exponents in REMAINDER_EXPONENTS:
        yield Alternative("remainder", _remainder(shape, layers, exponents[: len(layers)]))


def _remainder(shape: Shape, layers: Sequence[int], exponents: Sequence[float]) -> Callable[[int], PruningPlan | None]:
    def make(budget: int) -> PruningPlan | None:
        keeps = counts_for(
            layers, exponents, budget=budget, num_layers=shape.num_layers, image_tokens=shape.image_tokens
        )
        return None if keeps is None else Recipe().plan(shape, layers, keeps)

    return make


def _baselines(shape: Shape, released: ReleasedSettings | None) -> Iterator[Alternative]:
    for name, entry in PRESETS.items():
        if name != "none" and (released is not None or not entry.uses_released):
            yield Alternative(name, partial(_baseline, entry, shape, released))


def _baseline(entry: Preset, shape: Shape, released: ReleasedSettings | None, budget: int) -> PruningPlan | None:
    try:
        return entry.make(shape, budget, released)
    except InputError:  # the method cannot come down to this budget
        return None
