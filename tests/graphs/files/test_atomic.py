"""A bundle appears whole or not at all, and nothing but a bundle is ever replaced."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from graphs.files import atomic, folders
from graphs.files.atomic import (
    check_space,
    check_writable,
    copied_bytes,
    link_or_copy,
    place,
    replacing,
    sha256,
    staged,
    write_json,
    write_text,
    write_texts,
)
from graphs.files.signals import uninterrupted
from graphs.records.errors import InputError


def write_bundle(root: Path, mark: str) -> None:
    (root / "manifest.json").write_text('{"format": "btp-bundle/1"}')
    (root / "mark").write_text(mark)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_is_not_there_until_the_block_ends(tmp_path: Path) -> None:
    with staged(tmp_path / "b") as root:
        assert root.parent == tmp_path and root.name.startswith(".b.")
        write_bundle(root, "new")
        assert not (tmp_path / "b").exists()
    assert names(tmp_path) == ["b"]
    assert (tmp_path / "b" / "mark").read_text() == "new"


@pytest.mark.parametrize("lasting", [True, False])
def test_what_lasts_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lasting: bool
) -> None:
    """Every file and folder of it, and then the name itself."""
    synced, out = list[Path](), tmp_path / "b"

    def fsync(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")))

    with staged(out, sync=lasting) as folder:
        (folder / "deep").mkdir()
        for path in (folder / "a.txt", folder / "deep" / "b.txt"):
            path.write_text("new")
        monkeypatch.setattr(os, "fsync", fsync)
    inside = [folder / "a.txt", folder / "deep", folder / "deep" / "b.txt", folder] if lasting else []
    assert synced == [*inside, tmp_path] and (out / "deep" / "b.txt").read_text() == "new"


def test_permissions_are_those_of_an_ordinary_folder(tmp_path: Path) -> None:
    (tmp_path / "ordinary").mkdir()
    with staged(tmp_path / "b") as root:
        write_bundle(root, "new")
    assert (tmp_path / "b").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), staged(tmp_path / "made" / "for" / "b") as root:
        write_bundle(root, "new")
        raise error
    assert names(tmp_path) == []


def test_parents_that_were_there_stay(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(RuntimeError), staged(tmp_path / "there" / "new" / "b"):
        raise RuntimeError
    assert names(tmp_path) == ["there"] and names(tmp_path / "there") == []


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with staged(tmp_path / "b") as root:
        write_bundle(root, "new")
    assert (tmp_path / "b" / "mark").read_text() == "new"


def test_a_bundle_is_replaced_only_with_force(tmp_path: Path) -> None:
    with staged(tmp_path / "b") as root:
        write_bundle(root, "old")
    with pytest.raises(InputError, match="already holds a bundle"), staged(tmp_path / "b"):
        pytest.fail("must refuse before any work")
    with staged(tmp_path / "b", force=True) as root:
        write_bundle(root, "new")
        assert (tmp_path / "b" / "mark").read_text() == "old"
    assert (tmp_path / "b" / "mark").read_text() == "new"
    assert names(tmp_path) == ["b"]


def test_an_error_with_force_keeps_the_old_bundle(tmp_path: Path) -> None:
    with staged(tmp_path / "b") as root:
        write_bundle(root, "old")
    with pytest.raises(RuntimeError), staged(tmp_path / "b", force=True) as root:
        write_bundle(root, "new")
        raise RuntimeError
    assert (tmp_path / "b" / "mark").read_text() == "old" and names(tmp_path) == ["b"]


def test_a_failing_rename_brings_the_old_bundle_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with staged(tmp_path / "b") as root:
        write_bundle(root, "old")
    monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    real = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(5, "Input/output error", str(self))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output"), staged(tmp_path / "b", force=True) as root:
        write_bundle(root, "new")
    assert (tmp_path / "b" / "mark").read_text() == "old" and names(tmp_path) == ["b"]


@pytest.mark.parametrize("content", [{"thesis.txt": "years of work"}, {"manifest.json": '{"name": "web app"}'}])
def test_what_is_no_bundle_is_never_touched(tmp_path: Path, content: dict[str, str]) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_text(text)
    with pytest.raises(InputError, match="no bundle"), staged(folder, force=True):
        pytest.fail("must refuse before any work")
    assert {path.name: path.read_text() for path in folder.iterdir()} == content


def test_what_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no bundle"), staged(tmp_path / "b") as root:
        write_bundle(root, "new")
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "thesis.txt").write_text("years of work")
    assert names(tmp_path) == ["b"] and names(tmp_path / "b") == ["thesis.txt"]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("a file")
    with pytest.raises(InputError, match="is a file"), staged(tmp_path / "b", force=True):
        pass
    with pytest.raises(InputError, match="cannot write in"), staged(tmp_path / "b" / "c"):
        pass
    assert (tmp_path / "b").read_text() == "a file"


def test_whether_files_can_be_made_is_known_before_the_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder")
    (tmp_path / "b").write_text("a file")
    with pytest.raises(InputError, match="b is a file"):
        check_writable(tmp_path / "b" / "c")
    with pytest.raises(InputError, match=r"cannot write in /proc: .*\n.*\n.*another file"):
        check_writable(Path("/proc/no/folder"), do="give another file name")
    assert names(tmp_path) == ["b"] and (tmp_path / "b").read_text() == "a file"


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "disk" / "real")
    with staged(tmp_path / "b") as root:
        assert root.parent == tmp_path / "disk"
        write_bundle(root, "new")
    assert (tmp_path / "b").is_symlink() and (tmp_path / "b" / "mark").read_text() == "new"


def test_space_is_checked_with_numbers(tmp_path: Path) -> None:
    check_space(tmp_path / "b", 1)
    with pytest.raises(InputError, match=r"needs 1048576\.1 GiB, .* has .* free"):
        check_space(tmp_path / "not" / "there", 2**50)


def test_links_and_copies(tmp_path: Path) -> None:
    small, big, linked = tmp_path / "small", tmp_path / "big", tmp_path / "linked"
    small.write_bytes(b"1234567890")
    big.write_bytes(b"12345678901")
    linked.symlink_to(big)
    target = tmp_path / "target"
    target.mkdir()
    inodes = {}
    for link in ("auto", "hard", "copy"):
        for source in (small, linked):
            entry = place(source, target / f"{link}-{source.name}", link, small=10)  # type: ignore[arg-type]
            path = target / entry.file
            assert not path.is_symlink()
            assert (entry.size, entry.sha256) == (path.stat().st_size, sha256(source.resolve()))
            inodes[link, source.name] = path.stat().st_ino
    assert {key for key, inode in inodes.items() if inode in (small.stat().st_ino, big.stat().st_ino)} == {
        ("auto", "linked"), ("hard", "small"), ("hard", "linked"),
    }  # fmt: skip
    assert [copied_bytes([small, linked], target, link, small=10) for link in ("auto", "hard", "copy")] == [10, 0, 21]


def test_hard_links_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_bytes(b"bytes")
    assert place(tmp_path / "a", tmp_path / "b", "auto", small=0).size == 5
    with pytest.raises(InputError, match="cannot hard-link"):
        place(tmp_path / "a", tmp_path / "c", "hard")


@pytest.fixture
def own_handler() -> Iterator[list[int]]:
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    yield got
    signal.signal(signal.SIGTERM, before)


def test_signals_are_held_back_and_then_delivered(own_handler: list[int]) -> None:
    with uninterrupted():
        signal.raise_signal(signal.SIGTERM)
        assert own_handler == []
    assert own_handler == [signal.SIGTERM]


# -- single files ----------------------------------------------------------------------------------------------------


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as stream:
        stream.write(b"new")
        stream.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(error), replacing(tmp_path / "a.txt") as stream:
        stream.write(b"half of the n")
        raise error
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_a_link_at_the_temporary_name_is_never_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can write in the folder could guess a name and lay a link there: another name is taken."""
    guesses = iter(["guessed", "another"])
    monkeypatch.setattr(folders.secrets, "token_hex", lambda count: next(guesses))
    victim, trap = tmp_path / "victim", tmp_path / ".a.txt.guessed.partial"
    victim.write_text("theirs")
    trap.symlink_to(victim)
    write_text(tmp_path / "a.txt", "ours")
    assert victim.read_text() == "theirs" and trap.is_symlink()
    assert (tmp_path / "a.txt").read_text() == "ours" and not (tmp_path / "a.txt").is_symlink()


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "a") as other:
        one.write(b"one")
        other.write(b"other")
    assert (tmp_path / "a").read_bytes() == b"one"  # whose block ends last, and whole
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        (tmp_path / "ordinary").write_text("")
        write_text(tmp_path / "a", "")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_long_name_leaves_room_for_the_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write_text(path, "text")
    assert path.read_text() == "text"


