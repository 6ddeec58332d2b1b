"""A folder is replaced in one step, and what a killed run left behind is put right by the next."""

import itertools
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graphs.files import folders
from graphs.files.atomic import check_destination, check_outside, fresh, is_bundle, staged
from graphs.files.folders import exchange, lock_file, recover, scratch, set_aside
from graphs.records.errors import InputError
from tests.children import exit_code

FORMAT = '{"format": "btp-bundle/1"}'


def replace_until_killed(destination: Path, name: str, number: int, can: str) -> None:
    """In a child: replace a bundle, and die, as by kill -9, before that call of the function of that name."""
    if can != "exchange":
        folders.exchange = lambda one, other: False
    calls = itertools.count(1)

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            if next(calls) == number:
                os._exit(9)
            return real(*given, **named)

        return call

    holder = {"exchange": folders, "rename": Path, "rmtree": shutil}[name]
    with staged(destination, force=True) as root:
        bundle(root, "new")
        setattr(holder, name, dying(getattr(holder, name)))


def bundle(root: Path, mark: str) -> Path:
    root.mkdir(exist_ok=True)
    (root / "manifest.json").write_text(FORMAT)
    (root / "mark").write_text(mark)
    return root


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mark(folder: Path) -> str:
    return (folder / "mark").read_text()


def exchanges_here(folder: Path) -> bool:
    return exchange(bundle(folder / "one", "1"), bundle(folder / "other", "2"))


def test_two_folders_are_exchanged(tmp_path: Path) -> None:
    if not exchanges_here(tmp_path):
        pytest.skip("this file system cannot exchange folders")
    assert (mark(tmp_path / "one"), mark(tmp_path / "other")) == ("2", "1")
    with pytest.raises(OSError, match="No such file"):
        exchange(tmp_path / "one", tmp_path / "nothing")


@pytest.mark.parametrize(
    ("can", "name", "number", "then"),
    [
        ("exchange", "exchange", 1, "old"),
        ("exchange", "rmtree", 1, "new"),
        ("rename", "rename", 1, "old"),
        ("rename", "rename", 2, "old"),  # the old one is aside, the new one not yet in place
        ("rename", "rmtree", 1, "new"),
    ],
)
def test_killed_at_any_step_nothing_is_lost(tmp_path: Path, can: str, name: str, number: int, then: str) -> None:
    if can == "exchange" and not exchanges_here(tmp_path):
        pytest.skip("this file system cannot exchange folders")
    place = tmp_path / "place"
    place.mkdir()
    bundle(place / "b", "old")
    assert exit_code(replace_until_killed, place / "b", name, number, can) == 9
    if can == "exchange":
        assert mark(place / "b") == then, "it is there at every moment"
    with pytest.raises(InputError, match="already holds a bundle"):
        check_destination(place / "b", force=False)  # whoever comes next
    assert mark(place / "b") == then and names(place) == ["b"]


def test_a_reader_never_finds_nothing(tmp_path: Path) -> None:
    if not exchanges_here(tmp_path):
        pytest.skip("this file system cannot exchange folders")
    place = tmp_path / "b"
    with staged(place) as root:
        bundle(root, "0")
    stop, missing = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            if not (place / "mark").is_file():
                missing.append(True)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(50):
        with staged(place, force=True) as root:
            bundle(root, str(number))
    stop.set()
    reader.join()
    assert not missing and mark(place) == "49"


def test_the_folder_of_a_living_run_is_left_alone(tmp_path: Path) -> None:
    started = multiprocessing.get_context("fork").Event()
    process = multiprocessing.get_context("fork").Process(target=_work, args=(tmp_path / "b", started), daemon=True)
    process.start()
    assert started.wait(30)
    recover(tmp_path / "b", is_bundle)
    left = names(tmp_path)
    assert len(left) == 1 and left[0].endswith(".partial")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    recover(tmp_path / "b", is_bundle)
    assert names(tmp_path) == []


def _work(place: Path, started: "multiprocessing.synchronize.Event") -> None:
    with staged(place):
        started.set()
        signal.pause()


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.symlink_to(path.parent / "victim"),
        lambda path: path.write_text("a file"),
    ],
)
def test_what_only_looks_like_a_leftover_is_not_touched(tmp_path: Path, make: Callable[[Path], None]) -> None:
    bundle(tmp_path / "victim", "theirs")
    for name in (".b.0123abcd.partial", ".b.0123abcd.old"):
        make(tmp_path / name)
    for name in (".b.partial", ".b.notes.old", ".other.0123abcd.partial", ".b.0123abcd.partial.txt"):
        (tmp_path / name).mkdir()
    before = names(tmp_path)
    recover(tmp_path / "b", is_bundle)
    assert names(tmp_path) == before and mark(tmp_path / "victim") == "theirs"


def test_an_old_folder_stays_if_something_else_took_its_place(tmp_path: Path) -> None:
    bundle(tmp_path / ".b.0123abcd.old", "old")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("years of work")
    recover(tmp_path / "b", is_bundle)
    assert mark(tmp_path / ".b.0123abcd.old") == "old" and names(tmp_path / "b") == ["thesis.txt"]
    assert set_aside(tmp_path / "b") == tmp_path / ".b.0123abcd.old"


def test_folders_for_measurements_are_swept(tmp_path: Path) -> None:
    (tmp_path / ".btp-0123abcd" / "bundle").mkdir(parents=True)
    with scratch(tmp_path) as one, scratch(tmp_path) as other:
        assert names(tmp_path) == sorted([one.name, other.name])
        assert one.stat().st_mode & 0o777 == 0o700
    assert names(tmp_path) == []


@pytest.mark.parametrize("inside", ["b", "b/processor", "link"])
def test_what_is_read_may_not_lie_in_what_is_replaced(tmp_path: Path, inside: str) -> None:
    bundle(tmp_path / "b", "old")
    (tmp_path / "b" / "processor").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "b" / "processor")
    with pytest.raises(InputError, match="which would be replaced"):
        check_outside(tmp_path / "b", [tmp_path, tmp_path / inside])
    check_outside(tmp_path / "b", [tmp_path, tmp_path / "bb"])


def test_a_system_without_exchange_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Without:
        pass

    monkeypatch.setattr(folders.ctypes, "CDLL", lambda *args, **kwargs: Without())
    assert exchange(bundle(tmp_path / "one", "1"), bundle(tmp_path / "other", "2")) is False
    assert mark(tmp_path / "one") == "1"


def test_a_lock_is_one_process_s_and_follows_no_link(tmp_path: Path) -> None:
    with lock_file(tmp_path / "a.lock", wait=False) as held, lock_file(tmp_path / "a.lock", wait=False) as other:
        assert held and not other
    (tmp_path / "victim").write_text("theirs")
    (tmp_path / "b.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"), lock_file(tmp_path / "b.lock", wait=False):
        pass
    assert (tmp_path / "victim").read_text() == "theirs"


def test_a_log_takes_the_place_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("theirs")
    (tmp_path / "a.log").symlink_to(tmp_path / "victim")
    with fresh(tmp_path / "a.log") as stream:
        stream.write(b"ours")
    assert (tmp_path / "victim").read_text() == "theirs" and (tmp_path / "a.log").read_text() == "ours"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "logs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link"):
        fresh(tmp_path / "logs" / "a.log")
    assert names(tmp_path / "elsewhere") == []
