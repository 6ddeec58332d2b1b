"""What is expected of samples decides how often the model is run, and nothing else."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from calibrate.measure.answered import FIRST, measure_answers
from calibrate.measure.statistics import Statistics, measure
from calibrate.place.counts import Shape
from calibrate.reference.answers import greedy_answers
from calibrate.reference.streamed_model import StreamedReference
from tests.calibrate.models import VOCABULARY, checkpoint, make_input, make_llava

LAYERS, SIDE, TOKENS, DROPPED = 4, 4, 5, 6
TAUS = (0.9, 0.99)
SHAPE = Shape("llava", LAYERS, SIDE * SIDE, (SIDE, SIDE))
MEASURING, ASKING = "measuring the layers", "asking the model"


class Model:
    """A small one, with samples and the answers that it gives to them."""

    def __init__(self, folder: Path) -> None:
        model = make_llava(folder, layers=LAYERS, side=SIDE)
        self.reference = StreamedReference(checkpoint(folder))
        self.inputs = [make_input(model, text=3 + seed % 3, seed=seed)[0] for seed in range(8)]
        first = greedy_answers(self.reference, self.inputs, SHAPE.plan(()), tokens=TOKENS)
        self.ends = (first[0][2], first[1][3])
        self.answers = greedy_answers(self.reference, self.inputs, SHAPE.plan(()), tokens=TOKENS, ends=self.ends)
        pairs = zip(self.inputs, self.answers, strict=True)
        answered = [replace(sample, new_tokens=answer[:-1]) for sample, answer in pairs]
        self.wanted = measure(self.reference, answered, SHAPE.plan(()), taus=TAUS, dropped=DROPPED)

    def measured(self, expected: Sequence[tuple[int, ...]]) -> tuple[Statistics, list[str]]:
        """The statistics with these answers expected, and what was done for them, in order."""
        steps: list[str] = []

        def progress(done: int, total: int, text: str = "") -> None:
            if done == total:
                steps.append(text)

        inputs = [replace(sample, expected=ids) for sample, ids in zip(self.inputs, expected, strict=True)]
        statistics = measure_answers(
            self.reference, inputs, SHAPE.plan(()), taus=TAUS, dropped=DROPPED, tokens=TOKENS, ends=self.ends,
            progress=progress,
        )  # fmt: skip
        return statistics, steps


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("llava"))


def same(one: Statistics, other: Statistics) -> bool:
    """Bit for bit."""
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(Statistics)]
    return all(np.array_equal(a, b) and np.asarray(a).dtype == np.asarray(b).dtype for a, b in pairs)


def test_answers_that_the_model_gives_are_not_asked_for(model: Model) -> None:
    lengths = {len(answer) for answer in model.answers}
    assert len(lengths) > 1 and max(lengths) == TOKENS and model.wanted.divergence.shape == (DROPPED, LAYERS)
    got, steps = model.measured(model.answers)
    assert same(got, model.wanted) and steps == [MEASURING, MEASURING], "a few first, then the others"
    longer = [answer if answer[-1] in model.ends else (*answer, 9, 9) for answer in model.answers]
    got, steps = model.measured(longer)
    assert same(got, model.wanted) and steps == [MEASURING, MEASURING], "only so many tokens are looked at"


def test_others_are_asked_and_nothing_shows(model: Model) -> None:
    """All are unknown; and some are wrong, one is cut off, one has words that the model does not have."""
    got, steps = model.measured([()] * 8)
    assert same(got, model.wanted) and steps[-1] == MEASURING and set(steps[:-1]) <= {ASKING}
    mixed: list[tuple[int, ...]] = list(model.answers)
    mixed[1] = (*mixed[1][:-1], (mixed[1][-1] + 1) % VOCABULARY)
    mixed[3], mixed[4] = (), (VOCABULARY + 5, *mixed[4][1:])
    mixed[6] = next(answer for answer in model.answers if answer != model.answers[6])
    mixed[7] = mixed[7][:-1]
    got, steps = model.measured(mixed)
    assert same(got, model.wanted) and steps[-2:] == [ASKING, MEASURING]


def test_a_model_that_answers_otherwise_is_tried_with_a_few(model: Model) -> None:
    wrong = [(*answer[:-1], (answer[-1] + 1) % VOCABULARY) for answer in model.answers]
    wrong = [answer if answer[-1] in model.ends or len(answer) == TOKENS else (9,) * TOKENS for answer in wrong]
    got, steps = model.measured(wrong)
    assert same(got, model.wanted) and steps == [MEASURING, ASKING, MEASURING]
    assert len(model.inputs) > FIRST, "the others were not tried"


def test_samples_one_by_one_are_the_same_together(model: Model) -> None:
    assert same(Statistics.joined(model.wanted.each()), model.wanted)
    assert [len(part.divergence) for part in model.wanted.each()] == [1] * DROPPED + [0] * 2
