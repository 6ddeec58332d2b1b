"""TensorRT is found and loaded with no variable set by hand, and what is missing or wrong is said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engines.tensorrt import installed
from graphs.records.errors import UnavailableError
from tests.engines.tensorrt import building

SCRIPT = """
import pathlib, tempfile
from engines.tensorrt import installed
found = installed.load("rtx")
assert installed.load("rtx").module is found.module
from engines.native.plugins import register_python
held = register_python(found.module)
(folder,) = pathlib.Path(tempfile.gettempdir()).iterdir()
print(found.title, *sorted(path.name for path in folder.iterdir()))
"""


def test_rtx_is_loaded_with_no_environment(tmp_path: Path) -> None:
    """In a bare environment; the folder of links is gone afterwards."""
    building.need_rtx()
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "TensorRT", "for", "RTX", str(installed.flavour_version("rtx")), "__init__.py",
        "libtensorrt_onnxparser_rtx.so.1", "libtensorrt_rtx.so", "libtensorrt_rtx.so.1", "tensorrt_rtx.so",
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path | None]:
    """Made-up folders of the two packages of TensorRT for RTX; versions say that 1.7.1.116 is installed."""
    places: dict[str, Path | None] = {}
    for name in (installed.BINDINGS, installed.LIBRARIES):
        (tmp_path / name).mkdir()
        places[name] = tmp_path / name
    for name in ("libtensorrt_rtx.so.1.7.1", "libtensorrt_onnxparser_rtx.so.1.7.1"):
        (tmp_path / installed.LIBRARIES / name).write_bytes(b"no library")
    (tmp_path / installed.BINDINGS / "__init__.py").write_text("from .tensorrt_rtx import *\n")
    (tmp_path / installed.BINDINGS / "tensorrt_rtx.so").write_bytes(b"no library")
    monkeypatch.setattr(installed, "_package_folder", places.get)
    monkeypatch.setattr(installed, "_version", {installed.BINDINGS_PACKAGE: "1.7.1.116"}.get)
    monkeypatch.setattr(installed, "_has", {installed.BINDINGS: True}.get)
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt_rtx"]:  # another test loaded it
        monkeypatch.delitem(sys.modules, name)
    return places


@pytest.mark.parametrize("missing", [installed.BINDINGS, installed.LIBRARIES])
def test_half_of_rtx_is_not_enough(missing: str, packages: dict[str, Path | None]) -> None:
    packages[missing] = None
    with pytest.raises(UnavailableError, match="is missing") as caught:
        installed.load("rtx")
    assert "btp-export[rtx]" in caught.value.do and caught.value.exit_code == 3
    assert "is missing" in installed.survey()[1]["problem"]


def test_libraries_of_another_version_are_refused_before_they_are_loaded(packages: dict[str, Path | None]) -> None:
    folder = packages[installed.LIBRARIES]
    assert folder is not None
    (folder / "libtensorrt_rtx.so.1.7.1").rename(folder / "libtensorrt_rtx.so.1.6.0")
    with pytest.raises(UnavailableError, match=r"holds libtensorrt_rtx.so 1\.6\.0") as caught:
        installed.load("rtx")
    assert "libtensorrt_rtx.so 1.7.1" in caught.value.wanted


def test_a_broken_library_is_one_error(packages: dict[str, Path | None]) -> None:
    with pytest.raises(UnavailableError, match=r"TensorRT for RTX 1\.7\.1\.116 cannot be loaded: ") as caught:
        installed.load("rtx")
    assert len(caught.value.lines()) == 3 and "tensorrt_rtx" not in sys.modules


def test_a_folder_called_tensorrt_is_not_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if installed.is_installed("tensorrt"):
        pytest.skip("TensorRT is installed")
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert installed.flavour_version("tensorrt") is None
    with pytest.raises(UnavailableError, match="TensorRT is not installed") as caught:
        installed.load("tensorrt")
    assert "btp-export[tensorrt]" in caught.value.do


def test_a_tensorrt_that_does_not_import_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open\\nmore')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(UnavailableError) as caught:
        installed.load("tensorrt")
    assert caught.value.got == "TensorRT cannot be loaded: libnvinfer.so.10: cannot open"
    assert "its CUDA" in caught.value.wanted


@pytest.mark.parametrize(
    ("flavour", "version", "wanted", "fits"),
    [
        ("tensorrt", "10.3.0.30", "10.3", True),
        ("tensorrt", "10.30.0", "10.3", False),
        ("tensorrt", "10.16.1.11", "10.3", False),
        ("tensorrt", "11.1.0.106", "11.1", True),
        ("rtx", "1.7.1.116", "1.7.1", True),
        ("rtx", "1.6.0.1", "1.7.1", False),
    ],
)
def test_versions_are_compared_number_by_number(
    flavour: installed.Flavour, version: str, wanted: str, fits: bool
) -> None:
    library = installed.Library(flavour, version, None)
    assert library.is_version(wanted) == fits and library.is_version(library.short_version)
    if fits:
        installed.require_version(library, wanted)
        return
    with pytest.raises(UnavailableError) as caught:
        installed.require_version(library, wanted)
    assert wanted in caught.value.wanted and f"--tensorrt {library.short_version}" in caught.value.do
