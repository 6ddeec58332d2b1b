"""Runs the steps of a call, each in a process group of its own and under its own time limit.

A step may take its own seconds and what the steps before it have left of theirs, never what those behind it are due.

What comes back from a lent machine is what lies in the folder of results when the call ends or is cut off: a line of
JSON a step in <call>.jsonl, flushed to disk before the next step starts, and all output in <call>.log. So a step that
hangs costs its own time and nothing else.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, TextIO

from benchmarks.gpu_check.steps import Call, Step
from graphs.records.errors import InputError

TAIL: Final = 3000  # letters of a step's output in its record
GRACE: Final = 3.0  # seconds that a killed process may take to go; one that the driver holds is left behind
MISSING: Final = 3  # exit code
FALLBACK: Final = "native"  # folder in the scratch folder: compiled on the machine, where the carried files do not run
TOOLS: Final = "/usr/local/cuda/bin"  # where a CUDA toolkit lies that nobody put on PATH
SCRATCH_BYTES: Final = 24 << 30  # a 7B in float16, its graphs, and the demo's
COMPUTE_CAPABILITY: Final = (75, 76)  # the driver's numbers for its two parts


class Journal:
    """<call>.jsonl and <call>.log of one call."""

    def __init__(self, folder: Path, call: str) -> None:
        self.records: list[dict[str, Any]] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lines = (folder / f"{call}.jsonl").open("w", encoding="utf-8")
            self.log = (folder / f"{call}.log").open("w", encoding="utf-8")
        except OSError as error:
            got = f"{folder} takes no results: {error.strerror}"
            raise InputError(got, "a folder that can be written to", "name another one with --out") from error

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self._lines.close()
        self.log.close()

    def add(self, record: dict[str, Any]) -> None:
        """Write one record so that it survives whatever comes next."""
        self.records.append(record)
        self._lines.write(json.dumps(record) + "\n")
        for stream in (self._lines, self.log):
            stream.flush()
            os.fsync(stream.fileno())


class Running:
    """A step's process. Its output goes to a file, so that nothing waits for a pipe that a grandchild holds."""

    def __init__(self, step: Step, command: list[str], scratch: Path, environment: Mapping[str, str]) -> None:
        self.step, self.start = step, time.monotonic()
        self.output = scratch / f"{step.name}.out"
        with self.output.open("wb") as stream:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=dict(environment),
                start_new_session=True,
            )  # fmt: skip

    def finish(self, seconds: float) -> dict[str, Any]:
        """Wait that long at most, then kill the whole group; the step's record."""
        limit = time.monotonic() - self.start + seconds
        status = ""
        try:
            self.process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            status = "timeout"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)
        code = self.process.returncode
        text = self.output.read_text(encoding="utf-8", errors="replace")
        result = last_json(text)
        if not status:
            status = "done" if code == 0 else "missing" if code == MISSING else "failed"
        return {
            "step": self.step.name,
            "status": status,
            "code": code,
            "seconds": round(time.monotonic() - self.start, 2),
            "limit": round(limit, 1),
            "result": result,
            "tail": text[-TAIL:] if status != "done" or self.step.needs else "",
        }


class Budget:
    """How long the steps of a call may take. Those beside the others have their own seconds from the call's start."""

    def __init__(self, call: Call) -> None:
        self.start = time.monotonic()
        self.end = self.start + call.seconds
        self._due = {step.name: step.seconds for step in call.steps if not step.beside}
        self._unplanned = call.seconds - sum(self._due.values())

    @property
    def left(self) -> float:
        """Seconds of the whole call."""
        return self.end - time.monotonic()

    def seconds(self, step: Step) -> float:
        """What is left to this step; the steps that come after it are then due theirs."""
        if step.beside:
            return min(self.start + step.seconds - time.monotonic(), self.left)
        self._due.pop(step.name, None)
        saved = self.left - sum(self._due.values()) - self._unplanned
        return min(max(saved, step.seconds, step.at_most), self.left)


def run_call(call: Call, cases: Path, out: Path) -> list[dict[str, Any]]:
    """Run all steps; gives their records, which are in `out` too."""
    budget = Budget(call)
    with scratch_folder(call.name) as scratch, Journal(out, call.name) as journal:
        journal.add(_about(call, cases))
        places = {"cases": str(cases), "scratch": str(scratch), "out": str(out)}
        environment = os.environ | {"BTP_GPU_SCRATCH": str(scratch), "BTP_GPU_CASES": str(cases), "PATH": tools_path()}

        def start(step: Step) -> Running:
            native = scratch / FALLBACK if (scratch / FALLBACK).is_dir() else cases / "native"
            words = [word.format(**places, native=native) for word in step.command]
            return Running(step, words, scratch, environment)

        beside = {step.name: start(step) for step in call.steps if step.beside and not lacking(step)}
        for step in [*(s for s in call.steps if not s.beside), *(s for s in call.steps if s.beside)]:
            if any(record["step"] == step.name for record in journal.records):
                continue
            if step.after in beside:
                waited = beside.pop(step.after)
                _settle(journal, waited.finish(budget.seconds(waited.step)), waited.output)
            _settle(journal, *_run(step, start, beside, journal.records, budget))
        return journal.records


