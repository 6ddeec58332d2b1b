"""Kept tokens among a stage's own and among all: one way and back, against sets built token by token."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphs.pruning.kept_tokens import absolute, every_stage, relative


@st.composite
def nested_sets(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """V and ascending sets of tokens, each part of the one before; the last may be empty."""
    tokens = draw(st.integers(1, 40))
    sets: list[list[int]] = []
    before = list(range(tokens))
    for _ in range(draw(st.integers(0, 4))):
        if not before:
            break
        before = sorted(draw(st.sets(st.sampled_from(before))))
        sets.append(before)
    return tokens, sets


@given(nested_sets())
def test_absolute_is_what_following_the_tokens_gives(drawn: tuple[int, list[list[int]]]) -> None:
    """The tokens themselves are carried through the stages here, as rows of a graph are."""
    tokens, wanted = drawn
    rows, own = list(range(tokens)), []
    for kept in wanted:
        own.append(np.array([place for place, token in enumerate(rows) if token in kept], np.int32))
        rows = [rows[place] for place in own[-1]]
    assert [indices.tolist() for indices in absolute(own)] == wanted
    assert [indices.tolist() for indices in relative(wanted)] == [indices.tolist() for indices in own]


@given(st.integers(0, 2**32 - 1))
def test_a_batch_is_its_samples(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = [20, 10, 6, 0]
    stages = [
        np.stack([np.sort(rng.permutation(before)[:keep]) for _ in range(3)])
        for before, keep in itertools.pairwise(counts)
    ]
    batch = absolute(stages)
    for sample in range(3):
        alone = absolute([stage[sample] for stage in stages])
        assert [stage[sample].tolist() for stage in batch] == [stage.tolist() for stage in alone]


def test_indices_of_three_stages_by_fancy_indexing() -> None:
    rng = np.random.default_rng(1)
    first = np.sort(rng.permutation(576)[:288])
    second = np.sort(rng.permutation(288)[:144])
    third = np.sort(rng.permutation(144)[:48])
    got = absolute([first, second, third, np.empty(0, np.int32)])
    assert [stage.tolist() for stage in got] == [
        stage.tolist() for stage in (first, first[second], first[second][third], first[:0])
    ]


def test_a_stage_that_keeps_none_has_an_empty_entry() -> None:
    one = every_stage({0: np.array([1, 4])}, [2, 0])
    assert [indices.tolist() for indices in one] == [[1, 4], []]
    batch = every_stage({0: np.array([[1, 4], [0, 2]])}, [2, 0], samples=2)
    assert [indices.shape for indices in absolute(batch)] == [(2, 2), (2, 0)]
    assert every_stage({}, []) == []


def test_a_stage_whose_indices_are_missing_is_an_error() -> None:
    with pytest.raises(KeyError):
        every_stage({}, [3])


def test_a_token_that_was_dropped_before_cannot_be_kept() -> None:
    with pytest.raises(ValueError, match="token 7 is kept by a stage that did not see it"):
        relative([[1, 3, 5], [3, 7]])
