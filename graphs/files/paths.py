"""Paths as users write them, before anything is opened."""

import os
import sys
from pathlib import Path

from graphs.records.errors import InputError


def expanded(path: Path | str) -> Path:
    """The path with `~` and `~user` resolved. A shell leaves `--model=~/folder` to the program that it starts.

    Raises InputError where that home folder is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"{path}: no such home folder is known",
            wanted="a user that the system knows; for ~ alone, HOME",
            do="write the whole path",
        ) from error


def require_utf8(path: Path) -> None:
    """Raise InputError unless the path's bytes are UTF-8, none of them null.

    ONNX Runtime and the tokenizers write paths in UTF-8 whatever the locale says: they would look for another file, or
    refuse this one as no text.
    """
    if "\0" in str(path):
        raise InputError(f"the path {str(path)!r} holds a null byte", wanted="a path", do="leave it out")
    if not is_text(str(path)) or str(path).encode() != os.fsencode(path):
        raise InputError(f"the path {path} is not UTF-8", wanted="names in UTF-8", do=_remedy("rename it"))


def require_text(text: str, what: str) -> None:
    """Raise InputError for text that no tokenizer takes; `what` it is, such as "the prompt"."""
    if not is_text(text):
        raise InputError(f"{what} {text!r} is not UTF-8", wanted="text in UTF-8", do=_remedy("write it in UTF-8"))


def is_text(text: str) -> bool:
    """Whether it holds whole characters alone: no bytes that are not UTF-8, no half of a pair from a JSON escape."""
    try:
        text.encode()
    except UnicodeEncodeError:  # Python holds such bytes as lone surrogates
        return False
    return True


def _remedy(otherwise: str) -> str:
    """Where the locale is of another encoding, what looks wrong may be right in UTF-8."""
    return otherwise if sys.getfilesystemencoding() == "utf-8" else "export LC_ALL=C.UTF-8 PYTHONUTF8=1"
