"""The step that makes sure of the compiled files: those that were carried if they run here, else compiled anew."""

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.runner import FALLBACK, MISSING, find_nvcc, gpu_architecture, gpu_problems

QUERY = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")
USAGE = 2  # the harness's exit code without a command: it has started


def main() -> int:
    carried, scratch = Path(os.environ["BTP_GPU_CASES"]) / "native", Path(os.environ["BTP_GPU_SCRATCH"])
    problem = unusable(carried)
    result: dict[str, Any] = {"carried": problem or "runs", "machine": machine()}
    code = 0
    if problem:
        architecture = gpu_architecture()
        if architecture is None or find_nvcc() is None:
            lacking = [*gpu_problems(), *([] if find_nvcc() else ["nvcc"])]
            result["missing"] = f"compiled files that run here ({problem}); to compile them: {'; '.join(lacking)}"
            code = MISSING
        else:
            from benchmarks.gpu_check.prepare import compile_all

            compile_all(scratch / FALLBACK, architecture, None, report=lambda text: print(text, file=sys.stderr))
            result["compiled"] = architecture
    elif lacking := gpu_problems():
        result["missing"], code = lacking[0], MISSING
    print(json.dumps(result))
    return code


def machine() -> dict[str, Any]:
    """What nvidia-smi says of the GPU, and the processor and the system beside it."""
    record: dict[str, Any] = {"system": platform.platform(), "processors": os.cpu_count()}
    if (tool := shutil.which("nvidia-smi")) is not None:
        command = [tool, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader", "--id=0"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        record |= dict(zip(QUERY, answer.split(", "), strict=False))
    return record


def unusable(folder: Path) -> str:
    """Why the files of a folder do not run on this machine and its GPU; "" if they do."""
    for name in ("libbtp_kernels.so", "libbtp_ort.so"):
        try:
            library = ctypes.CDLL(str(folder / name))
        except OSError as error:
            return str(error)
        if name == "libbtp_kernels.so":
            library.btp_kernels_architectures.restype = ctypes.c_char_p
            built, here = library.btp_kernels_architectures().decode(), gpu_architecture()
            if here is not None and built != here:
                return f"they are for sm_{built}, the GPU is sm_{here}"
    try:
        done = subprocess.run([folder / "harness"], capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return "" if done.returncode == USAGE else done.stderr.strip()[:300]


if __name__ == "__main__":
    sys.exit(main())
