"""Inputs that are nearly right: documents with a few values changed, files with a few bytes changed.

FUZZ is how many: the same few in every ordinary run; with BTP_FUZZ=hour (`make fuzz`) new ones for about an hour.
"""

import json
import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

_ALWAYS: Any = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("few", max_examples=40, derandomize=True, database=None, **_ALWAYS)
settings.register_profile("hour", max_examples=4000, **_ALWAYS)
FUZZ = settings.get_profile(os.environ.get("BTP_FUZZ", "few"))

# What no JSON writer would write, as text.
RAW = [
    "NaN", "-Infinity", "1e999", "9" * 5000, "1" + "0" * 400, '"\\ud800"', "-0", "1.0", "01", "'x'", "", "{",
    "[" * 2000 + "]" * 2000, '{"a":' * 200 + "1" + "}" * 200, '{"a": 1, "a": 2}',
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, [], {}, [[]], [None], {"a": 1}, [1, 2, 3], ["x"], {"": None}, [-1, -1], [1] * 1000,
    0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, 2**53, 2**63, -(2**63), 10**30, 0.0, -0.0, 0.5, -1.5, 1e-320, 1e308,
    "", " ", "..", "../x", "/etc/passwd", "/dev/zero", "a\0b", "\x1b[31mred", "\x1b]0;title\x07", "\u202ex", "<b>",
    "x" * 300, "b" * 20_000, "é", "\U0001f600", "\r\n", "{{7*7}}", "$(x)", "manifest.json", "graphs/head.onnx",
]  # fmt: skip
_MARK = "\ufdd0"  # a non-character around the number of a raw piece


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in it."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    return [place for key in keys for place in ((tree, key), *_places(tree[key]))]


@st.composite
def documents(draw: st.DrawFn, base: Any) -> bytes:
    """The JSON of `base` with up to three values changed, removed, doubled or renamed."""
    tree = json.loads(json.dumps(base))
    pieces: list[str] = []
    for _ in range(draw(st.integers(1, 3))):
        places = _places(tree)
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        what = draw(st.sampled_from(["value", "value", "raw", "near", "remove", "double", "rename", "other"]))
        if what == "value":
            holder[key] = json.loads(json.dumps(draw(st.sampled_from(VALUES))))
        elif what == "raw":
            pieces.append(draw(st.sampled_from(RAW)))
            holder[key] = f"{_MARK}{len(pieces) - 1}{_MARK}"
        elif what == "near":
            holder[key] = _near(draw, holder[key])
        elif what == "remove":
            del holder[key]
        elif what == "other":
            holder[key] = json.loads(json.dumps(draw(st.sampled_from([one[key] for one, key in places]))))
        elif isinstance(holder, list):
            holder.insert(key, json.loads(json.dumps(holder[key])))
        elif what == "rename":
            holder[draw(st.sampled_from(["", "\x1b[31m", "extra", f"{key}x"]))] = holder.pop(key)
        else:
            holder["extra"] = holder[key]
    text = json.dumps(tree, ensure_ascii=draw(st.booleans()))
    for number, piece in enumerate(pieces):
        text = text.replace(json.dumps(f"{_MARK}{number}{_MARK}"), piece).replace(f'"{_MARK}{number}{_MARK}"', piece)
    return text.encode("utf-8", "surrogatepass")


def _near(draw: st.DrawFn, value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return draw(st.sampled_from([value + 1, value - 1, -value, value * 1000, str(value), [value]]))
    if isinstance(value, str):
        return draw(
            st.sampled_from([value.upper(), f"{value}x", value[:-1], f"../{value}", f"{value}\x1b[2J", [value]])
        )
    if isinstance(value, list):
        return draw(st.sampled_from([value[:-1], value + value, value[::-1], {"0": value}]))
    return list(value.values())


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes with a few changed, or a piece cut off, doubled or put in."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        what = draw(st.sampled_from(["flip", "flip", "set", "cut", "insert", "number", "double"]))
        if what == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "set" and data:
            data[at] = draw(st.sampled_from([0, 0x7F, 0x80, 0xFF]))
        elif what == "cut":
            del data[at:]
        elif what == "insert":
            data[at:at] = draw(st.sampled_from([b"\0" * 8, b"\xff" * 8, b"A" * 5000]))
        elif what == "number":
            data[at : at + 4] = draw(st.sampled_from([b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80"]))
        else:
            data[at:at] = data[at : at + 4096]
    return bytes(data)
