"""Files of prompts and of JSON lines, read alike by calibration and evaluation.

A line ends at a line feed, with or without a carriage return before it, and nowhere else: U+2028, U+2029 and U+0085, at
which `str.splitlines` cuts, may stand inside a JSON string. A byte order mark at the begin is not part of the text.
Lines with nothing in them are left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from graphs.records.errors import InputError, with_article
from graphs.records.reading import parse_json, read_file

MOST_BYTES = 2**30  # of a file of prompts or samples


@dataclass(frozen=True)
class Line:
    """A line that holds something; `where` names file and line for errors."""

    text: str
    where: str


def read_lines(path: Path, noun: str) -> list[Line]:
    """The lines of a UTF-8 file. Raises InputError if it cannot be read, or holds none; `noun` is for the error."""
    content = read_file(path, noun=noun, do="check the path", most=MOST_BYTES)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} line {number}: bytes that are not UTF-8",
            wanted=f"{with_article(noun)}, in UTF-8",
            do="save it as UTF-8",
        ) from error
    numbered = enumerate(text.split("\n"), 1)
    lines = [Line(line.removesuffix("\r"), f"{path} line {number}") for number, line in numbered if line.strip()]
    if not lines:
        raise InputError(f"{path} holds nothing", wanted=with_article(noun), do="write some lines")
    return lines


def json_record(line: Line, keys: Sequence[str]) -> dict[str, str]:
    """The values of `keys`, and of `kind` where it is given. Raises InputError naming the line unless all are text."""
    example = {"image": "cat.png", "prompt": "What is it?", "answer": "a cat"}
    try:
        record = parse_json(line.text)
        fields = {key: record[key] for key in keys} | ({"kind": record["kind"]} if "kind" in record else {})
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else "not a JSON object"
        reason += f": {error}" if isinstance(error, ValueError) else ""
        raise InputError(
            f"{line.where}: {reason}", wanted=json.dumps({key: example[key] for key in keys}), do="mend the line"
        ) from error
    wrong = next((key for key, value in fields.items() if not isinstance(value, str)), None)
    if wrong is not None:
        raise InputError(f"{line.where}: {wrong} is not text", wanted=f"{', '.join(keys)} as text", do="mend the line")
    return fields


def at(where: str, error: InputError) -> InputError:
    """The same error with the place in front that it comes from."""
    return InputError(f"{where}: {error.got}" if where else error.got, wanted=error.wanted, do=error.do)
