r"""What may reach a terminal or a log: text of file names, options, models and devices without control characters.

A file called "\x1b]0;..." would otherwise move the cursor, rename the window or hide a line of ours.
"""

import json
import re

from graphs.records.errors import shortened

# All control characters but tab and line end (C0, delete, C1), the marks that turn the direction of text or end lines
# invisibly, and lone surrogates: bytes of a file name that are not UTF-8.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
NOT_ASCII = re.compile("[^\x00-\x7e]")


def printable(text: str) -> str:
    r"""The text with every character that a terminal would obey written as an escape: "\x1b", "\u202e"."""
    return UNPRINTABLE.sub(lambda match: _escape(ord(match[0])), text)


def one_line(text: str) -> str:
    """The same on one line, without the middle of a long one (graphs.records.errors.shortened)."""
    return shortened(printable(" ".join(text.split())))


def json_safe(document: str, *, ascii_only: bool = False) -> str:
    """A JSON document with such characters, which can only stand inside its strings, in JSON's own escapes."""
    pattern = NOT_ASCII if ascii_only else UNPRINTABLE
    return pattern.sub(lambda match: _json_escape(match[0]), document)


def _json_escape(character: str) -> str:
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else json.dumps(character)[1:-1]


def _escape(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
