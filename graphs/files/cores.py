"""How many cores there are for this process."""

import os


def available_cores() -> int:
    """Cores that this process may use; those of the machine where the system tells no more, at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
