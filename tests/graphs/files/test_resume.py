"""Work folders: checkpoints whole or not there, removed when done, left to whoever is in them."""

import threading
from pathlib import Path

import numpy as np
import pytest

from graphs.files.atomic import hashing, sha256
from graphs.files.resume import Work, digest, work_folder


@pytest.fixture
def notes() -> list[str]:
    return []


def save(work: Work | None, number: int = 3) -> None:
    assert work is not None
    work.sequence("steps").save(number, {"a": np.arange(4, dtype=np.float16)}, {"done": [number]})


def test_what_is_saved_comes_back(tmp_path: Path, notes: list[str]) -> None:
    work = Work(tmp_path / "w", notes.append, interval=0.0)
    steps = work.sequence("steps")
    assert steps.latest() is None and not work.folder.exists()
    for number in (1, 2):
        save(work, number)
    latest = steps.resume("the work")
    assert latest is not None and (latest.number, latest.meta) == (2, {"done": [2]})
    np.testing.assert_array_equal(latest.tensors["a"], np.arange(4))
    assert notes == ["resumed the work of an interrupted run after step 2"]
    assert len(list((work.folder / "steps").iterdir())) == 2, "only the latest is kept"


def test_a_checkpoint_is_due_after_the_interval(
    tmp_path: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    steps = Work(tmp_path / "w", notes.append, interval=30.0).sequence("steps")
    now = 129.0
    assert not steps.due
    now = 131.0
    assert steps.due
    steps.save(1, {}, None)
    assert not steps.due


def test_a_row_of_steps_without_its_last_record_goes_back_one(tmp_path: Path, notes: list[str]) -> None:
    """A kill between the tensors and their record leaves the checkpoint before."""
    work = Work(tmp_path / "w", notes.append, interval=0.0)
    save(work, 1)
    (work.folder / "steps" / "000002.safetensors").write_bytes(b"half")
    (work.folder / "steps" / "000003.part").write_bytes(b"half")
    latest = work.sequence("steps").latest()
    assert latest is not None and latest.number == 1 and notes == []


def test_the_folder_goes_when_the_work_is_done_and_stays_when_it_is_not(tmp_path: Path, notes: list[str]) -> None:
    root = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt), work_folder(root, "k" * 64, notes.append) as work:
        save(work)
        raise KeyboardInterrupt
    assert list(root.glob("*/steps/*.json"))
    with work_folder(root, "k" * 64, notes.append) as work:
        assert work is not None and work.sequence("steps").latest() is not None
    assert not root.exists()
    with pytest.raises(ValueError, match="broken"), work_folder(root, "k" * 64, notes.append) as work:
        assert work is not None
        work.keep("array", np.zeros(3))
        raise ValueError("broken")
    assert not root.exists(), "without a checkpoint there is nothing to resume from"


def test_other_work_is_left_alone(tmp_path: Path, notes: list[str]) -> None:
    root = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt), work_folder(root, "a" * 64, notes.append) as work:
        save(work)
        raise KeyboardInterrupt
    with work_folder(root, "b" * 64, notes.append) as work:
        save(work)
    assert [path.parent.parent.name for path in root.glob("*/steps/*.json")] == ["a" * 32]


def test_two_at_a_time(tmp_path: Path, notes: list[str]) -> None:
    with work_folder(tmp_path / "c", "a" * 64, notes.append) as first:
        save(first)
        with work_folder(tmp_path / "c", "a" * 64, notes.append) as second:
            assert second is None
        assert first is not None and first.sequence("steps").latest() is not None
    assert notes == ["the same work is being done by another process: this one keeps no checkpoints"]


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path, notes: list[str]) -> None:
    (tmp_path / "file").write_text("")
    with work_folder(tmp_path / "file" / "cache", "a" * 64, notes.append) as work:
        assert work is None
    assert len(notes) == 1 and "cannot be resumed" in notes[0]


def test_a_full_disk_is_said_and_the_work_goes_on(
    tmp_path: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("graphs.files.resume.write_stream", full)
    save(Work(tmp_path / "w", notes.append))
    assert notes == ["no checkpoint is written: No space left on device"]


def test_arrays_come_back_from_disk(tmp_path: Path, notes: list[str]) -> None:
    array = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    kept = Work(tmp_path / "w", notes.append).keep("x", array)
    read = kept.read()
    assert isinstance(read, np.memmap)
    np.testing.assert_array_equal(read, array)


def test_digests_tell_things_apart() -> None:
    zeros = np.zeros(4, np.float32)
    collected = {
        digest(zeros), digest(zeros.astype(np.float16)), digest(zeros.reshape(2, 2)), digest(zeros[:2], zeros[2:]),
        digest(b""), digest(), digest("a", "b"), digest("ab"), digest(["a", "b"]), digest({"a": 1}),
    }  # fmt: skip
    assert len(collected) == 10
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


# -- hashing beside other work


def test_hashes_are_the_files(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 10_000_000)
    with hashing(paths) as hashes:
        assert hashes() == {path: sha256(path) for path in paths}
    with hashing([]) as hashes:
        assert hashes() == {}


def test_hashing_stops_with_the_work(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(50_000_000))  # a byte at a time: minutes
    begun = threading.active_count()
    with pytest.raises(KeyboardInterrupt), hashing([tmp_path / "a"], chunk_bytes=1):
        raise KeyboardInterrupt
    assert threading.active_count() == begun


def test_a_file_that_cannot_be_read_is_an_error_where_it_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), hashing([tmp_path / "none"]) as hashes:
        hashes()


def test_a_changed_number_in_a_checkpoint_is_noticed(tmp_path: Path, notes: list[str]) -> None:
    """Not only in the tensors: also in what is kept beside them, which decides how the work goes on."""
    work = Work(tmp_path, notes.append)
    meta = {"runs": [{"cos": 0.25, "layer": 3}], "by_number": {2: "two", 10: "ten"}, "pair": (1, 2)}
    work.sequence("pass").save(1, {"a": np.zeros(3, np.float32)}, meta)
    assert work.sequence("pass").latest() is not None and not notes
    path = tmp_path / "pass" / "000001.json"
    text = path.read_text()
    for changed in (text.replace("0.25", "0.75"), text.replace("3", "4", 1), "[" * 100_000, "[]", '{"meta": null}'):
        path.write_text(changed)
        notes.clear()
        assert work.sequence("pass").latest() is None
        assert len(notes) == 1 and "is damaged" in notes[0]


def test_a_kept_array_is_told_by_its_hash(tmp_path: Path, notes: list[str]) -> None:
    work = Work(tmp_path / "w", notes.append)
    kept = work.keep("x", np.arange(4.0))
    assert work.kept(kept.reference) == kept
    content = bytearray(kept.path.read_bytes())
    content[-1] ^= 1
    kept.path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"x\.npy was changed"):
        work.kept(kept.reference)
    kept.path.unlink()
    with pytest.raises(ValueError, match=r"x\.npy is gone"):
        work.kept(kept.reference)
