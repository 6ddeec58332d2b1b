"""Signs: they lie in two cells of their own, are drawn as their characters say, and are asked about where they are."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.data import scenes, signs

FIRST_SIGN = 2**23  # of the scenes of seed 0
SIGN_SEEDS = st.integers(FIRST_SIGN, 2**24 - 1)
CELLS = [(row, column) for row in range(4) for column in range(4)]


def sign_of(seed: int) -> tuple[scenes.Scene, signs.Sign]:
    scene = scenes.make_scene(seed)
    assert scene.sign is not None
    return scene, scene.sign


def test_only_the_second_half_of_a_seeds_scenes_shows_a_sign() -> None:
    assert scenes.make_scene(FIRST_SIGN - 1).sign is None
    assert scenes.make_scene(FIRST_SIGN).sign is not None
    kinds = {sample.kind: sample.scene_seed for sample in scenes.samples(12, seed=0, split="train")}
    assert {kind for kind, seed in kinds.items() if seed >= FIRST_SIGN} == {scenes.READING}


@settings(deadline=None, max_examples=60)
@given(seed=SIGN_SEEDS)
def test_a_sign_lies_in_its_cells_and_objects_lie_elsewhere(seed: int) -> None:
    scene, sign = sign_of(seed)
    assert len(sign.text) in signs.LENGTHS and set(sign.text) <= set(signs.CHARACTERS)
    left, top, right, bottom = sign.board
    assert sign.column * scenes.CELL <= left and right <= (sign.column + 2) * scenes.CELL
    assert sign.row * scenes.CELL <= top and bottom <= (sign.row + 1) * scenes.CELL
    assert not {(item.row, item.column) for item in scene.objects} & set(sign.cells)
    assert 3 <= len(scene.objects) <= 9


@settings(deadline=None, max_examples=30)
@given(seed=SIGN_SEEDS)
def test_a_sign_is_read_off_its_pixels(seed: int) -> None:
    """Each character is the one whose bitmap fits the pixels of its box best, with both kinds of board."""
    scene, sign = sign_of(seed)
    grey = scene.image.astype(float).mean(-1)
    read = ""
    for place in range(len(sign.text)):
        left, top, right, bottom = sign.box(place)
        rows = np.clip((top + (np.arange(7) + 0.5) * (bottom - top) / 7).astype(int), 0, 95)
        columns = np.clip((left + (np.arange(5) + 0.5) * (right - left) / 5).astype(int), 0, 95)
        dots = grey[np.ix_(rows, columns)] > 127
        dots = dots if sign.dark else ~dots
        read += min(signs.CHARACTERS, key=lambda name: int((dots != signs.bitmap(name)).sum()))
    assert read == sign.text


def test_no_two_characters_look_alike() -> None:
    for one, other in combinations(signs.CHARACTERS, 2):
        assert (signs.bitmap(one) != signs.bitmap(other)).sum() >= 3, (one, other)


def test_a_sign_is_asked_about_once_and_answered_character_by_character() -> None:
    scene, sign = sign_of(FIRST_SIGN + 5)
    (asked,) = [question for question in scenes.questions(scene, 5) if question.kind == scenes.READING]
    assert asked.answer == " ".join(sign.text) and asked.text == "what is written on the sign?"
    plain = scenes.make_scene(5)
    assert not [question for question in scenes.questions(plain, 5) if question.kind == scenes.READING]


def test_every_character_and_both_lengths_occur() -> None:
    drawn = [signs.draw_sign(np.random.default_rng(seed), CELLS, scenes.CELL) for seed in range(400)]
    assert {name for sign in drawn for name in sign.text} == set(signs.CHARACTERS)
    lengths = [len(sign.text) for sign in drawn]
    assert set(lengths) == {2, 3} and 150 < lengths.count(2) < 250


def test_a_sign_needs_two_cells_side_by_side() -> None:
    with pytest.raises(ValueError, match="no room for a sign"):
        signs.draw_sign(np.random.default_rng(0), [(0, 0), (1, 0), (1, 2)], scenes.CELL)
