"""Compiles what runs on a GPU machine, for one architecture: the native program and the libraries.

It is needed beforehand, and on the machine itself where the carried files do not run; so nvcc and Python's standard
library are enough. Nothing is compiled twice: sources that several files hold are compiled once, all of them side by
side, and a file is kept while its sources and its command stay the same.
"""

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_check.runner import find_nvcc
from benchmarks.gpu_check.steps import ROOT
from graphs import ops
from graphs.files.atomic import move
from graphs.records.errors import InputError, UnavailableError

NATIVE = Path(__file__).parent / "native"
KEY = ".key"  # beside a compiled file: what it was compiled from
# The C++ library goes along, so that a program made on one system starts on another.
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-static-libstdc++,-static-libgcc")

Report = Callable[[str], object]


@dataclass(frozen=True)
class Product:
    """A file, the sources that it is made from, and options of the linker."""

    path: Path
    sources: tuple[Path, ...]
    link: tuple[str, ...] = ("-shared",)


def compile_all(
    target: Path, architecture: str, before: str | None, *, only: Collection[str] = (), report: Report = print
) -> None:
    """The program and the libraries for one architecture ("90"); `before`: also the kernels of that git revision.

    only: names of files, if not all are wanted.
    Raises UnavailableError without nvcc or for an architecture that it does not know, InputError for a wrong revision.
    """
    kernels = kernel_sources(ROOT / "graphs" / "ops", ops.folders())
    forms = (*ops.native_files("ort_op.cc", "cpu.cc"), ROOT / "engines" / "native" / "ort_library.cc")
    made = [
        Product(target / "libbtp_kernels.so", kernels),
        Product(target / "harness", (NATIVE / "harness.cpp", NATIVE / "device.cu"), ("-ldl",)),
        Product(target / "libbtp_ort.so", (*kernels, *forms)),
    ]
    with tempfile.TemporaryDirectory(prefix="btp-gpu-check-") as name:
        if before is not None:
            earlier = checked_out(before, Path(name)) / "graphs" / "ops"
            sources = kernel_sources(earlier, sorted(earlier.iterdir()))
            made.append(Product(target / "before" / "libbtp_kernels.so", sources))
        wanted = [product for product in made if not only or product.path.name in only]
        compile_products(wanted, architecture, Path(name), report)


def kernel_sources(operators: Path, folders: Sequence[Path]) -> tuple[Path, ...]:
    """The CUDA sources of these operators and what they share."""
    files = (folder / "kernel.cu" for folder in folders)
    return (*(file for file in files if file.is_file()), operators / "common" / "status.cpp")


def compile_products(made: Sequence[Product], architecture: str, scratch: Path, report: Report) -> None:
    """Compile those that are not there as they should be; each appears whole or not at all."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise UnavailableError("nvcc was not found", "a CUDA toolkit", "put nvcc on PATH")
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    flags = (target, *FLAGS, f'-DBTP_ARCHITECTURES="{architecture}"', "-DBTP_WITH_CUDA")
    keys = {product: key_of(product, flags) for product in made}
    outdated = [product for product, key in keys.items() if not is_current(product, key)]
    objects: dict[Path, Path] = {}
    for product in outdated:
        report(f"compiling {product.path.name} for sm_{architecture}")
        for source in product.sources:
            objects.setdefault(source, scratch / f"{len(objects)}.o")

    def compile_one(source: Path) -> None:
        run_nvcc([nvcc, *flags, "-c", str(source), "-o", str(objects[source])], source.name, architecture)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, objects))
    for product in outdated:
        product.path.parent.mkdir(parents=True, exist_ok=True)
        partial = product.path.with_name(product.path.name + ".partial")
        parts = [str(objects[source]) for source in product.sources]
        command = [nvcc, target, *FLAGS, *parts, *product.link, "-o", str(partial)]
        run_nvcc(command, product.path.name, architecture)
        move(partial, product.path)
        note_of(product).write_text(keys[product])


def run_nvcc(command: Sequence[str], name: str, architecture: str) -> None:
    """One run of the compiler."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        do = f"use a CUDA toolkit that knows sm_{architecture}:\n{done.stderr}"
        raise UnavailableError(f"nvcc could not build {name}", f"machine code for sm_{architecture}", do)


def note_of(product: Product) -> Path:
    """Where a product's key lies."""
    return product.path.with_name(product.path.name + KEY)


def is_current(product: Product, key: str) -> bool:
    """Whether the file is there and was made from what this key says."""
    note = note_of(product)
    return product.path.is_file() and note.is_file() and note.read_text() == key


def key_of(product: Product, flags: Sequence[str]) -> str:
    """Compiler, options and the text of everything that a product is made from, wherever it lies."""
    words = "\0".join([nvcc_version(), *flags, *product.link])
    return hashlib.sha256(words.encode() + _contents(product.sources)).hexdigest()


def _contents(sources: Sequence[Path]) -> bytes:
    """The sources and every header beside them or in graphs/ops, without where they lie."""
    folders = {path.parent for path in sources} | {sources[0].parents[1]}
    headers = {path for folder in folders for pattern in ("*.h", "*.cuh") for path in folder.rglob(pattern)}
    files = sorted({*sources, *headers}, key=lambda path: (path.parent.name, path.name))
    return b"".join(path.name.encode() + path.read_bytes() for path in files)


def checked_out(revision: str, folder: Path) -> Path:
    """The operators' sources of a git revision."""
    archive = subprocess.run(["git", "archive", revision, "graphs/ops"], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode != 0:
        got = f"git has no {revision}: {archive.stderr.decode().strip()}"
        raise InputError(got, "a revision with graphs/ops", "--before none")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def nvcc_version() -> str:
    """Its last line, which names the build."""
    nvcc = find_nvcc()
    if nvcc is None:
        return ""
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
