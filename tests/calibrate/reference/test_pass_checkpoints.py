"""A pass that is cut off and resumed gives the same bytes as one that never was."""

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibrate.measure.statistics import measure
from calibrate.place.counts import Shape
from calibrate.reference import recording
from calibrate.reference.recording import KeptSegment
from calibrate.reference.records import RunRecord
from calibrate.reference.streamed_model import StreamedReference
from graphs.files.resume import Work, work_folder
from graphs.records.plan import Stage
from tests.calibrate.models import checkpoint, make_input, make_llava
from tests.children import exit_code

LAYERS, SIDE = 6, 6
SHAPE = Shape("llava", LAYERS, SIDE * SIDE, (SIDE, SIDE))
PLANS = [
    SHAPE.plan(()),
    SHAPE.plan((Stage(layer=2, keep=18, attention_quota=6, pool=18, boundary=18, diversity_quota=4, seeds=9),)),
    SHAPE.plan((Stage(layer=2, keep=18, boundary=18, attention_quota=9, pool=12), Stage(layer=4, keep=0))),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("llava")
    return make_llava(folder, layers=LAYERS, side=SIDE), folder


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def work(tmp_path: Path, notes: list[str]) -> Iterator[Work]:
    yield Work(tmp_path / "work", notes.append, interval=0.0)


class Stopped(Exception):
    pass


def stop_after(calls: int) -> Any:
    count = itertools.count(1)

    def progress(done: int, total: int) -> None:
        if next(count) == calls:
            raise Stopped

    return progress


def same(a: list[RunRecord], b: list[RunRecord]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.logits.tobytes() == other.logits.tobytes()
        assert len(one.stages) == len(other.stages) and len(one.segments) == len(other.segments)
        for x, y in zip(one.stages, other.stages, strict=True):
            assert (x.number, x.margin, x.last) == (y.number, y.margin, y.last)
            for name in ("indices", "absolute", "chosen", "scores"):
                assert getattr(x, name).tobytes() == getattr(y, name).tobytes()
        for x, y in zip(one.segments, other.segments, strict=True):
            assert (x.start, x.stop, x.last) == (y.start, y.stop, y.last)
            for name in ("hidden_in", "hidden_out", "cos", "sin", "query"):
                assert getattr(x, name).tobytes() == getattr(y, name).tobytes()
            assert [*x.keys] == [*y.keys]
            for layer in x.keys:
                assert x.keys[layer].tobytes() == y.keys[layer].tobytes()
                assert x.values[layer].tobytes() == y.values[layer].tobytes()


@pytest.mark.parametrize("calls", [1, 6, 7, 13, 30, 36])
def test_several_plans_resume_to_the_same_bytes(
    calls: int, model: tuple[Any, Path], work: Work, notes: list[str]
) -> None:
    inputs = [make_input(model[0], seed=seed)[0] for seed in range(2)]
    wanted = StreamedReference(checkpoint(model[1])).run(inputs, PLANS)
    reference = StreamedReference(checkpoint(model[1]), work=work)
    with pytest.raises(Stopped):
        reference.run(inputs, PLANS, progress=stop_after(calls))
    done: list[tuple[int, int]] = []
    got = reference.run(inputs, PLANS, progress=lambda *at: done.append(at))
    same(wanted, got)
    finished = (calls - 1) // 6  # whole layers before the stop, of six runs each
    assert len(done) == 6 * (LAYERS - finished) and done[-1] == (len(done), len(done))
    assert notes == ([f"resumed after layer {finished - 1} of an interrupted run"] if finished else [])


@pytest.mark.parametrize("spilled", [False, True], ids=["memory", "disk"])
def test_recorded_segments_resume_to_the_same_bytes(spilled: bool, model: tuple[Any, Path], work: Work) -> None:
    inputs = [make_input(model[0], seed=seed)[0] for seed in range(2)]
    wanted = StreamedReference(checkpoint(model[1])).run(inputs, PLANS[2], record_segments=True)
    reference = StreamedReference(checkpoint(model[1]), work=work, spill_above=0 if spilled else 2**40)
    with pytest.raises(Stopped):
        reference.run(inputs, PLANS[2], record_segments=True, progress=stop_after(8))
    got = reference.run(inputs, PLANS[2], record_segments=True)
    assert all(isinstance(part, KeptSegment) == spilled for run in got for part in run.segments)
    same(wanted, got)


def test_a_finished_pass_is_not_run_again(model: tuple[Any, Path], work: Work, notes: list[str]) -> None:
    inputs = [make_input(model[0])[0]]
    reference = StreamedReference(checkpoint(model[1]), work=work)
    first = reference.run(inputs, PLANS[1])
    calls: list[int] = []
    same(first, reference.run(inputs, PLANS[1], progress=lambda done, total: calls.append(done)))
    assert calls == [] and "resumed after layer 5" in notes[0]


def test_another_prompt_or_plan_does_not_resume(model: tuple[Any, Path], work: Work, notes: list[str]) -> None:
    reference = StreamedReference(checkpoint(model[1]), work=work)
    given, other = (make_input(model[0], seed=seed)[0] for seed in range(2))
    reference.run([given], PLANS[1])
    reference.run([other], PLANS[1])
    reference.run([given], PLANS[2])
    reference.run([given], PLANS[1], forced_kept=[[list(range(18))]])
    assert notes == []


def test_statistics_resume(model: tuple[Any, Path], work: Work) -> None:
    inputs = [make_input(model[0], seed=seed)[0] for seed in range(3)]
    wanted = measure(StreamedReference(checkpoint(model[1])), inputs, PLANS[0], taus=(0.93, 0.99), dropped=2)
    reference = StreamedReference(checkpoint(model[1]), work=work)
    with pytest.raises(Stopped):
        measure(reference, inputs, PLANS[0], taus=(0.93, 0.99), dropped=2, progress=stop_after(11))
    got = measure(reference, inputs, PLANS[0], taus=(0.93, 0.99), dropped=2)
    for name in ("counts", "attention", "top_shares", "divergence", "agreement", "logits"):
        assert getattr(got, name).tobytes() == getattr(wanted, name).tobytes()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_maths_resumes(half: torch.dtype, model: tuple[Any, Path], work: Work) -> None:
    inputs = [make_input(model[0])[0]]
    wanted = StreamedReference(checkpoint(model[1]), dtype=half).run(inputs, PLANS[1])
    reference = StreamedReference(checkpoint(model[1]), dtype=half, work=work)
    with pytest.raises(Stopped):
        reference.run(inputs, PLANS[1], progress=stop_after(4))
    same(wanted, reference.run(inputs, PLANS[1]))


@pytest.mark.parametrize("damage", ["tensors cut", "byte flipped", "record cut", "tensors gone", "kept array"])
def test_damaged_checkpoints_are_said_and_not_used(
    damage: str, model: tuple[Any, Path], work: Work, notes: list[str]
) -> None:
    inputs = [make_input(model[0])[0]]
    reference = StreamedReference(checkpoint(model[1]), work=work, spill_above=0)
    with pytest.raises(Stopped):
        reference.run(inputs, PLANS[1], record_segments=True, progress=stop_after(5))
    (data,) = work.folder.glob("*/*.safetensors")
    (record,) = work.folder.glob("*/*.json")
    kept = next(work.folder.glob("0-1-key.npy"))
    if damage == "tensors cut":
        data.write_bytes(data.read_bytes()[:-100])
    elif damage == "tensors gone":
        data.unlink()
    elif damage == "record cut":
        record.write_text(record.read_text()[:-20])
    else:
        path = kept if damage == "kept array" else data
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(bytes(content))
    wanted = StreamedReference(checkpoint(model[1])).run(inputs, PLANS[1], record_segments=True)
    same(wanted, reference.run(inputs, PLANS[1], record_segments=True))
    assert len(notes) == 1 and "damaged" in notes[0] and "not used" in notes[0]


def test_records_on_disk_are_only_mapped_while_in_use(model: tuple[Any, Path], work: Work) -> None:
    run = StreamedReference(checkpoint(model[1]), work=work, spill_above=0).run(
        [make_input(model[0])[0]], PLANS[0], record_segments=True
    )
    key = run[0].segments[0].keys[3]
    assert isinstance(key, np.memmap) and str(work.folder) in maps()
    del key
    assert str(work.folder) not in maps()
    assert recording.read(run[0].segments[0].arrays["cos"]).ndim == 2


def maps() -> str:
    return Path("/proc/self/maps").read_text()


def run_until_killed(folder: Path, inputs: list[Any], place: Path) -> None:
    """In a child: kill -9 after so many steps of progress."""
    count = itertools.count(1)

    def progress(done: int, total: int) -> None:
        if next(count) == 16:
            os.kill(os.getpid(), signal.SIGKILL)

    with work_folder(place, "key", print, interval=0.0) as work:
        StreamedReference(checkpoint(folder), work=work).run(inputs, PLANS, progress=progress)


def test_a_hard_kill_in_the_middle_of_a_pass(model: tuple[Any, Path], tmp_path: Path, notes: list[str]) -> None:
    inputs = [make_input(model[0], seed=seed)[0] for seed in range(2)]
    assert exit_code(run_until_killed, model[1], inputs, tmp_path / "work") == -signal.SIGKILL
    with work_folder(tmp_path / "work", "key", notes.append, interval=0.0) as work:
        got = StreamedReference(checkpoint(model[1]), work=work).run(inputs, PLANS)
    assert notes == ["resumed after layer 1 of an interrupted run"]
    same(StreamedReference(checkpoint(model[1])).run(inputs, PLANS), got)
    assert not (tmp_path / "work").exists(), "removed when the work is done"
