"""The step that makes sure of the compiled files: those that were carried if they run here, else compiled anew.

Its arguments are the names of the files that the call needs.
"""

import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.runner import FALLBACK, MISSING, find_nvcc, find_tool, gpu_architecture, gpu_problems
from graphs.records.errors import BtpError

QUERY = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")
LOAD = """
import ctypes, sys
function = getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])
function.restype = ctypes.c_char_p
print(function().decode())
"""
PATIENCE = 6  # seconds that nvidia-smi may take
PROGRAM = "harness"
USAGE = 2  # the harness's exit code without a command: it has started


def main(*names: str) -> int:
    carried, scratch = Path(os.environ["BTP_GPU_CASES"]) / "native", Path(os.environ["BTP_GPU_SCRATCH"])
    problem = unusable(carried, names)
    result: dict[str, Any] = {"carried": problem or "runs", "machine": machine()}
    if problem:
        result |= compiled_here(scratch / FALLBACK, names, problem)
    elif lacking := gpu_problems():
        result["missing"] = lacking[0]
    print(json.dumps(result))
    return MISSING if "missing" in result else 1 if "error" in result else 0


def compiled_here(target: Path, names: Sequence[str], problem: str) -> dict[str, str]:
    """Compile in place of the carried files, which have this problem: `compiled`, or why not (`missing`, `error`)."""
    architecture = gpu_architecture()
    lacking = gpu_problems() or ([] if architecture else ["the GPU's compute capability"])
    lacking += [] if find_nvcc() else ["nvcc (of the CUDA toolkit)"]
    if architecture is None or lacking:
        return {"missing": f"compiled files that run here ({problem}); to compile them: {'; '.join(lacking)}"}
    from benchmarks.gpu_check.compiling import compile_all

    try:
        compile_all(target, architecture, None, only=names, report=lambda text: print(text, file=sys.stderr))
    except BtpError as error:
        return {"error": f"{problem}; {error.got}: {error.do}"}
    return {"compiled": architecture}


def machine() -> dict[str, Any]:
    """What nvidia-smi says of the GPU, and the processor and the system beside it."""
    record: dict[str, Any] = {"system": platform.platform(), "processors": os.cpu_count()}
    if (tool := find_tool("nvidia-smi")) is not None:
        command = [tool, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader", "--id=0"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE).stdout
            record |= dict(zip(QUERY, answer.strip().split(", "), strict=False))
    return record


def unusable(folder: Path, names: Sequence[str]) -> str:
    """Why files of a folder do not run on this machine and its GPU; "" if all of them do."""
    problems = (program_problem(folder / name) if name == PROGRAM else library_problem(folder / name) for name in names)
    return next(filter(None, problems), "")


def library_problem(library: Path) -> str:
    """Why a library cannot be used; "" if it can."""
    here, built = gpu_architecture(), architectures_of(library)
    if built.returncode != 0:
        return last_words(built) or f"{library.name} ends its process with {built.returncode}"
    if here is not None and built.stdout.strip() != here:
        return f"{library.name} is for sm_{built.stdout.strip()}, the GPU is sm_{here}"
    return ""


def program_problem(program: Path) -> str:
    """The same of the native program."""
    with contextlib.suppress(OSError):
        program.chmod(0o755)  # some ways of carrying files lose this
    try:
        done = subprocess.run([program], capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return "" if done.returncode == USAGE else last_words(done) or f"{program.name} ends with {done.returncode}"


def architectures_of(library: Path) -> "subprocess.CompletedProcess[str]":
    """What a library says that it was built for. A process of its own loads it: a file that was cut off ends it."""
    function = f"{library.stem.removeprefix('lib')}_architectures"
    command = [sys.executable, "-c", LOAD, str(library), function]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def last_words(done: "subprocess.CompletedProcess[str]") -> str:
    """The last line on standard error."""
    return "".join(done.stderr.strip().splitlines()[-1:])[:300]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
