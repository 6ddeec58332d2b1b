"""The compiled files of the GPU check: made once, looked at where they are to run, made anew there if they do not.

The compiler's place is taken by a script that says what it is asked for: what nvcc makes is in test_gpu_check.py.
"""

import os
import shutil
import stat
from pathlib import Path

import pytest

from graphs.records.errors import UnavailableError
from tests.engines.native import builds

pytest.importorskip("benchmarks.gpu_check")
from benchmarks.gpu_check import compiling, native_step
from benchmarks.gpu_check.compiling import Product

NVCC = """#!/bin/sh
[ "$1" = --version ] && echo "release 1" && exit
for word; do
    case "$previous" in -o) target="$word" ;; -c) source="$word" ;; esac
    previous="$word"
done
echo "${source:-link} ${target##*/}" >> "${0%/*}/log"
grep -q broken "${source:-/dev/null}" && echo "it is broken" >&2 && exit 1
cat ${source:-/dev/null} > "$target"
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that notes what it compiles in `log` beside it."""
    script = tmp_path / "nvcc"
    script.write_text(NVCC)
    script.chmod(0o755)
    monkeypatch.setattr(compiling, "find_nvcc", lambda: str(script))
    monkeypatch.setattr(native_step, "find_nvcc", lambda: str(script))
    return script


def asked(compiler: Path) -> list[str]:
    """What it was asked for since the last time, without order."""
    log = compiler.with_name("log")
    lines = log.read_text().splitlines() if log.is_file() else []
    log.unlink(missing_ok=True)
    return sorted(Path(line.split()[0]).name + (f" {line.split()[1]}" if "link" in line else "") for line in lines)


def test_nothing_is_compiled_twice(compiler: Path, tmp_path: Path) -> None:
    sources = tmp_path / "op" / "sources"
    sources.mkdir(parents=True)
    one, both, other = (sources / name for name in ("one.cu", "both.cu", "other.cc"))
    for path in (one, both, other):
        path.write_text(path.name)
    made = [Product(tmp_path / "out" / "a.so", (one, both)), Product(tmp_path / "out" / "b.so", (both, other))]
    said: list[str] = []
    compiling.compile_products(made, "90", tmp_path, said.append)
    assert asked(compiler) == ["both.cu", "link a.so.partial", "link b.so.partial", "one.cu", "other.cc"]
    assert said == ["compiling a.so for sm_90", "compiling b.so for sm_90"]
    compiling.compile_products(made, "90", tmp_path, said.append)
    assert asked(compiler) == []
    other.write_text("changed")
    compiling.compile_products(made, "90", tmp_path, said.append)
    assert asked(compiler) == ["both.cu", "link b.so.partial", "other.cc"]
    compiling.compile_products(made[:1], "89", tmp_path, said.append)
    assert asked(compiler) == ["both.cu", "link a.so.partial", "one.cu"]


def test_a_file_that_cannot_be_compiled_is_not_there(compiler: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.cu").write_text("broken")
    product = Product(tmp_path / "out" / "a.so", (tmp_path / "broken.cu",))
    with pytest.raises(UnavailableError, match=r"nvcc could not build broken\.cu") as caught:
        compiling.compile_products([product], "90", tmp_path, print)
    assert "it is broken" in caught.value.do and not product.path.exists()


def test_files_that_do_not_run_here_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, program = tmp_path / "libbtp_kernels.so", tmp_path / "harness"
    names = (library.name, program.name)
    assert "libbtp_kernels.so: cannot open shared object file" in native_step.unusable(tmp_path, names)
    shutil.copy(builds.emulated_kernels(), library)
    assert "No such file" in native_step.unusable(tmp_path, names)
    program.write_text("#!/bin/sh\nexit 2\n")
    assert native_step.unusable(tmp_path, names) == "" and program.stat().st_mode & stat.S_IXUSR, "made to run"
    program.write_text("#!/bin/sh\necho 'GLIBC_9.9 not found' >&2\nexit 1\n")
    assert native_step.unusable(tmp_path, names) == "GLIBC_9.9 not found"
    monkeypatch.setattr(native_step, "gpu_architecture", lambda: "121")
    assert native_step.unusable(tmp_path, names[:1]).endswith(", the GPU is sm_121")
    os.truncate(library, 5000)
    assert native_step.unusable(tmp_path, names[:1]), "it ends the process that loads it"


def test_they_are_compiled_where_they_do_not_run(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only those that the call needs."""
    assert "to compile them: an NVIDIA GPU: " in native_step.compiled_here(tmp_path, ["harness"], "cut off")["missing"]
    monkeypatch.setattr(native_step, "gpu_problems", list)
    monkeypatch.setattr(native_step, "gpu_architecture", lambda: "121")
    assert native_step.compiled_here(tmp_path / "here", ["harness"], "cut off") == {"compiled": "121"}
    assert asked(compiler) == ["device.cu", "harness.cpp", "link harness.partial"]
    assert os.listdir(tmp_path / "here") and (tmp_path / "here" / "harness").is_file()
    monkeypatch.setattr(native_step, "find_nvcc", lambda: None)
    lacking = native_step.compiled_here(tmp_path, ["harness"], "cut off")["missing"]
    assert lacking == "compiled files that run here (cut off); to compile them: nvcc (of the CUDA toolkit)"
