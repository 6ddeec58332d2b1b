"""Whole folders in their place: exchanged in one step where the system can, and what killed runs left behind.

    .NAME.????????.partial   a folder being written for NAME, or, after an exchange, the old one on its way out
    .NAME.????????????.partial   a file being written for NAME
    .NAME.????????.old       the old NAME where folders cannot be exchanged: it steps aside before the new one comes
    .btp-????????            bundles made for a measurement

Who works in one of them holds a lock on it that ends with the process, so the next one to come can tell what is left
over. A `.old` whose NAME is not there is the user's only copy: it gets its name back. All else is removed.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

PARTIAL: Final = ".partial"  # how the names of files and folders end that are not complete
OLD: Final = ".old"
SCRATCH: Final = ".btp-"  # how the names of folders for measurements begin
_NOT_HERE: Final = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2  # linux/fs.h


def put_in_place(folder: Path, destination: Path) -> None:
    """Give a complete folder its place; an old one there is exchanged with it and then removed.

    Where the system cannot exchange, the old one steps aside first, and comes back if the new one cannot follow.
    """
    if not destination.exists() or not any(destination.iterdir()):
        folder.rename(destination)  # an empty folder is replaced in one step
        sync_folder(destination.parent)
        return
    if exchange(folder, destination):
        aside = folder
    else:
        aside = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}{OLD}")
        destination.rename(aside)
        try:
            folder.rename(destination)
        except OSError:
            if not destination.exists():
                aside.rename(destination)
            raise
    sync_folder(destination.parent)
    shutil.rmtree(aside, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot. Raises OSError."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_HERE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


@contextlib.contextmanager
def locked_folder(parent: Path, prefix: str, suffix: str = "", mode: int = 0o777) -> Iterator[Path]:
    """A new folder of a name of its own, locked until the block ends, by whatever name it goes then."""
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(4)}{suffix}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode)
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.suppress(OSError):  # a file system without locks: nobody can sweep there either
                fcntl.flock(handle, fcntl.LOCK_EX)
            if folder.is_dir():  # else somebody has swept it before it was locked
                break
            os.close(handle)
    try:
        yield folder
    finally:
        os.close(handle)


@contextlib.contextmanager
def scratch(parent: Path, prefix: str = SCRATCH) -> Iterator[Path]:
    """A folder in `parent` that is removed at the end; those of killed runs are removed at the beginning."""
    for left in _left_over(parent, re.escape(prefix)):
        shutil.rmtree(left, ignore_errors=True)
    with locked_folder(parent, prefix, mode=0o700) as folder:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def scratch_beside(folder: Path) -> Iterator[Path]:
    """A folder that is removed at the end, beside `folder`, so that its files can be hard-linked.

    In the system's temporary folder where that place cannot be written.
    """
    beside = folder.resolve().parent
    with scratch(beside if os.access(beside, os.W_OK) else Path(tempfile.gettempdir())) as temporary:
        yield temporary


def recover(destination: Path, is_ours: Callable[[Path], bool]) -> None:
    """Give an interrupted replacement of `destination` its old folder back, and remove what killed runs have left."""
    prefix = re.escape(f".{destination.name}.")
    for left in _left_over(destination.parent, prefix, re.escape(OLD)):
        if is_ours(destination):
            shutil.rmtree(left, ignore_errors=True)
        elif is_ours(left) and (not destination.exists() or destination.is_dir()):
            with contextlib.suppress(OSError):  # an empty folder gives way, any other does not
                left.rename(destination)
    for left in _left_over(destination.parent, prefix, re.escape(PARTIAL)):
        shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def lock_file(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a file, made if it is not there; False where another process has it and `wait` is not set.

    A link at its place is never followed. Raises OSError where it cannot be opened.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def set_aside(destination: Path) -> Path | None:
    """The old folder that an interrupted replacement left beside `destination`, if one did."""
    return next(iter(_left_over(destination.parent, re.escape(f".{destination.name}."), re.escape(OLD))), None)


def new_file(path: Path) -> tuple[int, Path]:
    """A new file of a name of its own beside `path`, open for writing and locked until it is closed.

    O_EXCL never opens an existing file or link.
    """
    while True:
        partial = path.with_name(f".{path.name[:200]}.{secrets.token_hex(6)}{PARTIAL}")
        with contextlib.suppress(FileExistsError):
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            if partial.is_file():  # else somebody has swept it before it was locked
                return handle, partial
            os.close(handle)


def sweep_files(path: Path) -> None:
    """Remove the files that killed runs were writing for `path`."""
    for left in _left_over(path.parent, re.escape(f".{path.name[:200]}."), re.escape(PARTIAL), digits=12, flags=0):
        with contextlib.suppress(OSError):
            left.unlink()


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _left_over(
    parent: Path, prefix: str, suffix: str = "", *, digits: int = 8, flags: int = os.O_DIRECTORY
) -> list[Path]:
    """Folders of ours (with other `flags`: files) in `parent` that no process works in, newest first.

    Links are never followed.
    """
    name = re.compile(f"{prefix}[0-9a-z_]{{{digits}}}{suffix}")
    try:
        entries = [Path(entry) for entry in os.scandir(parent) if name.fullmatch(entry.name)]
    except OSError:
        return []
    free = [path for path in entries if _is_free(path, flags)]
    return sorted(free, key=lambda path: path.lstat().st_mtime, reverse=True)


def _is_free(path: Path, flags: int) -> bool:
    """Whether it is a real folder or file, of this user, whose lock can be had."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | flags)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(handle).st_uid == os.geteuid()
    except OSError:
        return False
    finally:
        os.close(handle)
