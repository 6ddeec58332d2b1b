"""Where files are kept that can be made again: dummy and packed checkpoints, the checkpoints of interrupted work."""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from graphs.files.folders import lock_file
from graphs.records.errors import InputError


def cache_folder(*parts: str) -> Path:
    """`$XDG_CACHE_HOME/btp-export/...`, by default under ~/.cache; not made here.

    Without a home that can be written, as in a container that runs as a user of no name, it is a private folder among
    the temporary ones. Raises InputError if somebody else has taken that one's name.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else _home_cache()  # a relative one is to be ignored (XDG)
    return (_temporary() if root is None else root / "btp-export").joinpath(*parts)


@contextlib.contextmanager
def only_one(place: Path) -> Iterator[None]:
    """Nobody else makes the file or folder `place` at the same time."""
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = place.with_name(f".{place.name}.lock")
    try:
        with lock_file(lock, wait=True):
            yield
    finally:
        lock.unlink(missing_ok=True)


def _home_cache() -> Path | None:
    """~/.cache, or None where it neither is nor can be made."""
    try:
        cache = Path.home() / ".cache"
        there = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    except (RuntimeError, StopIteration, OSError):  # RuntimeError: neither HOME nor an entry of the user
        return None
    return cache if os.access(there, os.W_OK | os.X_OK) else None


def _temporary() -> Path:
    """A folder of this user's own; others may write beside it, so it is only taken if nobody else can write in it."""
    folder = Path(tempfile.gettempdir()) / f"btp-export-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise InputError(
            f"there is no home folder to keep results in, and {folder} is not this user's alone",
            wanted="a folder that nobody else can write in",
            do="export XDG_CACHE_HOME=/some/folder",
        )
    return folder