def _run(
    step: Step, start: Any, beside: dict[str, Running], records: list[dict[str, Any]], budget: Budget
) -> tuple[dict[str, Any], Path | None]:
    """The step's record, and where its output lies."""
    seconds = budget.seconds(step)
    before = next((record for record in records if record["step"] == step.after), None)
    if step.name not in beside and budget.left < 1:
        return _not_run(step, "skipped", "no time was left"), None
    if before is not None and before["status"] != "done":
        return _not_run(step, before["status"], f"{step.after}: {what_is_missing(before)}"), None
    if absent := lacking(step):
        return _not_run(step, "missing", "; ".join(absent)), None
    try:
        running = beside.pop(step.name, None) or start(step)
    except OSError as error:  # of a program that was not compiled, or not for this system
        problem = "; ".join([f"{error.filename}: {error.strerror}", *gpu_problems()])
        return _not_run(step, "missing", problem), None
    return running.finish(seconds), running.output


def lacking(step: Step) -> list[str]:
    """What this machine has not and the step cannot start without."""
    absent = [f"{program} (of the CUDA toolkit)" for program in step.needs if find_tool(program) is None]
    packages = [name for name in step.modules if importlib.util.find_spec(name) is None]
    absent += [f"{', '.join(packages)} (for Python)"] if packages else []
    return [*absent, *gpu_problems()] if absent or step.slow_to_start else []


def _settle(journal: Journal, record: dict[str, Any], output: Path | None) -> None:
    """Write a record and its output, and say so."""
    journal.log.write(f"==== {record['step']}: {record['status']}, {record['seconds']} s\n")
    if output is not None:
        _copy(output, journal.log)
    journal.add(record)
    head = f"{record['step']:<14}{record['status']:<10}{record['seconds']:>7.1f} s"
    print(f"{head}  {what_is_missing(record)}".rstrip(), flush=True)


def _copy(output: Path, log: TextIO) -> None:
    text = output.read_text(encoding="utf-8", errors="replace")
    log.write(text[:100_000] + ("\n" if text and not text.endswith("\n") else ""))


def _not_run(step: Step, status: str, why: str) -> dict[str, Any]:
    return {
        "step": step.name, "status": status, "code": None, "seconds": 0.0, "limit": step.seconds,
        "result": {"missing": why}, "tail": "",
    }  # fmt: skip


def _about(call: Call, cases: Path) -> dict[str, Any]:
    """The first record: what the call was prepared from."""
    prepared = cases / "prepared.json"
    content = json.loads(prepared.read_text(encoding="utf-8")) if prepared.is_file() else {}
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return {"step": "prepared", "status": "done", "call": call.name, "date": now, "result": content}


@contextlib.contextmanager
def scratch_folder(call: str) -> Iterator[Path]:
    """A folder in memory where there is room for a 7B's weights, else on disk. It is removed at the end."""
    roots = [Path("/dev/shm"), Path(tempfile.gettempdir())]
    scratch = next(filter(_roomy, roots), roots[-1]) / f"btp-gpu-check-{call}-{os.getpid()}"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _roomy(folder: Path) -> bool:
    """Containers often have 64 MB in /dev/shm."""
    return os.access(folder, os.W_OK) and shutil.disk_usage(folder).free >= SCRATCH_BYTES


def last_json(text: str) -> dict[str, Any]:
    """The last line that is a JSON object; tools print around it."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                result: dict[str, Any] = json.loads(line)
                return result
    return {}


def what_is_missing(record: Mapping[str, Any]) -> str:
    """What a step lacks or says went wrong, on one line; "" if it is done."""
    if record["status"] == "done":
        return ""
    result = record["result"]
    reason = result.get("missing") or result.get("error") or next(iter(result.get("failed") or []), "")
    last = record["tail"].strip().splitlines()[-1:] if record.get("tail") else []
    code = record.get("code")
    silent = "" if code is None else f"it ended with {code} and said nothing"
    return " ".join(str(reason or (last[0] if last else silent)).split())[:300]


# -- the machine -------------------------------------------------------------------------------------------------------


def tools_path() -> str:
    """PATH, and the toolkit's folder behind it."""
    return os.pathsep.join(filter(None, [os.environ.get("PATH", os.defpath), TOOLS]))


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, or any other."""
    return shutil.which(name, path=tools_path())


def find_nvcc() -> str | None:
    """The CUDA compiler."""
    return find_tool("nvcc")


def gpu_problems() -> list[str]:
    """Why no GPU can be used here; empty where one can. Needs neither torch nor a CUDA runtime."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ["an NVIDIA GPU: there is no driver (libcuda.so.1)"]
    count = ctypes.c_int()
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return [] if code == 0 and count.value else [f"an NVIDIA GPU: the driver says error {code}, {count.value} devices"]


def gpu_architecture() -> str | None:
    """The first GPU's compute capability as nvcc writes it ("90"), or None. The driver says it."""
    if gpu_problems():
        return None
    driver, device, part = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    words = []
    for number in COMPUTE_CAPABILITY:
        if driver.cuDeviceGetAttribute(ctypes.byref(part), number, device):
            return None
        words.append(str(part.value))
    return "".join(words)
