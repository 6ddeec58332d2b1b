"""Where what can be made again is kept."""

import os
import tempfile
from pathlib import Path

import pytest

from graphs.files.cache_folder import cache_folder
from graphs.records.errors import InputError


def test_the_folder_is_where_caches_belong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("statistics") == tmp_path / "btp-export" / "statistics"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("statistics") == Path.home() / ".cache" / "btp-export" / "statistics"


def test_without_a_home_that_can_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Path, "home", _nowhere)
    own = tmp_path / f"btp-export-{os.getuid()}"
    assert cache_folder("work") == own / "work"
    assert own.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(Path, "home", lambda: Path("/proc"))  # nobody can make a folder there, root included
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith("/proc"))
    assert cache_folder("work") == own / "work"


@pytest.mark.parametrize("taken", ["link", "open"])
def test_a_folder_that_others_can_write_in_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, taken: str
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Path, "home", _nowhere)
    own, other = tmp_path / f"btp-export-{os.getuid()}", tmp_path / "other"
    other.mkdir()
    if taken == "link":
        own.symlink_to(other)
    else:
        own.mkdir()
        own.chmod(0o777)
    with pytest.raises(InputError, match="not this user's alone"):
        cache_folder("work")


def _nowhere() -> Path:
    raise RuntimeError("Could not determine home directory.")