def test_json_is_written_as_all_our_files(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": "ä", "a": 1})
    assert (tmp_path / "a.json").read_bytes() == '{\n "b": "ä",\n "a": 1\n}\n'.encode()


def test_files_that_belong_together_appear_in_order_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()  # in the way of the second
    (tmp_path / "b" / "full").write_text("")
    with pytest.raises(OSError, match="directory"):
        write_texts(tmp_path, {"b": "2", "a": "1"})
    assert names(tmp_path) == ["b"], "the first could not take its place, so the second does not"
    write_texts(tmp_path, {"c": "3", "a": "1"})
    assert names(tmp_path) == ["a", "b", "c"] and (tmp_path / "c").read_text() == "3"


def test_a_link_is_made_where_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_text("bytes")
    (tmp_path / "soft").symlink_to(source)
    link_or_copy(tmp_path / "soft", tmp_path / "linked")
    assert (tmp_path / "linked").samefile(source) and not (tmp_path / "linked").is_symlink()

    def refuse(*args: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(atomic.os, "link", refuse)
    link_or_copy(source, tmp_path / "copied")
    assert (tmp_path / "copied").read_text() == "bytes" and not (tmp_path / "copied").samefile(source)
    with pytest.raises(FileExistsError):
        link_or_copy(source, tmp_path / "copied")
