"""Statistics that were measured before: one file each, named by what they were measured on.

The key is a hash of everything that decides the numbers: the model's weights and configuration, the processor's files,
pictures and prompts, the settings, and the versions of the code. An entry that cannot be read is reported, measured
again and replaced; a folder that cannot be written is reported, and nothing is kept. The cache never changes a plan.
"""

from __future__ import annotations

import hashlib
import json
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np

from calibrate.measure.statistics import TOP_SHARES, Statistics
from graphs.files.atomic import SMALL_FILE, hub_sha256, replacing, sha256
from graphs.files.checkpoint import Checkpoint
from graphs.files.resume import digest
from graphs.records.progress import Note
from graphs.records.reading import parse_json

FORMAT = "btp-statistics/3"  # raise it when what is measured, or how, changes
_SAMPLED = 4096  # bytes at the start of each tensor of a big file


# What numpy, zipfile, zlib and json raise for an entry with changed bytes; numpy reads heads with Python's tokenizer
DAMAGED: Final = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, struct.error,
    SyntaxError, tokenize.TokenError, TypeError, ValueError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def key_of(parts: Mapping[str, Any]) -> str:
    """The name of an entry: sha256 of `parts` (JSON types) and the format."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class StatisticsCache:
    """Entries in `folder` (None: nothing is kept), telling `say` what becomes of them."""

    folder: Path | None
    say: Note | None = None

    def get(self, key: str) -> Statistics | None:
        """The statistics of that key, or None if there are none that can be read."""
        path = self._path(key)
        if path is None or not path.exists():
            return None
        try:
            statistics = _read(path, key)
        except DAMAGED as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._tell(f"cached statistics {path.name} are damaged ({reason}): measured again")
            return None
        self._tell(f"statistics of {statistics.samples} samples reused from the cache (--no-cache measures again)")
        return statistics

    def get_or_measure(self, key: str, measure: Callable[[], Statistics]) -> Statistics:
        """The statistics of that key; where there are none they are measured now, and kept."""
        statistics = self.get(key)
        if statistics is None:
            statistics = measure()
            self.put(key, statistics)
        return statistics

    def put(self, key: str, statistics: Statistics) -> None:
        """Keep statistics; written under another name and renamed, so that an entry is complete or absent."""
        path = self._path(key)
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, sync=False) as stream:
                _write(stream, key, statistics)
        except OSError as error:
            self._tell(f"statistics are not cached: {path.parent}: {error.strerror or error}")

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{key}.npz"

    def _tell(self, text: str) -> None:
        if self.say is not None:
            self.say(text)


def checkpoint_identity(checkpoint: Checkpoint, *, small: int = SMALL_FILE) -> dict[str, str]:
    """What tells one set of weights from another, by file, without reading all of a big one.

    See docs/decisions/statistics-cache.md: a file of up to `small` bytes is hashed whole; a hub download carries its
    sha256 in its name; of any other big file size, time of change, header and the start of every tensor are hashed.
    """
    identity = {"config.json": sha256(checkpoint.folder / "config.json")}
    for name, path in zip(checkpoint.shards, checkpoint.files, strict=True):
        if path.stat().st_size <= small:
            identity[name] = sha256(path)
        else:
            identity[name] = hub_sha256(path) or _sampled_hash(checkpoint, path)
    return identity


def _sampled_hash(checkpoint: Checkpoint, path: Path) -> str:
    stat = path.stat()
    state = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    refs = sorted((ref for ref in checkpoint.tensors.values() if ref.file == path), key=lambda ref: ref.offset)
    with path.open("rb") as stream:
        for ref in refs:
            state.update(f"{ref.stored_name} {ref.dtype} {ref.shape} {ref.offset}".encode())
            stream.seek(ref.offset)
            state.update(stream.read(min(_SAMPLED, ref.nbytes)))
    return state.hexdigest()


def _sealed(head: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """The hash of an entry: all its numbers."""
    return digest(dict(head), *(arrays[name] for name in sorted(arrays)))


def _write(stream: Any, key: str, statistics: Statistics) -> None:
    arrays = {field.name: getattr(statistics, field.name) for field in fields(statistics) if field.name != "taus"}
    head = {"format": FORMAT, "key": key, "taus": list(statistics.taus)}
    head["sha256"] = _sealed(head, arrays)
    np.savez_compressed(stream, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)


def _read(path: Path, key: str) -> Statistics:
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
        head = parse_json(stored["head"].tobytes())
        if head["format"] != FORMAT or head["key"] != key:
            raise ValueError("it is another entry")
        arrays = {field.name: stored[field.name] for field in fields(Statistics) if field.name != "taus"}
    if _sealed({name: part for name, part in head.items() if name != "sha256"}, arrays) != head["sha256"]:
        raise ValueError("its numbers were changed")
    statistics = Statistics(taus=tuple(float(tau) for tau in head["taus"]), **arrays)
    samples, layers, taus = statistics.counts.shape
    measured = len(statistics.divergence)
    wanted = {
        "counts": (samples, layers, len(statistics.taus)),
        "attention": (samples, layers),
        "top_shares": (samples, layers, len(TOP_SHARES)),
        "divergence": (measured, layers),
        "agreement": (measured, layers),
        "logits": (int(statistics.lengths.sum()), *statistics.logits.shape[1:2]),
        "answers": (int(statistics.lengths.sum()),),
        "lengths": (samples,),
    }
    wrong = [name for name, shape in wanted.items() if getattr(statistics, name).shape != shape]
    if wrong or taus != len(statistics.taus) or not 0 < measured <= samples:
        raise ValueError(f"{wrong[0] if wrong else 'its head'} has the wrong shape")
    return statistics
