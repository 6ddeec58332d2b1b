"""One boundary around libraries that parse what others wrote.

Tokenizers, transformers, Jinja and ONNX raise some fifty types of errors over a damaged or hostile file, down to
AttributeError and, of code in Rust, exceptions that are no Exception. Inside `refusing` all of them say one thing: this
file is no good. So only calls of libraries stand inside it, none of ours that could have defects of their own.
"""

import contextlib
import errno
import importlib.util
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final

from graphs.records.errors import BtpError, InputError

# What says nothing about the file: no space, no memory, too many open files.
SURROUNDINGS: Final = {
    errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EIO
}  # fmt: skip
MEMORY_EVERY: Final = (
    16  # events of the interpreter between two looks at the memory: a look takes as long as ten of them
)
# What is not part of the runner: btp_export/extras.py says what to install.
LIBRARIES: Final = frozenset(
    {"torch", "transformers", "huggingface_hub", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "polygraphy"}
)


@contextlib.contextmanager
def refusing(got: str, *, wanted: str, do: str) -> Iterator[None]:
    """What a library raises over a file, as InputError with `got` and the reason.

    Errors of ours, interruptions, a library that is not installed, and what the machine refuses pass as they are; but
    running out of memory is the file's doing here: what is parsed is small.
    """
    try:
        yield
    except (BtpError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # PanicException of Rust's libraries is no Exception
        if isinstance(error, OSError) and (error.errno in SURROUNDINGS or _no_folder(error)):
            raise
        if isinstance(error, ModuleNotFoundError) and _is_missing(error.name or ""):
            raise
        raise InputError(f"{got}: {reason(error)}", wanted=wanted, do=do) from error


def _no_folder(error: OSError) -> bool:
    """Whether it says that the current folder was removed: that is the one file without a name."""
    return error.errno == errno.ENOENT and error.filename is None


def _is_missing(module: str) -> bool:
    """Whether it belongs to a library that is not installed; one that is there may lack a module that a file names."""
    library = module.partition(".")[0]
    return library in LIBRARIES and importlib.util.find_spec(library) is None


@contextlib.contextmanager
def at_most(
    seconds: float, called: Callable[[FrameType], None] = lambda frame: None, *, growth: int | None = None
) -> Iterator[None]:
    """Raise TimeoutError out of Python code of this thread that takes more of a processor's time.

    For programs of strangers that are interpreted here, such as templates. A single operation of C is not interrupted.
    `called` sees every function that begins, and what it raises is raised there. A busy machine ends nothing.
    growth: bytes by which the memory of the process may grow meanwhile, else MemoryError; where the system tells.
    """
    end, before, events = time.thread_time() + seconds, sys.gettrace(), 0
    most = None if growth is None or (now := anonymous_memory()) is None else now + growth

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal events
        events += 1
        if time.thread_time() > end:
            raise TimeoutError(f"it takes more than {seconds:g} seconds")
        if most is not None and events % MEMORY_EVERY == 0 and (anonymous_memory() or 0) > most:
            raise MemoryError
        if event == "call":
            called(frame)
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def anonymous_memory() -> int | None:
    """Bytes in memory of this process that no file holds; None where the system does not tell."""
    try:
        file = os.open("/proc/self/statm", os.O_RDONLY)
        try:
            _, resident, shared = map(int, os.read(file, 256).split()[:3])
        finally:
            os.close(file)
    except (OSError, ValueError):
        return None
    return (resident - shared) * mmap.PAGESIZE


def reason(error: BaseException) -> str:
    """What an error says, on one line; its type where it says nothing, or where its text is a key alone."""
    if isinstance(error, MemoryError):
        return "it wants more memory than there is"
    if isinstance(error, RecursionError):
        return "too many levels inside each other"
    text, line = " ".join(str(error).split()), getattr(error, "lineno", None)
    if not text:
        return type(error).__name__
    if isinstance(line, int) and "line" not in text:  # of a chat template
        return f"{text} (line {line})"
    return f"{type(error).__name__} {text}" if isinstance(error, LookupError) else text
