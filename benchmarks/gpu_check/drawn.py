"""Further cases of BtpSelectTokens: large ones of the sizes in use, and drawn ones. Similarities are calls.Gram."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.gpu_check.calls import Array, Given, Gram
from graphs.ops.select_tokens.cases import budget_cases, large_case
from graphs.ops.select_tokens.schema import COVERAGE, FARTHEST

SELECT = "select_tokens"
CHANNELS = 64


def large_cases() -> Iterator[Given]:
    """V 576, 2,880 and 8,192 for replays; the operator's own large cases and every form of the kernel for the rest."""
    first = _counts(288, quotas=(86, 86), pool=318, boundary=288)
    seeds = np.arange(144, dtype=np.int32) * 4
    yield _large("exact-576", 576, first, seeds, tags=("replayed", "green", "timed"))
    yield _large("exact-576-float16", 576, first, seeds, dtype=np.float16, tags=("timed",))
    yield _large("exact-576-batch-8", 576, first, seeds, batch=8, tags=("timed",))
    large = large_case()
    for dtype in (np.float32, np.float16):
        tags = ("replayed", "green", "timed") if dtype is np.float32 else ("timed",)
        yield _large(f"exact-2880-{np.dtype(dtype)}", 2880, large.attributes, large.seeds, dtype=dtype, tags=tags)
    for case in budget_cases():
        tokens, keep = case.scores.shape[1], case.attributes["keep"]
        tags = ("timed", *(("replayed", "green") if (tokens, keep) in ((576, 127), (2880, 320)) else ()))
        yield _large(f"exact-{case.name}", tokens, case.attributes, None, tags=tags)
    few = _counts(512, quotas=(128, 32), pool=256, boundary=4096)
    yield _large("exact-8192", 8192, few, np.arange(256, dtype=np.int32) * 32, tags=("replayed", "timed"))
    covering = _counts(48, quotas=(12, 16), pool=64, boundary=4096) | {"diversity_rule": COVERAGE, "weighted": 1}
    yield _large("exact-coverage-8192", 8192, covering, np.arange(8, dtype=np.int32) * 1000)
    for tokens in (1025, 3840, 4097):
        counts = _counts(tokens // 4, quotas=(tokens // 16, tokens // 16), pool=tokens // 8, boundary=tokens // 2)
        yield _large(f"exact-{tokens}", tokens, counts, np.arange(tokens // 8, dtype=np.int32) * 7)


def _counts(keep: int, *, quotas: tuple[int, int], pool: int, boundary: int) -> dict[str, Any]:
    attention, diversity = quotas
    return {
        "keep": keep, "attention_quota": attention, "diversity_quota": diversity, "pool": pool, "boundary": boundary,
    }  # fmt: skip


def _large(
    name: str,
    tokens: int,
    attributes: dict[str, Any],
    seeds: Array | None,
    *,
    batch: int = 1,
    dtype: npt.DTypeLike = np.float32,
    tags: tuple[str, ...] = (),
) -> Given:
    """Features around a few common directions, as image tokens are, rounded to whole 127ths of their length."""
    random = np.random.default_rng(np.frombuffer(name.encode(), np.uint8))
    centres = random.standard_normal((batch, 8, CHANNELS))
    features = centres[:, random.integers(0, 8, tokens)] + 0.7 * random.standard_normal((batch, tokens, CHANNELS))
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    scores = random.exponential(1 / tokens, (batch, tokens)).astype(np.float32)
    gram = Gram(np.rint(features * 127).astype(np.int8), shift=14, dtype=dtype)
    inputs: dict[str, Any] = {"scores": scores, "similarity": gram}
    return Given(SELECT, name, inputs | ({} if seeds is None else {"seeds": seeds}), attributes, ("large", *tags))


ODD = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0], np.float32)


def drawn_cases(count: int) -> Iterator[Given]:
    """Random legal calls of V up to 700 with many ties, every third by gain, every fifth with NaN and infinities."""
    random = np.random.default_rng(20)
    for number in range(count):
        tokens, batch = int(random.integers(1, 700)), int(random.integers(1, 4))
        attention, diversity, seeds = (int(random.integers(0, tokens + 1)) for _ in range(3))
        attributes = _counts(
            int(random.integers(1, tokens + 1)),
            quotas=(attention, diversity),
            pool=attention + int(random.integers(0, tokens + 1)),
            boundary=int(random.integers(0, tokens + 1)),
        )
        scores = random.standard_normal((batch, tokens)).astype(np.float32)
        if number % 2:
            scores = np.round(scores)
        if number % 5 == 0:
            scores.reshape(-1)[random.integers(0, scores.size, 5)] = random.choice(ODD, 5)
        if number % 7 == 6:
            yield Given(SELECT, f"drawn-{number}", {"scores": scores}, attributes | {"diversity_quota": 0}, ("drawn",))
            continue
        attributes["diversity_rule"] = COVERAGE if number % 3 == 0 else FARTHEST
        attributes["weighted"] = int(number % 6 == 0)
        inputs: dict[str, Any] = {"scores": scores, "similarity": _similarity(random, batch, tokens, number)}
        if number % 2:
            inputs["seeds"] = random.integers(0, tokens, seeds).astype(np.int32)
        yield Given(SELECT, f"drawn-{number}", inputs, attributes, ("drawn",))


def _similarity(random: np.random.Generator, batch: int, tokens: int, number: int) -> Gram:
    """Of few channels, so that many similarities are equal; with odd values here and there."""
    features = random.integers(-6, 7, (batch, tokens, 4)).astype(np.int8)
    dtype = np.float16 if number % 4 > 1 else np.float32
    if number % 5:
        return Gram(features, shift=7, dtype=dtype)
    places = np.unique(random.integers(0, batch * tokens * tokens, 20)).astype(np.int32)
    return Gram(features, 7, dtype, places, random.choice(ODD, len(places)).astype(np.float32))


# -- what a selection has to wait for ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What the floor of a call is made of: dependent steps, V, and bytes read once from memory."""

    steps: int
    tokens: int
    bytes: int


def shape_of(given: Given, wanted: Array) -> Shape:
    """The shape of a selection by distance or by gain whose output is known.

    Steps are the picks that wait for the one before them: diversity_quota, and what rule 4 has to add, of the batch row
    that needs most.
    """
    scores = given.inputs["scores"]
    assert isinstance(scores, np.ndarray)
    tokens, attributes = scores.shape[1], given.attributes
    similarity = given.arrays().get("similarity")
    if similarity is None:
        return Shape(0, tokens, 0)
    seeds = given.inputs.get("seeds")
    most = max(
        attributes["keep"] - len(base)
        for base in _bases(scores, similarity, seeds if isinstance(seeds, np.ndarray) else None, attributes)
    )
    from_nothing = attributes["diversity_quota"] > 0 or most == attributes["keep"]
    return Shape(attributes["diversity_quota"] + max(0, most), tokens, similarity.nbytes if from_nothing else 0)


def _bases(scores: Array, similarity: Array, seeds: Array | None, attributes: dict[str, Any]) -> Iterator[set[int]]:
    """Rule 3's base of each batch row, before it is cut."""
    import torch

    from graphs.ops import select_tokens

    none = attributes | {"attention_quota": 0, "diversity_quota": 0, "pool": scores.shape[1]}
    for row in range(len(scores)):
        ones, own = (torch.from_numpy(part[row : row + 1].copy()) for part in (scores, similarity))
        base: set[int] = set() if seeds is None else {int(seed) for seed in seeds}
        if (attention := attributes["attention_quota"]) > 0:
            only = none | {"keep": attention, "attention_quota": attention, "pool": attributes["pool"]}
            base |= set(select_tokens.reference(ones, **only)[0].tolist())
        if (diversity := attributes["diversity_quota"]) > 0:
            base |= set(select_tokens.reference(ones, own, **(none | {"keep": diversity}))[0].tolist())
        yield base
