"""What a wheel's library must be: there, for its processor, and with no need that an old Linux lacks.

The wheels themselves are built and tried by `make wheels`, which downloads a compiler.
"""

import platform
import subprocess
import zipfile
from pathlib import Path

import pytest

from engines.native import wheels
from graphs.records.errors import CheckError, UnavailableError
from tests.engines.native import builds


def library(folder: Path, *flags: str) -> bytes:
    """A library of one function, which calls the C++ library unless flags say otherwise."""
    source, built = folder / "one.cc", folder / "one.so"
    source.write_text('#include <string>\nextern "C" int size(const char* text) { return std::string(text).size(); }\n')
    subprocess.run([builds.compiler(), "-shared", "-fPIC", str(source), "-o", str(built), *flags], check=True)
    return built.read_bytes()


def wheel(folder: Path, content: bytes | None) -> Path:
    path = folder / "btp_export-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        if content is not None:
            for name in wheels.LIBRARIES:
                archive.writestr(f"engines/native/lib/lib{name}.so", content)
    return path


def test_a_wheel_without_the_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="carries no btp_ort"):
        wheels.check_libraries(wheel(tmp_path, None), "x86_64")


def test_a_library_for_another_processor_is_refused(tmp_path: Path) -> None:
    content = bytearray(library(tmp_path, "-static-libstdc++", "-static-libgcc"))
    content[18:20] = (183).to_bytes(2, "little")  # e_machine of an ELF file: aarch64
    with pytest.raises(CheckError, match="is for aarch64"):
        wheels.check_libraries(wheel(tmp_path, bytes(content)), "x86_64")


def test_a_library_that_needs_the_c_plus_plus_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match=r"needs .*libstdc\+\+\.so\.6"):
        wheels.check_libraries(wheel(tmp_path, library(tmp_path)), platform.machine())


def test_a_library_for_a_newer_c_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that the linker wrote are compared as numbers: 2.4 is older than 2.28."""
    content = library(tmp_path, "-static-libstdc++", "-static-libgcc")
    versions = wheels._glibc_versions(content)
    assert versions and all(version[0] == 2 for version in versions)
    monkeypatch.setattr(wheels, "GLIBC", max(versions))
    wheels.check_libraries(wheel(tmp_path, content), platform.machine())
    monkeypatch.setattr(wheels, "GLIBC", (2, max(versions)[1] - 1))
    with pytest.raises(CheckError, match="needs glibc"):
        wheels.check_libraries(wheel(tmp_path, content), platform.machine())


def test_without_zig_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="ziglang") as error:
        wheels.build_wheel("aarch64", tmp_path / "out")
    assert "[wheels]" in error.value.do and not (tmp_path / "out").exists()
