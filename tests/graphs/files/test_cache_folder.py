"""Where what can be made again is kept."""

from pathlib import Path

import pytest

from graphs.files.cache_folder import cache_folder


def test_the_folder_is_where_caches_belong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("statistics") == tmp_path / "btp-export" / "statistics"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("statistics") == Path.home() / ".cache" / "btp-export" / "statistics"
