"""How much memory there is, and refusing work that needs more before it starts.

A container's limit counts as well as the machine's memory: what is over it is killed, whatever else is free.
"""

from pathlib import Path

from graphs.files.atomic import size_text
from graphs.records.errors import InputError

LIBRARIES = 700 * 2**20  # bytes that Python, torch, transformers and ONNX Runtime take by themselves


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes this process may still take without swapping, None where the system does not say.

    The least of the machine's MemAvailable and what the control groups of the process (version 1 or 2) have left;
    file pages that a group could drop count as left. `root` is where proc and sys are.
    """
    rooms = [left for left in (_machine(root), *_groups(root)) if left is not None]
    return max(min(rooms), 0) if rooms else None


def check_memory(needed: int, what: str, *, do: str) -> None:
    """Raise InputError unless `needed` bytes are available."""
    there = available_memory()
    if there is not None and needed > there:
        raise InputError(
            f"{what} needs about {size_text(needed)} of memory, {size_text(there)} are available",
            wanted="enough memory for all of it",
            do=do,
        )


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
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = base / path.lstrip("/")
        # Inside a container the process's path may not be mounted; its group then is the mounted root.
        rooms += [_room(place, *names) for place in (folder, *folder.parents) if place.is_relative_to(base)]
    return rooms


def _room(folder: Path, limit: str, used: str, droppable: str) -> int | None:
    most, now = _number(folder / limit), _number(folder / used)
    if most is None or now is None:
        return None
    stat = dict(line.split(maxsplit=1) for line in _lines(folder / "memory.stat"))
    return most - now + int(stat.get(droppable, 0))


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None  # "max" is no limit


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
