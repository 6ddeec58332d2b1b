"""Scores of answers, and the paired comparison of two plans."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate.measure.accuracy import Score, exact, paired

HITS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12)


@given(HITS)
def test_the_paired_test_is_the_share_of_sign_flips_as_extreme(pairs: list[tuple[bool, bool]]) -> None:
    """McNemar's exact test: under the null every disagreement falls either way with equal chance."""
    first, second = zip(*pairs, strict=True)
    result = paired(first, second)
    signs = [a - b for a, b in pairs if a != b]
    flips = [abs(sum(flip)) >= abs(sum(signs)) for flip in itertools.product((-1, 1), repeat=len(signs))]
    assert result.p_value == pytest.approx(sum(flips) / len(flips))
    assert result.difference == pytest.approx(sum(signs) / len(pairs))


def test_a_thousand_disagreements_do_not_overflow() -> None:
    assert paired([True] * 1500 + [False] * 1500, [False] * 1500 + [True] * 1500).p_value == 1.0
    assert paired([True] * 1500, [False] * 1500).p_value < 1e-300


def test_wilsons_interval_is_the_published_example() -> None:
    """81 of 263, method 3 of R. G. Newcombe, Statistics in Medicine 17 (1998)."""
    low, high = Score(81, 263).interval()
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize(("answer", "same"), [("Red.", True), (" red ", True), ("dark red", False), ("", False)])
def test_answers_are_compared_without_case_and_punctuation(answer: str, same: bool) -> None:
    assert exact(answer, "red") == same
