"""The queue and the worker: batches that fill or wait, places that are freed, failures that stay alone."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from btp_export.running.runtime import BundleModel
from btp_export.running.sampling import Sampling
from btp_export.serving.gathering import Event, Finish, Gathering, Job, Piece
from btp_export.serving.questions import Settings
from btp_export.serving.refusals import Refusal
from btp_export.serving.worker import Worker

GREEDY = Settings(Sampling(), None, (), False)


def job(profile: str = "a", **fields: Any) -> Job:
    empty: Any = None
    return Job(**{"profile": profile, "encoded": empty, "settings": GREEDY, "room": 1, "send": print} | fields)


def test_a_full_batch_does_not_wait_and_a_part_of_one_does() -> None:
    queue = Gathering({"a": 2, "b": 3}, wait=0.2, most=10)
    jobs = [job(), job("b"), job(), job()]
    start = time.monotonic()
    for one in jobs:
        queue.put(one)
    assert queue.take() == [jobs[0], jobs[2]] and time.monotonic() - start < 0.1
    assert queue.take() == [jobs[1]] and 0.15 < time.monotonic() - start < 1, "it was there before the last one of a"
    assert queue.take() == [jobs[3]] and len(queue) == 0


def test_a_late_job_fills_the_batch() -> None:
    queue = Gathering({"a": 2}, wait=5, most=10)
    first, second = job(), job()
    queue.put(first)
    threading.Timer(0.05, lambda: queue.put(second)).start()
    start = time.monotonic()
    assert queue.take() == [first, second] and time.monotonic() - start < 2


def test_a_full_queue_and_one_that_is_closed() -> None:
    queue = Gathering({"a": 1}, wait=0, most=2)
    jobs = [job(), job()]
    for one in jobs:
        queue.put(one)
    with pytest.raises(Refusal) as caught:
        queue.put(job(), retry_after=7)
    assert (caught.value.status, caught.value.headers()["retry-after"]) == (429, "7")
    queue.drop(jobs[0])
    queue.put(job())
    queue.close()
    with pytest.raises(Refusal) as caught:
        queue.put(job())
    assert caught.value.status == 503
    assert queue.take() == [jobs[1]] and len(queue.take()) == 1 and queue.take() == []


class Asked:
    """Jobs for a model, and the events of each."""

    def __init__(self, model: BundleModel, pictures: list[Image.Image], prompts: list[str]) -> None:
        self.model, self.events = model, [list[Event]() for _ in prompts]
        encoded = [model.encode([picture], [prompt]) for picture, prompt in zip(pictures, prompts, strict=True)]
        self.jobs = [
            job(model.profile.name, encoded=one, room=12, send=events.append)
            for one, events in zip(encoded, self.events, strict=True)
        ]
        self.alone = [answer.text for answer in model.generate(pictures, prompts)]

    def run(self) -> None:
        queue = Gathering({self.model.profile.name: self.model.profile.batch}, wait=1, most=10)
        for one in self.jobs:
            queue.put(one)
        worker = Worker({self.model.profile.name: self.model}, queue)
        worker.start()
        queue.close()
        worker.join(60)
        assert not worker.alive

    def text(self, number: int) -> str:
        return "".join(event.text for event in self.events[number] if isinstance(event, Piece))


@pytest.fixture
def asked(alone: dict[str, BundleModel], square: Image.Image) -> Asked:
    model = next(iter(alone.values()))
    return Asked(model, [square] * 3, ["where is it ?", "what color is the circle ?", "is there a star ?"])


def prefilled_batches(model: BundleModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    prefill = model.prefill
    monkeypatch.setattr(
        model, "prefill", lambda encoded, **settings: (sizes.append(len(encoded)), prefill(encoded, **settings))[1]
    )
    return sizes


def test_a_batch(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = prefilled_batches(asked.model, monkeypatch)
    asked.run()
    assert sizes == [3]
    for number, text in enumerate(asked.alone):
        assert asked.text(number) == text
        assert isinstance(asked.events[number][-1], Finish) and asked.events[number][-1].batch == 3


def test_a_client_that_goes_away_ends_its_row_only(asked: Asked) -> None:
    leaves = asked.jobs[1]

    def first_piece(event: Event) -> None:
        asked.events[1].append(event)
        leaves.gone = True

    leaves.send = first_piece
    asked.run()
    assert len(asked.events[1]) == 1, "nothing after it went"
    assert [asked.text(0), asked.text(2)] == [asked.alone[0], asked.alone[2]]


def test_who_went_before_the_batch_takes_no_place_in_it(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = prefilled_batches(asked.model, monkeypatch)
    asked.jobs[0].gone = True
    asked.run()
    assert sizes == [2] and asked.events[0] == [] and asked.text(1) == asked.alone[1]


def test_a_request_that_breaks_the_batch_fails_alone(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that the embedding does not have is refused before anything runs; the others are run by themselves."""
    sizes = prefilled_batches(asked.model, monkeypatch)
    encoded = asked.jobs[1].encoded
    ids = np.append(encoded.input_ids[0], 10**6)
    asked.jobs[1].encoded = replace(encoded, input_ids=(ids,))
    asked.run()
    assert sizes == [3, 1, 1, 1]
    [refusal] = asked.events[1]
    assert isinstance(refusal, Refusal) and refusal.status == 400 and "token ids" in refusal.message
    assert [asked.text(0), asked.text(2)] == [asked.alone[0], asked.alone[2]]


def broken_after(count: int, choose: Callable[..., int]) -> Callable[..., int]:
    """Sampling that fails at the n-th token."""

    def chosen(logits: Any, rng: Any) -> int:
        nonlocal count
        count -= 1
        if count < 0:
            raise RuntimeError("the secret is in /etc/passwd")
        return choose(logits, rng)

    return chosen


@pytest.mark.parametrize("tokens", [0, 4])
def test_a_row_that_fails_ends_alone(asked: Asked, tokens: int, capsys: pytest.CaptureFixture[str]) -> None:
    """And the reason is in the log, not in the answer."""
    sampling = Sampling()
    object.__setattr__(sampling, "choose", broken_after(tokens, sampling.choose))
    asked.jobs[2].settings = replace(GREEDY, sampling=sampling)
    asked.run()
    refusal = asked.events[2][-1]
    assert isinstance(refusal, Refusal) and refusal.status == 500 and "passwd" not in str(refusal.document())
    assert "passwd" in capsys.readouterr().err
    assert asked.alone[2].startswith(asked.text(2)) and (tokens == 0) == (asked.text(2) == "")
    assert [asked.text(0), asked.text(1)] == asked.alone[:2]
