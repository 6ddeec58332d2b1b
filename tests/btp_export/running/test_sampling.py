"""Sampling: properties for any logits, the same cut as transformers' own top-p, and the same token by btp_host."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import TopPLogitsWarper

from btp_export.running import sampling
from btp_export.running.sampling import check_settings, choose, probabilities
from engines.native.host import HostLibrary
from graphs.records.errors import CheckError, InputError
from tests.engines.native import builds

logits_of = arrays(np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32))
temperatures = st.floats(0.05, 5)
shares = st.floats(0.01, 1.0)


@given(logits_of)
def test_greedy_is_the_first_largest(logits: Any) -> None:
    chosen = choose(logits, np.random.default_rng(0), temperature=0.0, top_p=0.5)
    assert logits[chosen] == logits.max()
    assert not (logits[:chosen] == logits.max()).any()


@given(logits_of, temperatures, shares)
@example(np.array([0.0, 7.347e-41], np.float32), 1.0, 0.5)
def test_nucleus_is_the_smallest_most_probable_set(logits: Any, temperature: float, top_p: float) -> None:
    full = probabilities(logits, temperature=temperature, top_p=1.0)
    cut = probabilities(logits, temperature=temperature, top_p=top_p)
    assert cut.sum() == pytest.approx(1)
    kept = cut > 0
    assert full[kept].max() == full.max(), "of logits 0 and 1e-40, which are equally likely, either may be it"
    if (full[~kept] > 0).any():
        assert full[kept].min() >= full[~kept].max(), "a dropped token is more probable than a kept one"
    assert full[kept].sum() >= top_p - 1e-9
    assert full[kept].sum() - full[kept].min() < top_p + 1e-9, "one token fewer would have been enough"
    np.testing.assert_allclose(cut[kept], full[kept] / full[kept].sum(), rtol=1e-9)


@given(st.integers(0, 2**32 - 1), temperatures, st.floats(0.05, 0.95))
def test_top_p_is_that_of_transformers(seed: int, temperature: float, top_p: float) -> None:
    logits = np.random.default_rng(seed).standard_normal(50).astype(np.float32) * 3
    scores = torch.tensor(logits, dtype=torch.float64)[None] / temperature
    wanted = TopPLogitsWarper(top_p)(torch.zeros(1, 1, dtype=torch.long), scores).softmax(-1)[0].numpy()
    np.testing.assert_allclose(probabilities(logits, temperature=temperature, top_p=top_p), wanted, atol=1e-6)


@given(logits_of, temperatures, shares, st.integers(0, 1000))
def test_a_seed_decides_and_only_possible_tokens_come(logits: Any, temperature: float, top_p: float, seed: int) -> None:
    weights = probabilities(logits, temperature=temperature, top_p=top_p)
    drawn = [choose(logits, np.random.default_rng(seed), temperature=temperature, top_p=top_p) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert weights[drawn[0]] > 0


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    rng = np.random.default_rng(0)
    counts = np.bincount([choose(logits, rng, temperature=1.0, top_p=1.0) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.03)


@given(
    st.integers(0, 2**32 - 1), st.sampled_from([0.5, 3.0, 8.0]), st.floats(0.2, 3), st.sampled_from([1.0, 0.95, 0.5])
)
@example(636, 0.5, 2.9609375, 0.5)
def test_of_many_tokens_the_same_is_drawn_as_by_weighing_all(
    seed: int, spread: float, temperature: float, top_p: float
) -> None:
    """Flat and peaked logits: tokens near the largest decide alone, or all do.

    Logits are equal or well apart: which of two that differ by a rounding is the likelier, float64 says otherwise. And
    no sum reaches top-p within what weights are rounded by (5e-6): float64 may keep one token more or fewer there.
    """
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(4096) * spread
    logits[rng.integers(4096, size=3)] += rng.uniform(0, 12)
    logits = (np.round(logits * 1024) / 1024).astype(np.float32)
    ranked = np.sort(_weighed(logits.astype(np.float64), temperature, 1.0))[::-1]
    assume(top_p == 1 or np.abs(np.cumsum(ranked) - top_p).min() > 5e-6)
    sums = np.cumsum(_weighed(logits.astype(np.float64), temperature, top_p))
    for draw in range(8):
        share = np.random.default_rng(draw).random()
        token = choose(logits, np.random.default_rng(draw), temperature=temperature, top_p=top_p)
        below = sums[token - 1] if token else 0.0
        assert below - 1e-5 <= share <= sums[token] + 1e-5
        assert sums[token] > below


def _weighed(logits: Any, temperature: float, top_p: float) -> Any:
    """The probabilities, in float64 and by ranking every token."""
    weights = np.exp((logits - logits.max()) / temperature)
    weights /= weights.sum()
    order = np.argsort(-weights, kind="stable")
    before = np.cumsum(weights[order]) - weights[order]
    weights[order[before >= top_p]] = 0
    return weights / weights.sum()


def test_extreme_numbers() -> None:
    logits = np.array([1.0, -np.inf, 3.0], np.float32)
    assert probabilities(logits, temperature=1e-300, top_p=1.0)[2] == 1
    assert probabilities(logits, temperature=1.0, top_p=1.0)[1] == 0
    many = np.tile(logits, 8)
    assert many[choose(many, np.random.default_rng(0), temperature=1e-300, top_p=1.0)] == 3
    assert many[choose(many, np.random.default_rng(0), temperature=1e300, top_p=1.0)] > 0
    for bad in (np.nan, np.inf):
        with pytest.raises(CheckError, match="largest"):
            probabilities(np.array([0.0, bad], np.float32), temperature=0.0, top_p=1.0)


@pytest.mark.parametrize("settings", [(-1.0, 1.0), (float("nan"), 1.0), (1.0, 0.0), (1.0, 1.5), (1.0, 1.0, -1)])
def test_settings_out_of_range(settings: Any) -> None:
    with pytest.raises(InputError):
        check_settings(*settings)


@pytest.fixture(scope="module", params=["plain", "avx2", "avx512"])
def library(request: pytest.FixtureRequest) -> HostLibrary:
    return HostLibrary(builds.host_library(request.param))


def drawn(weights: Any, top_p: float, share: float) -> int:
    """By the definition, in Python's own numbers: of the fewest likeliest tokens the first that reaches the share."""
    kept = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    if top_p < 1:
        wanted, sums = top_p * float(sum(weights)), np.cumsum([weights[token] for token in kept]).tolist()
        kept = kept[: next(place for place, reached in enumerate(sums) if reached >= wanted) + 1]
    limit, reached = share * float(sum(weights[token] for token in kept)), 0
    for token in sorted(kept):
        reached += weights[token]
        if reached > limit:
            return token
    raise AssertionError("nothing was drawn")


