"""Samples side by side against one after another."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from calibrate.place.counts import Shape
from calibrate.reference import side_by_side
from calibrate.reference.streamed_model import StreamedReference
from graphs.records.plan import Stage
from tests.calibrate.models import checkpoint, make_input, make_llava

PLANS = [
    Shape("llava", 4, 16, (4, 4)).plan(stages)
    for stages in ((), (Stage(layer=2, keep=6, attention_quota=3, pool=8, boundary=6, diversity_quota=2),))
]


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_samples_give_the_numbers_they_have_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = make_llava(tmp_path, layers=4, side=4), StreamedReference(checkpoint(tmp_path))
    inputs = [make_input(model, text=3 + seed, seed=seed)[0] for seed in range(5)]
    together = reference.run(inputs, PLANS)
    monkeypatch.setattr(side_by_side, "SMALL_WEIGHTS", 0)
    torch.set_num_threads(1)
    for one, other in zip(together, reference.run(inputs, PLANS), strict=True):
        assert (one.plan, one.sample) == (other.plan, other.sample)
        np.testing.assert_array_equal(one.logits, other.logits)
        assert [list(stage.absolute) for stage in one.stages] == [list(stage.absolute) for stage in other.stages]


@pytest.mark.usefixtures("three_threads")
def test_small_models_take_a_thread_a_sample_and_give_the_threads_back() -> None:
    both = threading.Barrier(2, timeout=20)

    def look(sample: int) -> tuple[int, int, bool]:
        both.wait()  # only somebody else's sample lets this one go on
        return sample, torch.get_num_threads(), torch.is_inference_mode_enabled()

    with side_by_side.side_by_side(side_by_side.SMALL_WEIGHTS) as each:
        assert list(each(look, range(4))) == [(sample, 1, True) for sample in range(4)]
    assert torch.get_num_threads() == 3
    for large in (side_by_side.side_by_side(side_by_side.SMALL_WEIGHTS + 1), side_by_side.side_by_side(1, "cuda")):
        with large as each:
            assert list(each(lambda _: (threading.current_thread(), torch.get_num_threads()), [0])) == [
                (threading.main_thread(), 3)
            ]


@pytest.mark.usefixtures("three_threads")
def test_a_failing_sample_ends_the_others() -> None:
    begun: list[int] = []

    def fail(sample: int) -> None:
        begun.append(sample)
        if sample == 1:
            raise ValueError("sample 1")
        time.sleep(0.05)

    with pytest.raises(ValueError, match="sample 1"), side_by_side.side_by_side(0) as each:
        list(each(fail, range(100)))
    assert len(begun) < 50 and torch.get_num_threads() == 3
