"""Finds the native libraries (docs/native.md) and refuses those that cannot work here, before anything is registered.

Looked for in: the folder BTP_NATIVE_DIR, if it is set, and only there; else engines/native/build, where CMake puts
them, and the folder `lib` beside it, for packages that carry them.
"""

import ctypes
import os
import platform
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from graphs.records.errors import BtpError, InputError, UnavailableError

VARIABLE: Final = "BTP_NATIVE_DIR"
VERSION: Final = 8  # common/status.h: btp_kernels_version; ort_library.cc, host_library.cc: btp_<library>_version
BUILD: Final = "cmake -S engines/native -B engines/native/build && cmake --build engines/native/build"
# Name of each library -> what it is for, and the option that it needs beside the compilers.
LIBRARIES: Final = {
    "btp_kernels": ("CUDA kernels for the Python plugin", ""),
    "btp_trt_dynamic": ("TensorRT plugin for --dynamicPlugins", "-DTENSORRT_INCLUDE_DIR=<folder of NvInferRuntime.h>"),
    "btp_trt": ("TensorRT plugin for --staticPlugins", "-DTENSORRT_INCLUDE_DIR=<folder of NvInferRuntime.h>"),
    "btp_ort": ("operators for ONNX Runtime", ""),
    "btp_host": ("choosing tokens", ""),
}
KERNELS_FUNCTION: Final = "btp_kernels_architectures"
_MACHINES: Final = {62: "x86_64", 183: "aarch64"}  # e_machine of an ELF file


@dataclass(frozen=True)
class NativeLibrary:
    """A library that can be loaded here. `architectures`: compute capabilities ("80", "90"), () for CPU only."""

    name: str
    path: Path
    architectures: tuple[str, ...]


def folders() -> list[Path]:
    """Where libraries are looked for, in order."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return [Path(chosen)]
    native = Path(__file__).parent
    return [native / "build", native / "lib"]


def locate(name: str) -> Path | None:
    """The library's file, or None where it was not built. Raises InputError if BTP_NATIVE_DIR names no folder."""
    for folder in folders():
        if os.environ.get(VARIABLE) and not folder.is_dir():
            raise InputError(f"{VARIABLE} is {folder}", "a folder with the native libraries", f"build them: {BUILD}")
        path = folder / f"lib{name}.so"
        if path.is_file():
            return path
    return None


def find(name: str) -> Path:
    """The library's file. Raises UnavailableError where it was not built."""
    path = locate(name)
    if path is None:
        raise UnavailableError(
            f"lib{name}.so was not found in {' or '.join(map(str, folders()))}", LIBRARIES[name][0], how_to_build(name)
        )
    return path


def how_to_build(name: str) -> str:
    """The command that builds this library."""
    option = LIBRARIES[name][1]
    configure, build = BUILD.split(" && ")
    return f"{configure}{' ' + option if option else ''} && {build}"


def custom_ops() -> Path | None:
    """The ONNX Runtime library for sessions, or None: then the graphs' portable bodies run.

    Raises UnavailableError if there is one that cannot work here: a wrong library is never passed over in silence.
    """
    path = locate("btp_ort")
    if path is not None:
        inspect("btp_ort", path)
    return path


def multiplies(path: Path) -> bool:
    """Whether btp_ort multiplies with weights as they are stored, and attends, on this processor.

    Not where the file is no such library, which is said when it is registered.
    """
    try:
        return bool(open_library(path).btp_ort_linear())
    except BtpError:
        return False


def survey() -> list[dict[str, Any]]:
    """For `btp-export doctor`, one entry a library: name, purpose, path, architectures, problem, and what to type.

    `path` is None where the library was not built, `problem` says why one that is there cannot be used.
    """
    entries = []
    for name, (purpose, _) in LIBRARIES.items():
        entry: dict[str, Any] = {"library": name, "purpose": purpose, "path": None, "architectures": []}
        entry |= {"problem": None, "do": how_to_build(name)}
        try:
            path = locate(name)
            if path is not None:
                entry["path"] = str(path)
                entry |= {"architectures": list(inspect(name, path).architectures), "do": None}
        except BtpError as error:
            entry |= {"problem": error.got, "do": error.do}
        entries.append(entry)
    return entries


def inspect(name: str, path: Path) -> NativeLibrary:
    """What the library was built for. Raises UnavailableError if it is for another machine or of another version."""
    _require_machine(path)
    if name == "btp_trt":
        text = _described_architectures(path)
    elif name == "btp_host":
        open_library(path)
        text = ""
    else:
        architectures = getattr(open_library(path), "btp_ort_architectures" if name == "btp_ort" else KERNELS_FUNCTION)
        architectures.restype = ctypes.c_char_p
        text = architectures().decode()
    return NativeLibrary(name, path, tuple(part.removesuffix("-real") for part in text.split(",") if part))


def _described_architectures(path: Path) -> str:
    """From the text in the file (common/status.h): loading the library would register plugins, and needs TensorRT."""
    mark = re.search(rb"btp-kernels (\d+) for ([^;\0]*);", path.read_bytes())
    if mark is None:
        raise UnavailableError(f"{path} is no library of this project", f"interface version {VERSION}", BUILD)
    _require_version(path, int(mark[1]))
    return mark[2].decode()


def open_library(path: Path) -> ctypes.CDLL:
    """Load one of the libraries. Raises UnavailableError naming file, found and wanted."""
    _require_machine(path)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise UnavailableError(f"{path} cannot be loaded: {error}", "a library built on this machine", BUILD) from error
    for symbol in ("btp_ort_version", "btp_kernels_version", "btp_host_version"):
        if hasattr(library, symbol):
            _require_version(path, int(getattr(library, symbol)()))
            return library
    raise UnavailableError(f"{path} is no library of this project", f"interface version {VERSION}", BUILD)


def _require_version(path: Path, version: int) -> None:
    if version != VERSION:
        raise UnavailableError(f"{path} is of interface version {version}", f"version {VERSION}", BUILD)


def require_capability(library: NativeLibrary, capability: tuple[int, int]) -> None:
    """Raise UnavailableError unless the library holds code for a GPU of this compute capability.

    Machine code runs on later minor versions of the same major one.
    """
    major, minor = capability
    for architecture in library.architectures:
        digits = architecture.split("-")[0].rstrip("af")
        if int(digits[:-1]) == major and int(digits[-1]) <= minor:
            return
    raise UnavailableError(
        f"{library.path} was built for {', '.join(library.architectures) or 'no GPU'}",
        f"compute capability {major}.{minor}",
        f"{BUILD.split(' && ')[0]} -DCMAKE_CUDA_ARCHITECTURES={major}{minor} && {BUILD.split(' && ')[1]}",
    )


def elf_machine(path: Path) -> str:
    """The processor of a shared library, as platform.machine() calls it. Raises UnavailableError for other files."""
    try:
        with path.open("rb") as file:
            head = file.read(20)
    except OSError as error:
        raise UnavailableError(f"{path} cannot be read: {error.strerror}", "a native library", BUILD) from error
    if len(head) < 20 or head[:4] != b"\x7fELF":
        raise UnavailableError(f"{path} is no shared library", "an ELF file", BUILD)
    (code,) = struct.unpack_from("<H" if head[5] == 1 else ">H", head, 18)
    return _MACHINES.get(code, f"machine type {code}")


def _require_machine(path: Path) -> None:
    """Raise UnavailableError unless this is an ELF library for the machine that runs us."""
    machine = elf_machine(path)
    if machine != platform.machine():
        raise UnavailableError(f"{path} was built for {machine}", platform.machine(), BUILD)
