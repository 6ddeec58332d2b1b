"""Verify the CUDA kernels on the GPU at hand, then time them: `make gpu-check`.

    python -m benchmarks.gpu_check [--quick | --verify-only]

1. Builds the kernels for this GPU with nvcc (no network, no CMake needed).
2. Verifies: every case of the operators and drawn ones, launched directly and replayed from a CUDA graph, against the
   PyTorch reference, bit for bit; the same cases through the operators of ONNX Runtime, where it can use the GPU. The
   first difference ends the program with exit code 1, and nothing is timed.
3. Times with CUDA events around graph replays, prints the table and writes benchmarks/results/<gpu>.json.

Needs a GPU, torch with CUDA and nvcc; exits with 3 and one message where one of them is missing. With --verify-only it
runs under compute-sanitizer too.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from graphs.records.errors import BtpError, UnavailableError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="fewer drawn cases and repetitions; writes no file")
    arguments.add_argument("--verify-only", action="store_true", help="as --quick, and times nothing")
    given = arguments.parse_args()
    quick = given.quick or given.verify_only
    try:
        torch, nvcc = requirements()
        from benchmarks import gpu_timing, gpu_verify
        from engines.native.kernels import Kernels

        with tempfile.TemporaryDirectory(prefix="btp-gpu-check-") as name:
            folder, capability = Path(name), torch.cuda.get_device_capability()
            kernels = Kernels(build_kernels(nvcc, capability, folder))
            checked = gpu_verify.verify(kernels, "cuda", drawn=50 if quick else 400, large=not given.verify_only)
            print(f"verified: {checked} calls equal the reference")
            runtime = verify_onnxruntime(nvcc, capability, folder)
            print(f"ONNX Runtime: {runtime}\n")
            if given.verify_only:
                return 0
            probe = build_probe(nvcc, capability, folder)
            limits, rows = gpu_timing.measure(kernels, probe, repeats=20 if quick else 200)
        gpu_timing.show(limits, rows)
        if not quick:
            print(f"written: {write(torch, nvcc, checked, runtime, limits, rows).relative_to(ROOT)}")
    except BtpError as error:
        print(*error.lines(), sep="\n", file=sys.stderr)
        return error.exit_code
    return 0


def requirements() -> tuple[Any, str]:
    """torch with a GPU, and nvcc. Raises UnavailableError naming the one that is missing."""
    import shutil

    try:
        import torch
    except ImportError as error:
        raise UnavailableError("torch is not installed", "torch with CUDA", "pip install torch") from error
    if not torch.cuda.is_available():
        raise UnavailableError(
            f"no CUDA GPU can be used by torch {torch.__version__}",
            "an NVIDIA GPU of compute capability 7.5 or later, its driver, and torch built with CUDA",
            "run this on the GPU machine; `make test` checks the kernels' logic without one",
        )
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise UnavailableError("nvcc was not found", "a CUDA toolkit", "put nvcc on PATH")
    return torch, nvcc


def verify_onnxruntime(nvcc: str, capability: tuple[int, int], folder: Path) -> str:
    """How many cases equal the reference on ONNX Runtime's CUDA provider, or why it was not asked."""
    try:
        from benchmarks import gpu_ort

        gpu_ort.require_provider(gpu_ort.CUDA)
    except (ImportError, UnavailableError) as error:
        return f"not checked: {error}".splitlines()[0]
    ops = gpu_ort.CustomOps(build_ort(nvcc, capability, folder), gpu_ort.CUDA)
    return f"{gpu_ort.verify(ops)} cases equal the reference on {gpu_ort.CUDA}"


OPS = ROOT / "graphs" / "ops"
KERNELS = [OPS / "select_tokens" / "kernel.cu", OPS / "gather_tokens" / "kernel.cu", OPS / "common" / "status.cpp"]


def build_kernels(nvcc: str, capability: tuple[int, int], folder: Path) -> Path:
    number = "".join(map(str, capability))
    flags = ["-fmad=false", f'-DBTP_ARCHITECTURES="{number}"']
    return compile_library(nvcc, number, folder / "libbtp_kernels.so", KERNELS, flags)


def build_ort(nvcc: str, capability: tuple[int, int], folder: Path) -> Path:
    number = "".join(map(str, capability))
    flags = ["-fmad=false", f'-DBTP_ARCHITECTURES="{number}"', "-DBTP_WITH_CUDA", "-Xcompiler=-fvisibility=hidden"]
    operators = [OPS / "select_tokens" / "cpu.cc", *OPS.glob("*/ort_op.cc")]
    sources = [*KERNELS, *operators, ROOT / "engines" / "native" / "ort_library.cc"]
    return compile_library(nvcc, number, folder / "libbtp_ort.so", sources, flags)


def build_probe(nvcc: str, capability: tuple[int, int], folder: Path) -> Path:
    source = ROOT / "benchmarks" / "probe.cu"
    return compile_library(nvcc, "".join(map(str, capability)), folder / "libprobe.so", [source], [])


def compile_library(nvcc: str, number: str, target: Path, sources: list[Path], flags: list[str]) -> Path:
    code = f"-gencode=arch=compute_{number},code=sm_{number}"
    command = [nvcc, "-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC", code, *flags, *map(str, sources)]
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        do = f"use a CUDA toolkit that knows sm_{number}:\n{done.stderr}"
        raise UnavailableError(f"nvcc could not build {target.name}", f"machine code for sm_{number}", do)
    return target


def write(torch: Any, nvcc: str, checked: int, runtime: str, limits: Any, rows: Any) -> Path:
    """benchmarks/results/<gpu>.json: the rows and everything they depend on."""
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    properties = torch.cuda.get_device_properties(0)
    record = {
        "gpu": properties.name,
        "compute_capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "nvidia_smi": dict(zip(query.split(","), asked.split(", "), strict=False)),
        "nvcc": version.strip().splitlines()[-1],
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "verified_calls": checked,
        "onnxruntime": runtime,
        "limits": limits,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{properties.name.lower().replace(' ', '-').replace('/', '-')}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
