"""Compiles the native sources for tests, once: outputs are kept in pytest's cache under a hash of what went in."""

import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from engines.native.compile_cpu import compile_library, is_current
from graphs import ops
from graphs.files.folders import lock_file

ROOT = Path(__file__).parents[3]
OPS = ROOT / "graphs" / "ops"
NATIVE = ROOT / "engines" / "native"
TESTS = Path(__file__).parent
STRICT = ["-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror"]
ARCHITECTURES = ("80", "86", "87", "89", "90", "110", "120")  # as in CMakeLists.txt
KEPT = ROOT / ".pytest_cache" / "d" / "native"


def of_operators(file: str) -> list[Path]:
    """That file of every operator that has it."""
    return ops.native_files(file)


def compiler() -> str:
    """The C++ compiler, or a skip."""
    path = shutil.which("c++") or shutil.which("g++")
    if path is None:
        pytest.skip("no C++ compiler (c++ or g++) is installed")
    return path


def nvcc() -> str:
    """The CUDA compiler, or a skip."""
    path = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if path is None:
        pytest.skip("no CUDA compiler (nvcc) is installed")
    return path


def cuda_include() -> Path:
    """The folder of cuda_runtime_api.h, or a skip."""
    for folder in (Path(nvcc()).resolve().parents[1] / "include", Path("/usr/local/cuda/include")):
        if (folder / "cuda_runtime_api.h").is_file():
            return folder
    pytest.skip("no CUDA toolkit headers (cuda_runtime_api.h) are installed")


def tensorrt_headers() -> list[Path]:
    """Folders of NvInferRuntime.h named by TENSORRT_INCLUDE_DIR (several with a colon between)."""
    named = os.environ.get("TENSORRT_INCLUDE_DIR", "")
    return [Path(part) for part in named.split(os.pathsep) if part and (Path(part) / "NvInferRuntime.h").is_file()]


def run(command: Sequence[str | Path]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"


def sources() -> bytes:
    """All native sources: whatever changes in them, everything is compiled again."""
    files = [path for folder in (OPS, NATIVE, TESTS) for path in folder.rglob("*") if path.suffix in SUFFIXES]
    return b"".join(str(path).encode() + path.read_bytes() for path in sorted(files))


SUFFIXES = {".cu", ".cuh", ".h", ".cc", ".cpp"}


def compiled(name: str, command: Sequence[str | Path], inputs: Sequence[Path]) -> Path:
    """Run `command inputs -o <file>` unless it was done before; the file appears whole or not at all."""
    key = hashlib.sha256(sources() + "\0".join(map(str, [*command, *inputs])).encode()).hexdigest()[:16]
    target = KEPT / key / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(target.with_suffix(".lock"), wait=True):  # another process of tests may be at it
        if not target.is_file():
            partial = target.with_suffix(f".{os.getpid()}")
            run([*command, *inputs, "-o", partial])
            partial.replace(target)
    return target


@functools.cache
def emulated_objects() -> tuple[Path, ...]:
    """The kernels' own source, compiled for the CPU with tests/engines/native/simt.h.

    That of the selection with waiting.cpp around it, which looks inside and would take as long once more.
    """
    flags = [*STRICT, "-O1", "-Wno-unknown-pragmas", "-DBTP_SIMT_EMULATION", f"-I{TESTS}", "-x", "c++", "-c"]
    files = {path.parent.name: path for path in of_operators("kernel.cu")} | {"select_tokens": TESTS / "waiting.cpp"}
    files |= {"common": OPS / "common" / "status.cpp"}
    return tuple(compiled(f"{name}.o", [compiler(), *flags], [path]) for name, path in files.items())


@functools.cache
def emulated_kernels() -> Path:
    """libbtp_kernels as it would be, with the kernels running in the SIMT emulation."""
    return compiled("libbtp_kernels.so", [compiler(), *STRICT, "-shared"], emulated_objects())


def ort_sources(*, with_kernels: bool = False) -> list[Path]:
    """What libbtp_ort is made of, beside the kernels; `with_kernels`: only of the operators that have one."""
    files = [*of_operators("ort_op.cc"), *of_operators("cpu.cc")]
    if with_kernels:
        files = [path for path in files if path.with_name("kernel.cu").is_file()]
    return [*files, NATIVE / "ort_library.cc"]


@functools.cache
def cpu_library(name: str) -> Path:
    """btp_ort with CPU kernels, or btp_host: as set-up compiled it, compiled here if that is of other sources."""
    compiler()
    made = NATIVE / "build" / f"lib{name}.so"
    if is_current(made):
        return made
    folder = KEPT / "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    with lock_file(folder / f"{name}.lock", wait=True):
        compile_library(name, folder)
    return folder / made.name


def ort_library() -> Path:
    """libbtp_ort with CPU kernels."""
    return cpu_library("btp_ort")


@functools.cache
def host_library(instructions: str) -> Path:
    """libbtp_host, which uses at most these instructions: "plain", "avx2" or "avx512", which is all of them."""
    if instructions == "avx512":
        return cpu_library("btp_host")
    flags = [*STRICT, "-O3", "-ffp-contract=off", "-shared", "-fvisibility=hidden", f"-DBTP_AT_MOST={instructions}"]
    return compiled(f"libbtp_host-{instructions}.so", [compiler(), *flags], [NATIVE / "host_library.cc"])


@functools.cache
def ort_cuda_library() -> Path:
    """libbtp_ort as it is built with nvcc, with the kernels running in the SIMT emulation.

    Of the operators that have kernels: the others' sources do not know of CUDA, so set-up compiles the very same.
    """
    flags = [*STRICT, "-O0", "-shared", "-fvisibility=hidden", "-DBTP_WITH_CUDA"]  # the work is in the kernels
    return compiled("libbtp_ort.so", [compiler(), *flags], [*ort_sources(with_kernels=True), *emulated_objects()])


def plugin(headers: Path, *, name: str = "trt_dynamic") -> Path:
    """A TensorRT plugin library compiled against these headers, with emulated kernels."""
    include = ["-isystem", headers, "-isystem", cuda_include()]
    files = [*of_operators("trt_plugin.cpp"), OPS / "common" / "trt_common.cpp"]
    flags = [compiler(), *STRICT, "-O1", "-shared", "-fvisibility=hidden", *include]
    return compiled(f"libbtp_{name}.so", flags, [*files, NATIVE / f"{name}.cpp", *emulated_objects()])


def contract(headers: Path) -> Path:
    """The contract checker compiled against these headers."""
    include = ["-isystem", headers, "-isystem", cuda_include()]
    return compiled(
        "contract", [compiler(), *STRICT, "-O1", *include, "-Wl,--no-as-needed", "-ldl"], [TESTS / "contract.cpp"]
    )


def static_host(headers: Path) -> Path:
    """A process for btp_trt to be loaded into, compiled against these headers."""
    include = ["-isystem", headers, "-isystem", cuda_include()]
    flags = [*STRICT, "-Wno-deprecated-declarations", "-O1", *include, "-rdynamic", "-Wl,--no-as-needed", "-ldl"]
    return compiled("static_host", [compiler(), *flags], [TESTS / "static_host.cpp"])
