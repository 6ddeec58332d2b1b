"""Children of a test's process, which have everything loaded already."""

import multiprocessing
from collections.abc import Callable
from typing import Any


def exit_code(target: Callable[..., None], *arguments: Any, seconds: float = 120) -> int | None:
    """That of a child which is forked to call `target`; killed if it takes longer, so nothing is left behind.

    A fork copies no other thread: what the child calls must not wait for one (libraries with one thread do not).
    """
    child = multiprocessing.get_context("fork").Process(target=target, args=arguments, daemon=True)
    child.start()
    child.join(seconds)
    if child.is_alive():
        child.kill()
        child.join()
        raise AssertionError(f"the child has not ended within {seconds:g} s")
    return child.exitcode
