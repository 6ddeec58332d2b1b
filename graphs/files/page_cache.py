"""Giving file pages back: on a board, what was read stays in the memory that its GPU uses too."""

import contextlib
import os


def release(file: int, start: int = 0, count: int = 0) -> None:
    """Drop the pages of bytes [start, start + count) of an open file, to its end if count is 0; not all systems can."""
    with contextlib.suppress(OSError, AttributeError):  # AttributeError: not on this system
        os.posix_fadvise(file, start, count, os.POSIX_FADV_DONTNEED)
