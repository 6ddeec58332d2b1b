"""How much memory there is, and refusing work that needs more before it starts.

A container's limit counts as well as the machine's memory: what is over it is killed, whatever else is free. So does
the environment variable BTP_MEMORY_GIB, by which a user leaves memory to others.
"""

import os
from pathlib import Path
from typing import Final

from graphs.files.atomic import size_text
from graphs.records.errors import InputError

VARIABLE: Final = "BTP_MEMORY_GIB"
LIBRARIES: Final = 700 * 2**20  # bytes that Python, torch, transformers and ONNX Runtime take by themselves
WIDE_BYTES: Final = 4  # of a weight in float32, in which a CPU computes
PART_BYTES: Final = 2**30  # weights in float32 that are open at a time where not all are: one layer of a 7B


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes this process may still take without swapping, None where the system does not say.

    The least of BTP_MEMORY_GIB, the machine's MemAvailable and what the control groups of the process (version 1 or 2)
    have left; file pages that a group could drop count as left. `root` is where proc and sys are. Raises InputError for
    a BTP_MEMORY_GIB that is no number above 0.
    """
    rooms = [left for left in (_wished(), _machine(root), *_groups(root)) if left is not None]
    return max(min(rooms), 0) if rooms else None


def total_memory() -> int:
    """Bytes of the machine's memory, whatever is free of it."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(needed: int, what: str, *, do: str, root: Path = Path("/")) -> None:
    """Raise InputError unless `needed` bytes are available; `root` as for `available_memory`."""
    there = available_memory(root)
    if there is not None and needed > there:
        raise InputError(
            f"{what} needs about {size_text(needed)} of memory, {size_text(there)} are available",
            wanted="enough memory for all of it",
            do=do,
        )


def _wished() -> int | None:
    """Bytes by the environment variable, None where it is not set."""
    text = os.environ.get(VARIABLE, "")
    try:
        limit = float(text) if text else None
    except ValueError:
        limit = -1.0
    if limit is not None and not 0 < limit < 2**30:  # false for nan
        raise InputError(f"{VARIABLE}={text}", wanted="GiB of memory to take at most", do=f"export {VARIABLE}=8")
    return None if limit is None else int(limit * 2**30)


def _machine(root: Path) -> int | None:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _groups(root: Path) -> list[int | None]:
    """Room in each control group from the process's own up to the root, of either version."""
    rooms: list[int | None] = []
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        folder = base / path.lstrip("/")
        # Inside a container the process's path may not be mounted; its group then is the mounted root.
        rooms += [_room(place, *names) for place in (folder, *folder.parents) if place.is_relative_to(base)]
    return rooms


def _room(folder: Path, limit: str, used: str, prefix: str) -> int | None:
    """What a group has left. Pages of files can be dropped, also those that were read twice, as mapped weights are."""
    most, now = _number(folder / limit), _number(folder / used)
    if most is None or now is None:
        return None
    stat = dict(line.split(maxsplit=1) for line in _lines(folder / "memory.stat"))
    return most - now + sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None  # "max" is no limit


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
