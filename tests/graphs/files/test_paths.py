"""Paths as users write them."""

import os
import sys
from pathlib import Path

import pytest

from graphs.files.paths import expanded, require_text, require_utf8
from graphs.records.errors import InputError


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    assert expanded("~/model") == Path("/somebody/model") and expanded(Path("~")) == Path("/somebody")
    assert expanded("folder/~/model") == Path("folder/~/model")
    with pytest.raises(InputError, match="~no-such-user/model: no such home folder"):
        expanded("~no-such-user/model")


@pytest.mark.parametrize("name", [os.fsdecode(b"caf\xe9"), "\ud83d", "a\udc80"])
def test_what_is_no_text(name: str) -> None:
    with pytest.raises(InputError, match="is not UTF-8"):
        require_utf8(Path("folder") / name)
    with pytest.raises(InputError, match=r"the prompt .* is not UTF-8"):
        require_text(name, "the prompt")


@pytest.mark.parametrize("name", ["plain", "größe", "漢字", "\U0001f600"])
def test_what_is_text(name: str) -> None:
    require_utf8(Path(name))
    require_text(name, "the prompt")


def test_a_locale_of_another_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that are text there, and other bytes than UTF-8 has: libraries would look for another file."""
    monkeypatch.setattr(os, "fsencode", lambda path: str(path).encode("latin-1"))
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")
    require_utf8(Path("plain"))
    with pytest.raises(InputError, match=r"größe is not UTF-8\n.*\ndo this: export LC_ALL=C.UTF-8"):
        require_utf8(Path("größe"))
