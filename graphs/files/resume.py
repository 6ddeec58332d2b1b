"""Checkpoints of long work, so that what was interrupted goes on where it was.

    work folder        named by a hash of everything that decides the result; removed when the work is done
      <sequence>/      one row of steps, of which the latest checkpoint is kept
        000012.safetensors   the tensors after step 12
        000012.json          what else is needed, and the hash of both; written last, so the step is whole
      <name>.npy       arrays that are read back from disk instead of being kept in memory

Files appear by renaming. A checkpoint that cannot be read, or whose hash is wrong, is reported and ignored. A folder
that another process works in is left to it; this one then works without checkpoints.
"""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphs.files.atomic import replacing, sha256, write_text
from graphs.files.checkpoint import open_tensors
from graphs.files.folders import lock_file
from graphs.files.safetensors_file import write_stream
from graphs.records.errors import InputError
from graphs.records.progress import Note
from graphs.records.reading import parse_json, read_object

INTERVAL = 30.0  # seconds of work that an interruption may cost


def digest(*parts: Any) -> str:
    """sha256 over JSON types, bytes and arrays, in order."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            state.update(f"{part.dtype}{part.shape}".encode())
            part = np.ascontiguousarray(part).view(np.uint8).tobytes() if part.size else b""
        elif not isinstance(part, bytes):
            part = json.dumps(part, sort_keys=True, ensure_ascii=False).encode()
        state.update(len(part).to_bytes(8, "little") + part)
    return state.hexdigest()


@dataclass(frozen=True)
class Step:
    """A checkpoint: `number` steps are done."""

    number: int
    tensors: Mapping[str, np.ndarray]
    meta: Any


class Work:
    """An open work folder; nothing is on disk before the first checkpoint or array is written."""

    def __init__(self, folder: Path, note: Note, interval: float = INTERVAL) -> None:
        self.folder, self.note, self._interval = folder, note, interval

    def sequence(self, name: str) -> "Sequence":
        """The row of steps of that name."""
        return Sequence(self.folder / name, self.note, self._interval)

    def keep(self, name: str, array: np.ndarray) -> "KeptArray":
        """Write an array to the folder, to be read back when it is asked for."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.npy"
        with replacing(path, sync=False) as stream:
            np.save(stream, array, allow_pickle=False)
        return KeptArray(path, sha256(path))

    def kept(self, reference: Any) -> "KeptArray":
        """The array of a `KeptArray.reference` from a checkpoint. Raises ValueError if it is gone or was changed."""
        path = self.folder / Path(str(reference["file"])).name
        if not path.is_file() or sha256(path) != reference["sha256"]:
            raise ValueError(f"{path.name} {'was changed' if path.is_file() else 'is gone'}")
        return KeptArray(path, str(reference["sha256"]))


@dataclass(frozen=True)
class KeptArray:
    """An array on disk."""

    path: Path
    sha256: str

    @property
    def reference(self) -> dict[str, str]:
        """What a checkpoint says of it, as JSON types."""
        return {"file": self.path.name, "sha256": self.sha256}

    def read(self) -> np.ndarray:
        """The array, memory-mapped anew each time: what was read leaves memory when the caller lets go of it."""
        array: np.ndarray = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return array


class Sequence:
    """Steps done one after another, with a checkpoint after some of them."""

    def __init__(self, folder: Path, note: Note, interval: float) -> None:
        self._folder, self._note, self._interval = folder, note, interval
        self._saved = time.monotonic()

    def latest(self) -> Step | None:
        """The last whole checkpoint, None if there is none."""
        for path in sorted(self._folder.glob("[0-9]*.json"), reverse=True):
            try:
                return _read(path)
            except (OSError, ValueError, LookupError, TypeError, RecursionError, InputError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                self._note(f"the checkpoint {path.stem} of an interrupted run is damaged ({reason}) and is not used")
        return None

    def resume(self, what: str) -> Step | None:
        """The last complete checkpoint; tells the user that `what` continues from it."""
        step = self.latest()
        if step is not None:
            self._note(f"resumed {what} of an interrupted run after step {step.number}")
        return step

    @property
    def due(self) -> bool:
        """Whether the last checkpoint is long enough ago for another."""
        return time.monotonic() - self._saved >= self._interval

    def save(self, number: int, tensors: Mapping[str, np.ndarray], meta: Any) -> None:
        """Write a checkpoint and remove the one before; a full disk is reported and work continues without."""
        name = f"{number:06d}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            data = self._folder / f"{name}.safetensors"
            with replacing(data, sync=False) as stream:
                write_stream(stream, tensors)
            record = {"sha256": _sealed(data, parse_json(json.dumps(meta), finite=False)), "meta": meta}
            write_text(self._folder / f"{name}.json", json.dumps(record), sync=False)
        except OSError as error:
            self._note(f"no checkpoint is written: {error.strerror or error}")
        else:
            for old in self._folder.iterdir():
                if old.stem != name:
                    old.unlink()
        self._saved = time.monotonic()


def _read(path: Path) -> Step:
    record = read_object(path, finite=False)  # margins may be infinite
    data = path.with_suffix(".safetensors")
    if not data.is_file():
        raise ValueError("its tensors are missing")
    if _sealed(data, record["meta"]) != record["sha256"]:
        raise ValueError("it was changed")
    tensors = {name: ref.read() for name, ref in open_tensors(data).items()}
    return Step(int(path.stem), tensors, record["meta"])


def _sealed(data: Path, meta: Any) -> str:
    """The hash of a checkpoint: its tensors and what else is needed, so that a changed number is noticed too."""
    return digest(sha256(data), meta)


@contextlib.contextmanager
def work_folder(root: Path, key: str, note: Note, *, interval: float = INTERVAL) -> Iterator[Work | None]:
    """The work folder of `key` below `root`; None if another process is in it or it cannot be made.

    It is removed when the block ends well. After an error or an interruption it stays if it holds a checkpoint, and
    goes if it does not. Raises what the block raises.
    """
    folder = root / key[:32]
    lock = root / f"{folder.name}.lock"
    with contextlib.ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            alone = stack.enter_context(lock_file(lock, wait=False))
        except OSError as error:
            note(f"interrupted work cannot be resumed: {root}: {error.strerror}")
            yield None
            return
        if not alone:
            note("the same work is being done by another process: this one keeps no checkpoints")
            yield None
            return
        try:
            yield Work(folder, note, interval)
        except BaseException:
            if not any(folder.glob("*/*.json")):
                _remove(folder, lock)
            raise
        _remove(folder, lock)


def _remove(folder: Path, lock: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        lock.unlink()
        folder.parent.rmdir()  # only if nothing else is in it
