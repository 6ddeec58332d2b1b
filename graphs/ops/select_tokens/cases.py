"""Named examples of BtpSelectTokens, made from seeds; every form of the operator is tested on them."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_BUDGETS = (63, 127, 288)  # of 576


@dataclass(frozen=True)
class Case:
    """One call: scores [B,V] float32, similarity [B,V,V] float32 or float16, seeds [m] int32, or None; attributes."""

    name: str
    scores: Array
    similarity: Array | None
    seeds: Array | None
    attributes: dict[str, Any]

    @property
    def inputs(self) -> dict[str, Array]:
        """The inputs that are there, by name."""
        given = {"scores": self.scores, "similarity": self.similarity, "seeds": self.seeds}
        return {name: array for name, array in given.items() if array is not None}


def cases() -> list[Case]:
    """All examples, the largest (V 576, as released for LLaVA-1.5-7B) first."""
    return list(_cases())


@functools.cache  # many tests look for one of them
def _cases() -> tuple[Case, ...]:
    return (*_released(), *_small(), *_special_values(), *_edges(), *_coverage())


def large_case() -> Case:
    """V 2880 as in LLaVA-1.6: the released first stage scaled up, for benchmarks."""
    return _case(
        "large", 2880, 1440, quotas=(432, 432), pool=1598, boundary=1440, seeds=np.arange(720) * 4, channels=64
    )


def budget_cases() -> list[Case]:
    """Coverage before layer 0, weighted by a saliency: the token budgets in use, for V 576 and 2880."""
    return [_budget_case(576, keep) for keep in _BUDGETS] + [_budget_case(2880, keep) for keep in (320, 1440)]


def _budget_case(tokens: int, keep: int) -> Case:
    return _by_gain(_case(f"coverage-{tokens}-{keep}", tokens, keep, channels=64), weighted=1)


def _case(
    name: str,
    tokens: int,
    keep: int,
    *,
    batch: int = 1,
    quotas: tuple[int, int] = (0, 0),
    pool: int | None = None,
    boundary: int | None = None,
    seeds: Array | None = None,
    channels: int = 16,
    similarity: bool = True,
) -> Case:
    """A case of random features around a few common directions, as image tokens are; its numbers follow from `name`."""
    random = np.random.default_rng(np.frombuffer(name.encode(), np.uint8))
    attention, diversity = quotas
    centres = random.standard_normal((batch, 8, channels))
    features = centres[:, random.integers(0, 8, tokens)] + 0.7 * random.standard_normal((batch, tokens, channels))
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    return Case(
        name,
        random.exponential(1 / tokens, (batch, tokens)).astype(np.float32),
        (features @ features.transpose(0, 2, 1)).astype(np.float32) if similarity else None,
        None if seeds is None else seeds.astype(np.int32),
        {
            "keep": keep,
            "attention_quota": attention,
            "diversity_quota": diversity,
            "pool": attention if pool is None else pool,
            "boundary": keep if boundary is None else boundary,
        },
    )


def _half(case: Case) -> Case:
    assert case.similarity is not None
    return replace(case, name=f"{case.name}-float16", similarity=case.similarity.astype(np.float16))


def _released() -> list[Case]:
    """The stages of algorithm.md: 576 -> 288 -> 144 -> 48."""
    first = _case(
        "released-1", 576, 288, quotas=(86, 86), pool=318, boundary=288, seeds=np.arange(144) * 4, channels=64
    )
    second = _case("released-2", 288, 144, quotas=(129, 15), pool=194, channels=64)
    third = _case("released-3", 144, 48, quotas=(48, 0), pool=57, similarity=False)
    return [first, _half(first), second, _half(second), third, _case("diversity-only", 576, 64, channels=64)]


def _small() -> list[Case]:
    """Every combination of inputs and quotas, and batches whose rows need different numbers of fill steps."""
    scattered = np.array([21, 3, 3, 11, 7])
    some = [
        _case("attention-fill", 24, 12, quotas=(4, 0), pool=9),
        _case("diversity-fill", 24, 12, quotas=(0, 5)),
        _case("seeds-fill", 24, 12, seeds=scattered),
        _case("all-picks", 24, 12, quotas=(4, 3), pool=11, boundary=7, seeds=scattered),
        _case("quotas-full", 24, 12, quotas=(7, 5), pool=12),
        _case("cut-in-diversity", 24, 8, quotas=(5, 7), pool=10),
        _case("cut-in-seeds", 24, 9, quotas=(4, 4), pool=8, seeds=scattered),
        _case("cut-in-attention", 24, 4, quotas=(9, 3), pool=14, boundary=2, seeds=scattered),
        _case("batch", 30, 14, batch=4, quotas=(5, 5), pool=16, boundary=9, seeds=scattered),
        _case("batch-nearly-all", 30, 29, batch=4, quotas=(9, 9), pool=20, seeds=np.arange(12)),
        _case("no-seed-in-seeds", 24, 12, quotas=(4, 3), pool=9, seeds=np.arange(0)),
        _case("nothing-but-empty-seeds", 24, 6, seeds=np.arange(0)),
    ]
    plain = [
        _case("scores-only", 24, 12, quotas=(5, 0), pool=12, boundary=6, similarity=False),
        _case("scores-only-batch", 24, 12, batch=3, quotas=(5, 0), pool=12, boundary=6, similarity=False),
        _case("scores-only-no-quota", 24, 12, similarity=False),
        _case("pool-above-tokens", 24, 12, quotas=(8, 0), pool=40, similarity=False),
    ]
    return [*some, *map(_half, some), *plain]


def _special_values() -> list[Case]:
    """Ties, NaN, infinities, signed zeros, and a similarity that is not symmetric."""
    base = _case("special", 20, 11, batch=2, quotas=(4, 3), pool=9, boundary=12, seeds=np.array([5, 1]))
    attention = replace(_case("special-scores", 20, 11, batch=2, quotas=(6, 0), pool=14, boundary=8), similarity=None)
    assert base.similarity is not None
    random = np.random.default_rng(7)
    odd = np.array([np.nan, -np.inf, np.inf, 0.0, -0.0, 1.0, 1.0, -1.0], np.float32)
    odd_scores = odd[random.integers(0, len(odd), base.scores.shape)]
    few = np.array([-0.25, 0.0, 0.25, 1.0], np.float32)[random.integers(0, 4, base.similarity.shape)]
    broken = base.similarity.copy()
    broken[:, [4, 13]] = broken[:, :, [4, 13]] = np.nan
    infinite = np.array([np.nan, np.inf, -np.inf, 0.5, -0.5], np.float32)[random.integers(0, 5, base.similarity.shape)]
    return [
        replace(base, name="scores-equal", scores=np.zeros_like(base.scores)),
        replace(base, name="scores-odd", scores=odd_scores),
        replace(base, name="scores-all-nan", scores=np.full_like(base.scores, np.nan)),
        replace(attention, name="scores-only-odd", scores=odd_scores),
        replace(base, name="similarity-equal", similarity=np.ones_like(base.similarity)),
        replace(base, name="similarity-ties", similarity=np.maximum(few, few.transpose(0, 2, 1))),
        replace(base, name="similarity-broken-tokens", similarity=broken),
        replace(base, name="similarity-all-nan", similarity=np.full_like(base.similarity, np.nan)),
        replace(base, name="similarity-infinite", similarity=infinite),
        _half(replace(base, name="similarity-infinite", similarity=infinite)),
        replace(base, name="similarity-not-symmetric", similarity=few),
        replace(base, name="rounding-ties", similarity=few * np.float32(1e-9)),
    ]


def _edges() -> list[Case]:
    """One token, two tokens, keep 1, keep V."""
    return [
        _case("one-token", 1, 1),
        _case("one-token-all", 1, 1, quotas=(1, 1), pool=1, seeds=np.zeros(1)),
        _case("one-token-scores-only", 1, 1, similarity=False),
        _case("two-tokens", 2, 1, batch=2),
        _case("keep-one", 16, 1, quotas=(1, 1), pool=3, seeds=np.array([3])),
        _case("keep-all", 16, 16, batch=2, quotas=(5, 3), pool=9),
        _case("keep-all-from-nothing", 16, 16),
        _case("keep-all-scores-only", 16, 16, similarity=False),
        _case("boundary-zero", 16, 8, quotas=(5, 0), pool=9, boundary=0),
        _case("boundary-above", 16, 8, quotas=(5, 0), pool=9, boundary=99),
        _case("diversity-all", 16, 9, quotas=(0, 16)),
    ]


def _by_gain(case: Case, *, weighted: int = 0, name: str | None = None) -> Case:
    """The same call with the coverage rule."""
    attributes = case.attributes | {"diversity_rule": "coverage", "weighted": weighted}
    return replace(case, name=name or case.name, attributes=attributes)


def _coverage() -> list[Case]:
    """What the other cases show, under the coverage rule; and the weights, ties and roundings of that rule alone."""
    again = {case.name: case for case in [*_released(), *_small(), *_special_values(), *_edges()]}
    both = [
        *("released-1", "released-1-float16", "attention-fill", "diversity-fill", "seeds-fill", "all-picks"),
        *("all-picks-float16", "quotas-full", "cut-in-diversity", "cut-in-seeds", "cut-in-attention", "batch"),
        *("batch-nearly-all", "nothing-but-empty-seeds", "scores-only", "similarity-equal", "similarity-ties"),
        *("similarity-broken-tokens", "similarity-all-nan", "similarity-infinite", "similarity-infinite-float16"),
        *("similarity-not-symmetric", "rounding-ties", "one-token", "one-token-all", "two-tokens", "keep-one"),
        *("keep-all", "keep-all-from-nothing", "diversity-all"),
    ]
    weighted = ["scores-equal", "scores-odd", "scores-all-nan", "all-picks", "batch", "keep-all", "released-2-float16"]
    plain = _by_gain(_case("coverage-of-nothing", 24, 12, batch=2), weighted=1)
    assert plain.similarity is not None
    scores = np.linspace(-1, 1, 48, dtype=np.float32).reshape(2, 24)
    halves = (np.arange(24 * 48).reshape(2, 24, 24) % 97 + 0.5) / np.float32(32767)
    return [
        *(_by_gain(again[name], name=f"coverage-{name}") for name in both),
        *(_by_gain(again[name], weighted=1, name=f"coverage-weighted-{name}") for name in weighted),
        *(_budget_case(576, keep) for keep in _BUDGETS),
        replace(plain, name="coverage-weights-negative", scores=scores),
        replace(plain, name="coverage-weights-infinite", scores=np.where(scores > 0.5, np.float32(np.inf), scores)),
        replace(plain, name="coverage-weights-tiny", scores=scores * np.float32(1e-42)),
        replace(plain, name="coverage-similarity-negative", similarity=-np.abs(plain.similarity)),
        replace(plain, name="coverage-similarity-above-one", similarity=plain.similarity * np.float32(3)),
        replace(plain, name="coverage-rounds-halves", similarity=halves.astype(np.float32)),
    ]
