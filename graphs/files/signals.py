"""Signals held back while files change places."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C, SIGTERM and SIGHUP for the few renames and removals inside; they take effect at the end.

    The handlers are Python's and run in the main thread, so elsewhere there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if callable(handler := signal.getsignal(number)):
            before[number] = handler
            signal.signal(number, lambda got, frame: held.append(got))
    try:
        yield
    finally:
        for number, saved in before.items():
            signal.signal(number, saved)
        if held:
            signal.raise_signal(held[0])
