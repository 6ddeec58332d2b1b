"""Libraries that are missing or cannot work here give one clear error, and nothing is registered."""

import platform
import shutil
from pathlib import Path

import numpy as np
import pytest

from engines.native import libraries
from engines.native.host import host_library
from engines.native.kernels import Kernels
from engines.native.libraries import NativeLibrary, custom_ops, find, inspect, open_library, require_capability
from graphs.records.errors import InputError, UnavailableError
from tests.engines.native import builds


def test_a_missing_library_says_where_it_was_looked_for_and_how_to_build_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BTP_NATIVE_DIR", str(tmp_path))
    assert libraries.locate("btp_kernels") is None and custom_ops() is None
    with pytest.raises(UnavailableError) as error:
        find("btp_trt_dynamic")
    assert error.value.got == f"libbtp_trt_dynamic.so was not found in {tmp_path}"
    assert "cmake -S engines/native -B engines/native/build -DTENSORRT_INCLUDE_DIR=" in error.value.do


def test_a_folder_that_is_not_there_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BTP_NATIVE_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="BTP_NATIVE_DIR is"):
        custom_ops()


def test_a_library_for_another_machine_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    other = tmp_path / "libbtp_ort.so"
    shutil.copy(builds.ort_library(), other)
    content = bytearray(other.read_bytes())
    content[18:20] = (183 if platform.machine() == "x86_64" else 62).to_bytes(2, "little")
    other.write_bytes(content)
    with pytest.raises(UnavailableError) as error:
        inspect("btp_ort", other)
    wanted = {"x86_64": "aarch64", "aarch64": "x86_64"}[platform.machine()]
    assert error.value.got == f"{other} was built for {wanted}" and error.value.wanted == platform.machine()


def test_a_file_that_is_no_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libbtp_ort.so").write_text("not a library, though long enough to look at")
    monkeypatch.setenv("BTP_NATIVE_DIR", str(tmp_path))
    with pytest.raises(UnavailableError, match="is no shared library"):
        custom_ops()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ('extern "C" int btp_kernels_version() { return 99; }', "is of interface version 99"),
        ("int something_else = 1;", "is no library of this project"),
        ("void missing(); struct S { S() { missing(); } } s;", "cannot be loaded: .*undefined symbol"),
    ],
    ids=["other version", "other library", "cannot be loaded"],
)
def test_a_wrong_library_is_refused(tmp_path: Path, code: str, message: str) -> None:
    source = tmp_path / "library.cpp"
    source.write_text(code)
    library = tmp_path / "libbtp_kernels.so"
    builds.run([builds.compiler(), "-shared", "-fPIC", source, "-o", library])
    with pytest.raises(UnavailableError, match=message):
        Kernels(library)


def test_a_good_library_tells_what_it_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    path = builds.ort_library()
    assert inspect("btp_ort", path) == NativeLibrary("btp_ort", path, ())
    assert open_library(builds.emulated_kernels()).btp_kernels_version() == libraries.VERSION
    monkeypatch.setenv("BTP_NATIVE_DIR", str(path.parent))
    assert custom_ops() == path


def test_what_cannot_be_loaded_here_is_described_by_its_file(tmp_path: Path) -> None:
    """btp_trt registers plugins when it is loaded; the text that its kernels carry says enough."""
    library = tmp_path / "libbtp_trt.so"
    source = tmp_path / "library.cpp"
    for text, architectures in (("80,87-real,90", ("80", "87", "90")), ("", ())):
        description = f"btp-kernels {libraries.VERSION} for {text}"
        source.write_text(f'extern "C" const char text[] = "{description};";')
        builds.run([builds.compiler(), "-shared", "-fPIC", source, "-o", library])
        assert inspect("btp_trt", library) == NativeLibrary("btp_trt", library, architectures)
    for text, message in (
        ("btp-kernels 99 for 80;", "is of interface version 99"),
        ("", "is no library of this project"),
    ):
        source.write_text(f'extern "C" const char text[] = "{text}";')
        builds.run([builds.compiler(), "-shared", "-fPIC", source, "-o", library])
        with pytest.raises(UnavailableError, match=message):
            inspect("btp_trt", library)


def test_the_kernels_carry_the_description(tmp_path: Path) -> None:
    kernels = tmp_path / "libbtp_trt.so"
    shutil.copy(builds.emulated_kernels(), kernels)
    assert inspect("btp_trt", kernels) == NativeLibrary("btp_trt", kernels, ())


def test_the_survey_has_a_line_for_every_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(builds.ort_library(), tmp_path)
    (tmp_path / "libbtp_trt.so").write_text("not a library, though long enough to look at")
    monkeypatch.setenv("BTP_NATIVE_DIR", str(tmp_path))
    survey = {entry["library"]: entry for entry in libraries.survey()}
    assert list(survey) == list(libraries.LIBRARIES)
    ort = survey["btp_ort"]
    assert (ort["path"], ort["problem"], ort["do"]) == (str(tmp_path / "libbtp_ort.so"), None, None)
    assert survey["btp_kernels"]["path"] is None and "cmake -S engines/native" in survey["btp_kernels"]["do"]
    assert "is no shared library" in survey["btp_trt"]["problem"]


def test_tokens_are_chosen_with_the_library_that_was_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_again = host_library.__wrapped__  # it looks once a process
    monkeypatch.setenv("BTP_NATIVE_DIR", str(tmp_path))
    assert find_again() is None
    library = tmp_path / "libbtp_host.so"
    shutil.copy(builds.cpu_library("btp_host"), library)
    assert inspect("btp_host", library) == NativeLibrary("btp_host", library, ())
    assert find_again().choose(np.array([1, 2, 9], np.float32), 1.0, 1.0, 0.99) == 2
    library.unlink()  # the loaded one stays whole
    library.write_text("not a library, though long enough to look at")
    with pytest.raises(UnavailableError, match="is no shared library"):
        find_again()


def test_sessions_use_the_library_that_was_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engines.runners.onnxruntime import OrtLoader

    monkeypatch.setenv("BTP_NATIVE_DIR", str(tmp_path))
    assert OrtLoader().custom_ops is None
    shutil.copy(builds.ort_library(), tmp_path)
    assert OrtLoader().custom_ops == tmp_path / "libbtp_ort.so"
    assert OrtLoader(custom_ops=None).custom_ops is None
    (tmp_path / "libbtp_ort.so").unlink()  # the loaded one stays whole
    (tmp_path / "libbtp_ort.so").write_text("not a library, though long enough to look at")
    with pytest.raises(UnavailableError, match="is no shared library"):
        OrtLoader()


def test_the_gpu_must_be_one_the_library_was_built_for() -> None:
    library = NativeLibrary("btp_kernels", Path("libbtp_kernels.so"), ("80", "90", "120"))
    for capability in ((8, 0), (8, 7), (9, 0), (12, 1)):
        require_capability(library, capability)
    for capability, flag in (((7, 5), "75"), ((11, 0), "110")):
        with pytest.raises(UnavailableError, match="was built for 80, 90, 120") as error:
            require_capability(library, capability)
        assert f"-DCMAKE_CUDA_ARCHITECTURES={flag}" in error.value.do
