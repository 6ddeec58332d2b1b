"""trtexec: finding it, running it, and reading what it exports.

The formats are those of samples/common/sampleReporting.cpp of the public TensorRT repository, the same from 10.3 to
11.1: --exportTimes is a list of runs, --exportProfile a list that begins with the number of runs and goes on with
layers. --exportProfile does not escape layer names and prints a
share of no time as "nan", so its file may be no JSON; it is read by its lines.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from graphs.files.atomic import fresh
from graphs.records.errors import BtpError, CheckError, InputError, UnavailableError
from graphs.records.reading import parse_json, read_text

PLACES: Final = (Path("/usr/src/tensorrt/bin"), Path("/usr/local/tensorrt/bin"), Path("/opt/tensorrt/bin"))
TAIL: Final = 12  # last lines of a failed run that are kept
TIMES, LAYER_TIMES, LAYERS = ".times.json", ".profile.json", ".layers.json"  # behind an engine's name

_NUMBER: Final = r"([-+]?(?:\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|nan|inf))"
MOST_MS: Final = 1e12  # of a run: sums of them stay finite
_LAYER: Final = re.compile(
    r'^\s*,?\s*\{\s*"name" : "(.*)", "timeMs" : %s, "averageMs" : %s, "medianMs" : %s, "percentage" : %s \}\s*$'
    % ((_NUMBER,) * 4)
)
_COUNT: Final = re.compile(r'^\s*\{\s*"count" : (\d+) \}\s*$')


@dataclass(frozen=True)
class Times:
    """GPU time of an engine over all timed runs, in milliseconds; `variation` is the middle half's width / median."""

    runs: int
    median_ms: float
    mean_ms: float
    min_ms: float
    p99_ms: float
    variation: float


@dataclass(frozen=True)
class LayerTime:
    """One layer of an engine, per run."""

    name: str
    mean_ms: float
    median_ms: float


class TrtexecError(CheckError):
    """trtexec failed; `tail` are its last lines."""

    def __init__(self, got: str, wanted: str, do: str, tail: Sequence[str]) -> None:
        super().__init__(got, wanted, do)
        self.tail = tuple(tail)


def find(tool: str = "trtexec", places: Sequence[Path] = PLACES) -> Path:
    """The program: on PATH, or where TensorRT's packages put it. Raises UnavailableError."""
    path = shutil.which(tool)
    if path is not None:
        return Path(path)
    for folder in places:
        if (folder / tool).is_file():
            return folder / tool
    raise UnavailableError(
        f"{tool} was found neither on PATH nor in {places[0]}",
        wanted=f"the {tool} of the installed TensorRT",
        do="run profile.sh on the device and read its results with --from DIR; on a Jetson: apt install libnvinfer-bin",
    )


def run(
    command: Sequence[str | Path],
    *,
    folder: Path,
    log: Path,
    wanted: Sequence[Path] = (),
    environment: Mapping[str, str] | None = None,
    name: str = "trtexec",
) -> None:
    """Run a trtexec command, or a script of them, in `folder`; what it prints goes to `log`. `name` is for errors.

    Raises TrtexecError if it fails, or ends without one of the files it was to write: trtexec has been seen to say it
    is done with nothing there.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with fresh(log) as output:
        try:
            done = subprocess.run(
                [str(part) for part in command],
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        except OSError as error:
            raise UnavailableError(
                f"{command[0]} cannot be started: {error.strerror}", "a trtexec for this machine", "install TensorRT"
            ) from error
    tail = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()][-TAIL:]
    if done.returncode:
        got = f"{name} failed with code {done.returncode}: {_reason(tail)}"
        raise TrtexecError(got, "an engine that runs", f"read {log}", tail)
    for path in wanted:
        if not path.is_file():
            raise TrtexecError(f"{name} ended well but wrote no {path.name}", "its results", f"read {log}", tail)


def _reason(tail: Sequence[str]) -> str:
    """The line that says most: TensorRT's last error, else a script's own, else the last one."""
    for mark in ("[E]", "error:"):
        for line in reversed(tail):
            if mark in line:
                return line.strip()
    return tail[-1].strip() if tail else "it said nothing"


def read_times(path: Path) -> Times:
    """An --exportTimes file. Raises InputError if it is missing, cut off or holds no usable times."""
    runs = _json(path, "--exportTimes")
    values = [run.get("computeMs") if isinstance(run, dict) else None for run in runs] if isinstance(runs, list) else []
    if not values or not all(_is_time(value) for value in values):
        odd = next((value for value in values if not _is_time(value)), "no runs")
        raise _damaged(path, f"computeMs: {odd!r}", "--exportTimes")
    times = np.array(values, np.float64)
    low, middle, high = (float(value) for value in np.percentile(times, [25, 50, 75]))
    return Times(
        runs=len(times),
        median_ms=middle,
        mean_ms=float(times.mean()),
        min_ms=float(times.min()),
        p99_ms=float(np.percentile(times, 99)),
        variation=(high - low) / middle if middle else 0.0,
    )


def read_layers(path: Path) -> tuple[LayerTime, ...]:
    """An --exportProfile file. Raises InputError if it is missing, cut off or something else."""
    lines = [line for line in _text(path, "--exportProfile").splitlines() if line.strip()]
    if len(lines) < 3 or lines[0].strip() != "[" or lines[-1].strip() != "]" or not _COUNT.match(lines[1]):
        return _layers_of_json(path)
    layers = []
    for line in lines[2:-1]:
        match = _LAYER.match(line)
        if match is None:
            return _layers_of_json(path)
        layers.append(_layer(path, match[1], float(match[3]), float(match[4])))
    return tuple(layers)


def _layers_of_json(path: Path) -> tuple[LayerTime, ...]:
    """The same list when another program has written it anew."""
    entries = _json(path, "--exportProfile")
    if not isinstance(entries, list) or not entries or not isinstance(entries[0], dict) or "count" not in entries[0]:
        raise _damaged(path, "it does not begin with the number of runs", "--exportProfile")
    layers = []
    for entry in entries[1:]:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise _damaged(path, f"{entry!r} is no layer", "--exportProfile")
        layers.append(_layer(path, entry["name"], entry.get("averageMs"), entry.get("medianMs")))
    return tuple(layers)


def _layer(path: Path, name: str, mean: Any, median: Any) -> LayerTime:
    if not _is_time(mean) or not _is_time(median):
        raise _damaged(path, f"layer {name}: {mean!r}, {median!r} ms", "--exportProfile")
    return LayerTime(name, float(mean), float(median))


def _is_time(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value <= MOST_MS


def _json(path: Path, option: str) -> Any:
    try:
        return parse_json(_text(path, option))
    except ValueError as error:
        raise _damaged(path, str(error), option) from error


def _text(path: Path, option: str) -> str:
    return read_text(path, noun=f"whole file of trtexec {option}", do="run profile.sh on the device again")


def _damaged(path: Path, reason: str, option: str) -> BtpError:
    return InputError(
        f"{path} is cut off or damaged: {reason}",
        wanted=f"a whole file of trtexec {option}",
        do="run profile.sh on the device again",
    )