@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1, 2, 7, 8, 63, 64, 65, 128, 1000, 4096]),
    spread=st.sampled_from([0.0, 1e-6, 0.5, 3.0, 8.0, 1e39]),
    rounded=st.booleans(),
    banned=st.sampled_from([0.0, 0.3, 0.99]),
    temperature=st.sampled_from([1e-300, 1e-7, 1e-3, 0.3, 0.7, 1.0, 2.0, 50.0, 1e300]),
    top_p=st.sampled_from([1.0, 1.0, 1 - 1e-12, 0.95, 0.5, 1e-3, 1e-300]),
)
def test_the_library_draws_the_token_that_numpy_draws(
    library: HostLibrary,
    seed: int,
    size: int,
    spread: float,
    rounded: bool,
    banned: float,
    temperature: float,
    top_p: float,
) -> None:
    """Ties, equal logits, minus infinity, odd sizes, flat and peaked distributions: always, not nearly always."""
    rng = np.random.default_rng(seed)
    logits = np.clip(rng.standard_normal(size) * spread, -3.4e38, 3.4e38).astype(np.float32)
    logits[rng.integers(size, size=3)] += np.float32(rng.uniform(0, 15))
    logits = np.round(logits) if rounded else logits
    logits[rng.random(size) < banned] = -np.inf
    logits[rng.integers(size)] = 1
    weights = sampling._weights(logits, logits.max(), sampling._scale(temperature)).astype(int).tolist()
    for draw in range(3):
        ways = [np.random.default_rng(draw) for _ in range(3)]
        by_numpy = choose(logits, ways[0], temperature=temperature, top_p=top_p)
        by_library = library.choose(logits, sampling._scale(temperature), top_p, ways[1].random())
        assert by_numpy == by_library == drawn(weights, top_p, ways[2].random())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_sums_of_the_library_are_those_of_numpy_to_the_unit(library: HostLibrary, temperature: float) -> None:
    """Shares half a unit below and above where a token ends: one weight that differs by 1 gives another token."""
    logits = (np.random.default_rng(1).standard_normal(32064) * 3).astype(np.float32)
    scale = sampling._scale(temperature)
    sums = sampling._weights(logits, logits.max(), scale).cumsum(dtype=np.int64)
    for token in range(32063, 0, -97):
        for end in (sums[token] - 0.5, sums[token] + 0.5):
            share = float(end / sums[-1])
            if 0 <= share < 1:
                assert library.choose(logits, scale, 1.0, share) == int(sums.searchsorted(end, side="right"))


@given(logits_of, temperatures)
def test_weights_are_those_of_the_softmax(logits: Any, temperature: float) -> None:
    weights = sampling._weights(logits, logits.max(), sampling._scale(temperature))
    wanted = 2.0**30 * np.exp((logits.astype(float) - float(logits.max())) / temperature)
    np.testing.assert_array_less(np.abs(weights - wanted), wanted * 5e-6 + 1)
    assert weights.max() == 2**30 and (weights == np.trunc(weights)).all()


def test_the_library_refuses_what_numpy_refuses(library: HostLibrary) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        for place in (0, 70, 99):
            logits = np.full(100, -np.inf if bad == -np.inf else 0, np.float32)
            logits[place] = bad
            assert library.choose(logits, 1.0, 1.0, 0.5) is None
            with pytest.raises(CheckError, match=f"logits is {bad}"):
                choose(logits, np.random.default_rng(0), temperature=1.0, top_p=1.0, library=library)


def test_the_library_is_given_only_what_it_reads(library: HostLibrary) -> None:
    """Float32 in one piece; of other logits numpy draws the same token."""
    logits = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    twice = np.repeat(logits, 2)[::2]
    assert library.choose(twice, 1.0, 1.0, 0.5) is None and library.choose(logits.astype(float), 1.0, 1.0, 0.5) is None
    tokens = [
        choose(given_as, np.random.default_rng(3), temperature=1.0, top_p=0.9, library=library)
        for given_as in (logits, twice, logits.astype(float))
    ]
    assert len(set(tokens)) == 1
