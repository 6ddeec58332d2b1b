"""The libraries that set-up compiles: found, current, replaced when sources change, and CMake's left alone."""

import ctypes
from pathlib import Path

import pytest

from engines.native.compile_cpu import FLAGS, WARNINGS, compile_library, digest, is_current, main
from engines.native.libraries import inspect
from graphs.files.atomic import sha256
from graphs.records.errors import UnavailableError
from tests.engines.native import builds


def test_set_up_compiled_from_these_sources() -> None:
    """btp_ort takes long to compile, so the one that is there is looked at; btp_host shows below how one is made."""
    library = builds.ort_library()
    assert is_current(library) and not list(library.parent.glob("tmp*"))
    assert inspect("btp_ort", library).architectures == () and hasattr(ctypes.CDLL(str(library)), "RegisterCustomOps")


@pytest.mark.parametrize("name", ["btp_ort", "btp_host"])
def test_set_up_compiled_without_a_warning(name: str) -> None:
    """With -Wall -Wextra, optimised; ort_cuda_library compiles with -Werror what CUDA changes."""
    assert {"-Wall", "-Wextra", "-O3"} <= set(FLAGS)
    assert builds.cpu_library(name).with_suffix(WARNINGS).read_text() == ""
    without = set(builds.ort_sources()) - set(builds.ort_sources(with_kernels=True))
    assert without and not any("BTP_WITH_CUDA" in path.read_text() for path in without)


def test_it_is_compiled_when_sources_change_and_not_again(tmp_path: Path) -> None:
    builds.compiler()
    flags = (*(flag if flag != "-O3" else "-O0" for flag in FLAGS), "-Wnamespaces")
    library, note = tmp_path / "libbtp_host.so", tmp_path / "libbtp_host.sources"
    library.write_bytes(b"compiled before")
    note.write_text(f"{'0' * 64} {sha256(library)}\n")  # by us, from other sources
    assert compile_library("btp_host", tmp_path, flags=flags) == library
    assert inspect("btp_host", library).architectures == () and hasattr(ctypes.CDLL(str(library)), "btp_host_choose")
    assert compile_library("btp_host", tmp_path, flags=flags) is None, "it is current"
    warnings = library.with_suffix(WARNINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [library.name, note.name, warnings.name]
    assert "-Wnamespaces" in warnings.read_text()
    assert note.read_text().split() == [digest(flags), sha256(library)]
    assert not is_current(library), "of these sources, but with other flags"


@pytest.mark.parametrize("note", [None, "0" * 64 + " " + "1" * 64, "not a note"])
def test_what_cmake_built_is_left_alone(note: str | None, tmp_path: Path) -> None:
    (tmp_path / "libbtp_ort.so").write_bytes(b"built with CUDA")
    if note is not None:
        (tmp_path / "libbtp_ort.sources").write_text(note)
    assert compile_library("btp_ort", tmp_path) is None
    assert (tmp_path / "libbtp_ort.so").read_bytes() == b"built with CUDA"


def test_without_a_compiler_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UnavailableError, match="no C\\+\\+ compiler") as error:
        compile_library("btp_ort", tmp_path / "new")
    assert error.value.do == "apt-get install g++" and not (tmp_path / "new").exists()
    assert main(tmp_path / "new") == 0 and "portable bodies run" in capsys.readouterr().err
