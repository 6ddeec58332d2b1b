"""Compiles what a CPU uses by the system's C++ compiler alone: `python -m engines.native.compile_cpu`.

The fast forms on a CPU must not be an extra that somebody has to know of: the set-up of a checkout runs this. CMake
builds the same libraries, and the ones for GPUs (docs/native.md). Nothing is done where the library that is there was
compiled from the same sources, and nothing is replaced that CMake built with CUDA.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from engines.native.libraries import inspect
from graphs import ops
from graphs.files.atomic import sha256, write_bytes, write_text
from graphs.files.cores import available_cores
from graphs.records.errors import BtpError, CheckError, UnavailableError

NATIVE: Final = Path(__file__).parent
# -ffp-contract=off: some compilers join a product and a sum where they may, and results must be equal everywhere.
# Warnings go into a file beside the library: other compilers know other ones, and our tests want none.
FLAGS: Final = ("-std=c++17", "-fPIC", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra")
LINKED: Final = ("-shared", "-Wl,--no-undefined")
WARNINGS: Final = ".warnings"  # the suffix of that file

# Name of each library -> what is said when it has been compiled.
LIBRARIES: Final = {"btp_ort": "selections run natively on this CPU", "btp_host": "tokens are chosen natively"}


def sources(name: str) -> list[Path]:
    """What a library is made of: btp_ort of the CPU kernels and ONNX Runtime forms of all operators, and its entry."""
    if name == "btp_host":
        return [NATIVE / "host_library.cc"]
    return [*ops.native_files("cpu.cc", "ort_op.cc"), NATIVE / "ort_library.cc"]


def digest(flags: Sequence[str] = FLAGS) -> str:
    """sha256 of everything that is compiled for any of them, headers included, and of the compiler's flags."""
    files = sorted([*ops.native_files("*.cc", "*.h"), *NATIVE.glob("*.cc"), *NATIVE.glob("*.h")])
    state = hashlib.sha256(" ".join([*flags, *LINKED]).encode())
    for path in files:
        state.update(path.name.encode() + path.read_bytes())
    return state.hexdigest()


def compile_library(name: str, folder: Path = NATIVE / "build", *, flags: Sequence[str] = FLAGS) -> Path | None:
    """The library in `folder`; None where the one there is current, or CMake built it.

    Raises UnavailableError where there is no C++ compiler, CheckError where it refuses the sources.
    """
    library, wanted = folder / f"lib{name}.so", digest(flags)
    if library.is_file():
        made_from, made = _noted(library)
        if made != sha256(library) or made_from == wanted:
            return None  # CMake built it, or it is current
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise UnavailableError(
            "no C++ compiler (c++, g++ or clang++) is installed",
            wanted="one, for speed; without it the graphs' portable bodies run, and numpy chooses tokens",
            do="apt-get install g++",
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / library.name
        write_text(library.with_suffix(WARNINGS), _build([compiler, *flags], sources(name), built))
        write_bytes(library, built.read_bytes())
    write_text(library.with_suffix(".sources"), f"{wanted} {sha256(library)}\n")
    return library


def is_current(library: Path) -> bool:
    """Whether `compile_library` made this library, from the sources that are here."""
    return library.is_file() and _noted(library) == (digest(), sha256(library))


def _noted(library: Path) -> tuple[str, str]:
    """(digest of the sources, sha256 of the library) as they were when it was made here; empty if it was not."""
    note = library.with_suffix(".sources")
    words = note.read_text(encoding="utf-8").split() if note.is_file() else []
    return (words[0], words[1]) if len(words) == 2 else ("", "")


def _build(compiler: Sequence[str], files: Sequence[Path], library: Path) -> str:
    """Make the library, its sources compiled side by side: somebody waits for it in the set-up of a checkout.

    Returns what the compiler said of them.
    """
    objects = {library.with_name(f"{number}.o"): source for number, source in enumerate(files)}
    commands = [[*compiler, "-c", str(source), "-o", str(compiled)] for compiled, source in objects.items()]
    with ThreadPoolExecutor(available_cores()) as pool:
        said = list(pool.map(_run, commands))
    _run([*compiler, *LINKED, *map(str, objects), "-o", str(library)])
    return "".join(said)


def _run(command: Sequence[str]) -> str:
    """Run the compiler; returns its warnings."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        got = f"{Path(command[0]).name} does not compile our libraries: {reason}"
        raise CheckError(got, do="a compiler with C++17")
    return done.stderr


def main(folder: Path = NATIVE / "build") -> int:
    """Compile where it is needed, and say so; a machine without a compiler goes on without the libraries."""
    try:
        for name, said in LIBRARIES.items():
            library = compile_library(name, folder)
            if library is not None:
                inspect(name, library)
                print(f"compiled {library.name}: {said}", file=sys.stderr)
    except BtpError as error:
        print(f"note: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
