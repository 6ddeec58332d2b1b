"""How many cores there are for this process, and for which models they are given to samples, not to products."""

import os
from typing import Final

SMALL_WEIGHTS: Final = 2**28  # bytes of weights up to which several samples or plans are worked on at a time


def available_cores() -> int:
    """Cores that this process may use; those of the machine where the system tells no more, at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
