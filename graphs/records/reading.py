"""Reading files that others wrote, with limits: whole files of a bounded size, and JSON that cannot do harm.

    read_file, read_text    a regular file, up to a size; no pipe, device or folder, which could go on for ever
    require_file            the same check of a file that a library reads
    read_json, read_object  JSON that every reader understands alike: see `parse_json`

Every JSON file that the project reads is read here (tests/test_rules.py). What is wrong is one InputError that names
the file. A file that is not there, or cannot be opened, is an UnreadableError: some callers have words of their own.
Loads nothing but the errors: `--help` and machines without pydantic read files too.
"""

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

from graphs.records.errors import InputError, with_article

MOST_BYTES: Final = 32 * 2**20  # of a JSON or text file; manifests of 7B models have 0.3 MiB, indices of shards 0.1
DEEPEST: Final = 100  # objects and arrays inside each other
MOST_DIGITS: Final = 40  # of a whole number; tokenizer_config.json has 10**30 for "no limit"
REMEDY: Final = "restore the file or make it again"


class UnreadableError(InputError):
    """A file that cannot be opened. `reason` is what the system says."""

    def __init__(self, path: Path | str, reason: str, wanted: str, do: str) -> None:
        super().__init__(f"cannot read {path}: {reason}", wanted=wanted, do=do)
        self.reason = reason


def read_file(path: Path, *, noun: str = "file", do: str = REMEDY, most: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file of at most `most` bytes; `noun` and `do` are for the error.

    Raises UnreadableError if it cannot be opened, InputError for a pipe, a device, a folder, or one that is larger.
    """
    with _opened(path, noun, do, most) as stream:
        content = stream.read(most + 1)
        if len(content) > most:  # it grew, or is one of the system's, whose sizes are 0
            raise _too_large(path, len(content), noun, do, most)
    return content


def require_file(path: Path, *, noun: str = "file", do: str = REMEDY, most: int = MOST_BYTES) -> None:
    """Raise as read_file, for a file that a library will read."""
    with _opened(path, noun, do, most):
        pass


@contextlib.contextmanager
def _opened(path: Path, noun: str, do: str, most: int) -> Iterator[BinaryIO]:
    try:
        # Without O_NONBLOCK, opening a pipe waits for somebody who writes into it.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise UnreadableError(path, reason, wanted=with_article(noun), do=do) from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
            raise InputError(f"cannot read {path}: it is {kind}", wanted=f"{with_article(noun)}, in a file", do=do)
        if status.st_size > most:
            raise _too_large(path, status.st_size, noun, do, most)
        with open(handle, "rb", closefd=False) as stream:
            yield stream
    finally:
        os.close(handle)


def _too_large(path: Path, size: int, noun: str, do: str, most: int) -> InputError:
    return InputError(f"{path} has {size} bytes or more", wanted=f"{with_article(noun)} of at most {most}", do=do)


def read_text(path: Path, *, noun: str = "text file", do: str = REMEDY, most: int = MOST_BYTES) -> str:
    """The text of a UTF-8 file. Raises as read_file, and InputError for bytes that are not UTF-8."""
    try:
        return read_file(path, noun=noun, do=do, most=most).decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}",
            wanted=with_article(noun),
            do=do,
        ) from error


def read_json(
    path: Path, *, noun: str = "JSON file", do: str = REMEDY, most: int = MOST_BYTES, finite: bool = True
) -> Any:
    """What a JSON file says. Raises as read_file, and InputError for one that `parse_json` refuses."""
    content = read_file(path, noun=noun, do=do, most=most)
    try:
        return parse_json(content, finite=finite)
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}", wanted=with_article(noun), do=do) from error


def read_object(
    path: Path, *, noun: str = "JSON file", do: str = REMEDY, most: int = MOST_BYTES, finite: bool = True
) -> dict[str, Any]:
    """The same of a file that must hold an object."""
    document = read_json(path, noun=noun, do=do, most=most, finite=finite)
    if not isinstance(document, dict):
        raise InputError(
            f"{path} is no JSON object, it holds a {type(document).__name__}",
            wanted=f"{with_article(noun)}: a JSON object",
            do=do,
        )
    return document


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    r"""JSON as the standard has it, which all readers understand alike.

    Raises ValueError, with the reason in a line, for what is no JSON or not UTF-8, a key that is there twice, NaN and
    infinite numbers (1e999 too), whole numbers of more than MOST_DIGITS digits, half a character (a lone \ud800), and
    more than DEEPEST levels. Nothing of it could be put into other JSON, numbers or files safely.
    With `finite` false NaN and Infinity are numbers, as Python writes them into files of its own.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode()
        if text.startswith("\ufeff"):
            raise ValueError("it begins with a byte order mark; save it as UTF-8 without one")
        document = (_DECODER if finite else _DECODER_OF_OWN).decode(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check(document)
    return document


_TOO_DEEP = f"more than {DEEPEST} objects and arrays inside each other"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {_shown(twice)} is there twice")
    return document


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits: {digits[:20]}...")
    return int(digits)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {_shown(text)} is too large")
    return number


def _constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_number, parse_constant=_constant
)
_DECODER_OF_OWN = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_number)


def _check(document: Any) -> None:
    """Raise ValueError for too many levels, and for text that has no UTF-8."""
    level = [document]
    for _ in range(DEEPEST + 1):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str) and not value.isascii():
                _require_characters(value)
        if not below:
            return
        level = below
    raise ValueError(_TOO_DEEP)


def _require_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a character in the text {_shown(text)}") from error


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
