"""Files that others wrote: whatever they are, one InputError that names the file, soon and without much memory."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from btp_export.dummy.checkpoints import read_marker
from btp_export.families import _generation, _processor
from btp_export.planning import latency, plan_folder
from btp_export.profiling import profile, sources
from calibrate.data.text_files import read_lines
from engines.tensorrt import trtexec
from engines.tensorrt.kit.device_kit import is_engines
from engines.tensorrt.records import EnginesRecord
from graphs.files.atomic import is_bundle
from graphs.files.bundle import Bundle
from graphs.files.checkpoint import Checkpoint, missing_shards, read_config
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan
from graphs.records.reading import DEEPEST, MOST_BYTES, UnreadableError, parse_json, read_file, read_object, read_text

BAD: dict[str, bytes] = {
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a level too deep": b"[" * (DEEPEST + 2) + b"]" * (DEEPEST + 2),
    "twice": b'{"a": 1, "b": {"x": 1, "x": 1}}',
    "NaN": b"[NaN]",
    "infinite": b"[-Infinity]",
    "too large": b"[1e999]",
    "5,000 digits": b"[" + b"9" * 5000 + b"]",
    "400 digits": b"[" + b"9" * 400 + b"]",
    "half a character": rb'["\ud800"]',
    "half a character in a key": rb'{"\udfff\ud800": 1}',
    "not UTF-8": b'["\xff"]',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "a control character": b'["\n"]',
    "cut off": b'{"a": ',
    "two documents": b"{} {}",
    "empty": b"",
    "zero bytes": b"\0" * 100,
}


@pytest.mark.parametrize("name", BAD)
def test_what_not_every_reader_understands_alike_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"\S") as caught:
        parse_json(BAD[name])
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_what_published_files_hold_is_read() -> None:
    limit = 1000000000000000019884624838656  # tokenizer_config.json of most models
    text = json.dumps({"model_max_length": limit, "deep": json.loads("[" * 90 + "]" * 90), "é": ["\U0001f600", -0.0]})
    assert parse_json(text) == json.loads(text)
    assert parse_json(text.encode()) == parse_json(f" \r\n{text}\n")


SCALARS = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
DOCUMENTS = st.recursive(
    SCALARS | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


@given(DOCUMENTS, st.booleans())
def test_everything_else_is_what_python_reads(document: Any, ascii_only: bool) -> None:
    text = json.dumps(document, ensure_ascii=ascii_only)
    assert parse_json(text.encode()) == document


# -- every reader of a file ------------------------------------------------------------------------------------------


def _checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(folder, {}, {}, (), ())


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "plan": ("plan.json", PruningPlan.load),
    "manifest": ("manifest.json", lambda path: Bundle.open(path.parent)),
    "is it a bundle": ("manifest.json", lambda path: is_bundle(path.parent)),
    "config": ("config.json", lambda path: read_config(path.parent)),
    "index": ("model.safetensors.index.json", lambda path: missing_shards(path.parent)),
    "generation": ("generation_config.json", lambda path: _generation.read_generation_file(_checkpoint(path.parent))),
    "processor": ("preprocessor_config.json", lambda path: _processor.load_processor(path.parent)),
    "dummy": ("btp-dummy.json", lambda path: read_marker(path.parent)),
    "engines": ("engines.json", lambda path: EnginesRecord.load(path.parent)),
    "is it a kit": ("engines.json", lambda path: is_engines(path.parent)),
    "times": ("a.times.json", trtexec.read_times),
    "layers": ("a.profile.json", trtexec.read_layers),
    "system": ("system.txt", sources.read_system),
    "earlier profile": ("profile.baked.json", profile._read_document),
    "latency": ("bench.json", latency.read_latency),
    "front": ("front.json", lambda path: plan_folder._is_front(path.parent)),
    "samples": ("data.jsonl", lambda path: read_lines(path, "samples")),
}


def _large(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(2**40)  # takes no space


KINDS: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "a terabyte": _large,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_waits_or_reads_for_ever(reader: str, kind: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    KINDS[kind](tmp_path / name)
    try:
        assert not read(tmp_path / name) or reader in ("index",)
    except InputError as error:
        assert str(tmp_path) in error.got


@pytest.mark.parametrize("content", ["deep lists", "deep objects", "twice", "5,000 digits", "not UTF-8", "cut off"])
@pytest.mark.parametrize("reader", sorted(set(READERS) - {"system", "samples", "is it a kit"}))
def test_every_reader_of_json_refuses_it(reader: str, content: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    (tmp_path / name).write_bytes(BAD[content])
    try:
        assert not read(tmp_path / name)
    except InputError as error:
        assert str(tmp_path) in error.got and len(str(error)) < 2000


def test_a_file_s_size_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_file(path, most=5) == b"12345"
    with pytest.raises(InputError, match=f"^{re.escape(str(path))} has 5 bytes or more"):
        read_file(path, most=4)
    assert MOST_BYTES >= 2**20


def test_what_is_not_there_can_be_told_apart(tmp_path: Path) -> None:
    for path in (tmp_path / "no", tmp_path / "no" / "x", tmp_path / "a\0b"):
        with pytest.raises(UnreadableError) as caught:
            read_file(path)
        assert caught.value.reason in caught.value.got
    (tmp_path / "list").write_text("[]")
    with pytest.raises(InputError, match="no JSON object, it holds a list"):
        read_object(tmp_path / "list")
    (tmp_path / "text").write_bytes(b"ab\xff")
    with pytest.raises(InputError, match="not UTF-8: byte 2 is 0xff"):
        read_text(tmp_path / "text")
