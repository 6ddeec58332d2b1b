"""The scenes: the same seed gives the same task, and every answer is right about the objects that are drawn."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.data import scenes

SEEDS = st.integers(min_value=0, max_value=2**50)


def test_the_same_seed_gives_the_same_picture_and_questions() -> None:
    first, again = scenes.make_scene(7), scenes.make_scene(7)
    assert np.array_equal(first.image, again.image)
    assert first.objects == again.objects
    assert scenes.questions(first, 7) == scenes.questions(again, 7)
    assert not np.array_equal(first.image, scenes.make_scene(8).image)


def test_picture_is_96_by_96_bytes() -> None:
    image = scenes.make_scene(0).image
    assert image.shape == (96, 96, 3)
    assert image.dtype == np.uint8


def test_splits_never_share_a_scene() -> None:
    seeds = {
        split: {sample.scene_seed for seed in (0, 1) for sample in scenes.samples(60, seed=seed, split=split)}
        for split in ("train", "calibration", "eval")
    }
    assert all(len(chosen) == 120 for chosen in seeds.values())
    assert not seeds["train"] & seeds["calibration"]
    assert not seeds["train"] & seeds["eval"]
    assert not seeds["calibration"] & seeds["eval"]


@given(first=st.integers(0, 2**24 - 1), second=st.integers(0, 2**24 - 1))
def test_seed_ranges_of_splits_are_disjoint_for_all_seeds(first: int, second: int) -> None:
    last_of_train = scenes.first_scene_seed(first, "train") + 2**24 - 1
    assert last_of_train < scenes.first_scene_seed(second, "calibration")
    last_of_calibration = scenes.first_scene_seed(first, "calibration") + 2**24 - 1
    assert last_of_calibration < scenes.first_scene_seed(second, "eval")


def test_more_samples_begin_with_the_same_samples() -> None:
    few, many = scenes.samples(12, seed=3), scenes.samples(30, seed=3)
    assert [(s.question, s.answer, s.scene_seed) for s in few] == [
        (s.question, s.answer, s.scene_seed) for s in many[:12]
    ]
    assert np.array_equal(np.asarray(few[5].image), np.asarray(many[5].image))


def test_kinds_take_turns() -> None:
    kinds = Counter(sample.kind for sample in scenes.samples(120, seed=0))
    assert kinds == dict.fromkeys(scenes.QUESTION_KINDS, 20)


def test_the_other_kinds_are_asked_what_they_were_before_there_were_signs() -> None:
    """Numbers recorded with five kinds stay comparable: the digest is that of the first hundred samples then."""
    state = hashlib.sha256()
    for sample in scenes.samples(120, seed=0):
        if sample.kind != scenes.READING:
            state.update(sample.image.tobytes() + f"{sample.question}{sample.answer}".encode())
    assert state.hexdigest() == "d60825a62eeaef0d4c9c277d7ab9fc125338685e49c4bc13a056eb3930b71bbf"


def test_a_sample_is_about_its_own_scene() -> None:
    for sample in scenes.samples(25, seed=5, split="calibration"):
        scene = scenes.make_scene(sample.scene_seed)
        assert np.array_equal(np.asarray(sample.image), scene.image)
        assert scenes.Question(sample.kind, sample.question, sample.answer) in scenes.questions(
            scene, sample.scene_seed
        )


def test_no_kind_is_answered_well_without_looking() -> None:
    answers: dict[str, Counter[str]] = {kind: Counter() for kind in scenes.QUESTION_KINDS}
    for sample in scenes.samples(1000, seed=11):
        answers[sample.kind][sample.answer] += 1
    majority = {kind: counts.most_common(1)[0][1] / counts.total() for kind, counts in answers.items()}
    assert majority["colour"] < 0.25
    assert majority["shape"] < 0.30
    assert majority["is there"] < 0.62
    assert majority["count"] < 0.45
    assert majority["where"] < 0.40
    assert majority["reading"] < 0.05


@pytest.mark.parametrize(("split", "seed", "message"), [("test", 0, "split is 'test'"), ("eval", -1, "seed is -1")])
def test_wrong_split_or_seed_is_refused(split: str, seed: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        scenes.samples(1, seed=seed, split=split)


def test_importing_scenes_loads_no_torch() -> None:
    heavy = "('torch', 'transformers', 'onnxruntime')"
    code = f"import sys, calibrate.data.scenes; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@settings(deadline=None, max_examples=60)
@given(seed=SEEDS)
def test_objects_lie_in_cells_of_their_own(seed: int) -> None:
    objects = scenes.make_scene(seed).objects
    assert 3 <= len(objects) <= 9
    assert len({(item.row, item.column) for item in objects}) == len(objects)
    for item in objects:
        assert item.row * scenes.CELL <= item.y - item.radius
        assert item.y + item.radius <= (item.row + 1) * scenes.CELL
        assert item.column * scenes.CELL <= item.x - item.radius
        assert item.x + item.radius <= (item.column + 1) * scenes.CELL


@settings(deadline=None, max_examples=60)
@given(seed=SEEDS)
def test_objects_show_their_colour(seed: int) -> None:
    """The pixels well inside a filled shape have the colour they are said to have."""
    scene = scenes.make_scene(seed)
    for item in scene.objects:
        if item.shape == "ring":
            continue
        near = scene.image[int(item.y) - 1 : int(item.y) + 1, int(item.x) - 1 : int(item.x) + 1].reshape(-1, 3).mean(0)
        distances = {name: np.abs(near - np.array(tint)).sum() for name, tint in scenes.COLOURS.items()}
        assert min(distances, key=distances.__getitem__) == item.colour


@settings(deadline=None, max_examples=60)
@given(seed=SEEDS)
def test_answers_are_right(seed: int) -> None:
    scene = scenes.make_scene(seed)
    for question in scenes.questions(scene, seed):
        if question.kind != scenes.READING:  # tests/calibrate/data/test_signs.py
            assert question.answer == _answer(question, scene.objects), question


@settings(deadline=None, max_examples=60)
@given(seed=SEEDS)
def test_is_there_is_balanced_and_hard(seed: int) -> None:
    """As many no as yes where the scene allows it; a no names a colour and a shape that are there, but not together."""
    scene = scenes.make_scene(seed)
    asked = [question for question in scenes.questions(scene, seed) if question.kind == "is there"]
    answers = Counter(question.answer for question in asked)
    assert answers["yes"] == answers["no"]
    colours, shapes = {item.colour for item in scene.objects}, {item.shape for item in scene.objects}
    present = {(item.colour, item.shape) for item in scene.objects}
    hard = 0
    for question in asked:
        *_, colour, shape = re.findall(r"\w+", question.text)
        if question.answer == "no":
            hard += colour in colours and shape in shapes
    assert hard == min(answers["no"], len(colours) * len(shapes) - len(present))


def _answer(question: scenes.Question, objects: tuple[scenes.SceneObject, ...]) -> str:
    """Answer from the objects alone, reading the question's words."""
    named = re.findall(r"\w+", question.text)
    singular = {plural: shape for shape, plural in scenes.PLURALS.items()}
    colour = next((word for word in named if word in scenes.COLOURS), None)
    shape = next((singular.get(word, word) for word in named if singular.get(word, word) in scenes.SHAPES), None)
    matching = [item for item in objects if colour in (None, item.colour) and shape in (None, item.shape)]
    if question.kind == "is there":
        return "yes" if matching else "no"
    if question.kind == "count":
        return scenes.NUMBERS[len(matching)]
    (item,) = matching  # the other kinds ask about one object only
    if question.kind == "where":
        return f"{'top' if item.y < 48 else 'bottom'} {'left' if item.x < 48 else 'right'}"
    return item.colour if question.kind == "colour" else item.shape
