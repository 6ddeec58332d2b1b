"""Sampling: properties for any logits, and the same cut as transformers' own top-p."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import TopPLogitsWarper

from btp_export.running.sampling import check_settings, choose, probabilities
from graphs.records.errors import CheckError, InputError

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
def test_of_many_tokens_the_same_is_drawn_as_by_weighing_all(
    seed: int, spread: float, temperature: float, top_p: float
) -> None:
    """Flat and peaked logits: tokens near the largest decide alone, or all do."""
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(4096) * spread).astype(np.float32)
    logits[rng.integers(4096, size=3)] += np.float32(rng.uniform(0, 12))
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
