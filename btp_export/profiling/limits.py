"""What the device that was measured can do: the limits of its board, at the clocks it ran with.

profile.sh records the board's part number, multiprocessors and memory, and the GPU's highest clock during each
engine's runs (`<engine>.clock`). Peak rates go with the GPU's clock, bandwidth with the memory's. A card of a server is
taken to be the target's, at its data sheet's clocks.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Final

from btp_export.results.profile import DeviceLimits
from engines.targets import Target, board_of
from graphs.dtypes import Precision
from graphs.records.errors import InputError
from graphs.records.reading import read_text

CLOCK: Final = ".clock"  # behind an engine's name: Hz
UNSTEADY_CLOCK: Final = 0.02  # spread of the clocks of a profile above which it is said


def device_limits(
    target: Target, precision: Precision, system: Mapping[str, str], clocks: Iterable[float]
) -> DeviceLimits:
    """The limits for engines of `target`; `system` is profile.sh's record, `clocks` those of the engines."""
    board = measured_board(target, system) or target
    measured = list(clocks)
    gpu = median(measured) if measured else _number(system.get("gpu_clock_max_hz"))
    memory = _number(system.get("memory_clock_hz"))
    peak, bandwidth = board.peak[precision], float(board.bandwidth)
    if board.board is not None:
        peak *= gpu / board.board.gpu_hz if gpu else 1.0
        bandwidth *= memory / board.board.memory_hz if memory else 1.0
    return DeviceLimits(
        device=board.title,
        gpu_clock_hz=gpu,
        memory_clock_hz=memory,
        peak_flops=peak,
        bandwidth_bytes=bandwidth,
        sources=board.sources,
        measured_target=target.measured,
    )


def measured_board(target: Target, system: Mapping[str, str]) -> Target | None:
    """The board that profile.sh ran on, None where it is none that has a file in engines/targets."""
    kibibytes = _number(system.get("memory"))
    multiprocessors = _number(system.get("sms"))
    return board_of(
        target.compute_capability,
        system.get("module", ""),
        None if multiprocessors is None else int(multiprocessors),
        None if kibibytes is None else int(kibibytes * 1024),
    )


def read_clock(path: Path) -> float | None:
    """The clock in a `<engine>.clock` file; None where there is none."""
    try:
        return _number(read_text(path))
    except InputError:
        return None


def clock_notes(limits: DeviceLimits, target: Target, clocks: Mapping[str, float]) -> list[str]:
    """What a reader must know of the limits: whose they are, and whether the clock stayed."""
    notes = []
    if limits.device != target.title:
        notes.append(f"measured on {limits.device}: its limits are used, not those of {target.title}")
    if target.unified_memory and limits.gpu_clock_hz is None:
        notes.append(f"the GPU's clock was not recorded: limits are those of {limits.device} at its highest")
    elif limits.gpu_clock_hz is not None:
        notes.append(f"limits are scaled to the measured clock, {limits.gpu_clock_hz / 1e6:.0f} MHz")
    low, high = min(clocks.values(), default=0.0), max(clocks.values(), default=0.0)
    if low < (1 - UNSTEADY_CLOCK) * high:
        slow = min(clocks, key=lambda name: clocks[name])
        notes.append(f"the GPU ran at {low / 1e6:.0f} MHz in {slow} and at up to {high / 1e6:.0f} MHz: fix the clocks")
    return notes


def _number(text: str | None) -> float | None:
    match = re.match(r"\s*(\d{1,15})\b", text or "")
    return float(match[1]) or None if match else None
