"""What a Jetson's files say, and what is known to go wrong with it."""

import subprocess
import sys
from pathlib import Path

import pytest

from engines.jetson import how_to_see, outside_tensorrt, read_jetson, settings_advice
from tests.engines.jetson_files import AGX_ORIN, GPU, ORIN_NX, RELEASE, TREE, write


def test_an_agx_orin_as_its_files_show_it(tmp_path: Path) -> None:
    write(tmp_path, AGX_ORIN)
    board = read_jetson(tmp_path)
    assert board is not None
    assert (board.model, board.target) == ("NVIDIA Jetson AGX Orin Developer Kit", "jetson-agx-orin-64")
    assert (board.l4t, board.cuda, board.compute_capability) == ("36.4.7", "12.6.11", "8.7")
    assert (board.power_mode, board.gpu_clock_hz, board.gpu_clock_max_hz) == ("MODE_30W", 306_000_000, 612_000_000)
    assert (board.memory_clock_hz, board.memory_bytes) == (3_199_000_000, 64_349_000 * 1024)
    assert board.available_bytes == 60_000_000 * 1024
    advice = settings_advice(board)
    assert "MODE_30W" in advice[0] and "306 of 612 MHz" in advice[1] and len(advice) == 2


def test_what_cannot_be_read_is_left_open(tmp_path: Path) -> None:
    write(tmp_path, {f"{TREE}/compatible": ORIN_NX[f"{TREE}/compatible"]})
    board = read_jetson(tmp_path)
    assert board is not None and board.target == "jetson-orin-nx-16"
    assert (board.model, board.l4t, board.cuda, board.power_mode) == ("", "", "", "")
    assert (board.gpu_clock_hz, board.memory_clock_hz, board.memory_bytes, settings_advice(board)) == (
        None,
        None,
        None,
        [],
    )
    assert read_jetson(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("revision", "nvmap"), [("4.3", False), ("4.4", False), ("4.6", False), ("4.7", True), ("5", True), ("4.10", True)]
)
def test_the_fault_of_large_allocations_is_of_its_releases(revision: str, nvmap: bool, tmp_path: Path) -> None:
    write(tmp_path, AGX_ORIN | {"etc/nv_tegra_release": RELEASE.format(major=36, revision=revision)})
    board = read_jetson(tmp_path)
    assert board is not None and any("error 12" in fault for fault in board.faults) == nvmap
    assert any("#4832" in fault and "TensorRT 10.3.0" in fault for fault in board.faults)


def test_faults_of_other_boards_and_releases(tmp_path: Path) -> None:
    thor = {f"{TREE}/compatible": "nvidia,p3834-0008\0nvidia,tegra264\0"}
    write(tmp_path, AGX_ORIN | thor | {"etc/nv_tegra_release": RELEASE.format(major=38, revision="2.0")})
    board = read_jetson(tmp_path)
    assert board is not None and (board.target, board.faults) == ("jetson-thor-t5000", ())
    write(tmp_path, {"etc/nv_tegra_release": RELEASE.format(major=36, revision="3.0")})
    board = read_jetson(tmp_path)
    assert board is not None and any("JetPack 6.1" in fault for fault in board.faults)


def test_the_clock_of_other_kernels_is_found(tmp_path: Path) -> None:
    older = {name.replace("17000000.gpu", "17000000.ga10b"): text for name, text in ORIN_NX.items() if GPU in name}
    write(tmp_path, {f"{TREE}/compatible": ORIN_NX[f"{TREE}/compatible"]} | older)
    board = read_jetson(tmp_path)
    assert board is not None and board.gpu_clock_hz == 918_000_000


def test_a_tensorrt_outside_the_environment(tmp_path: Path) -> None:
    assert outside_tensorrt(tmp_path) is None
    write(tmp_path, AGX_ORIN)
    found = outside_tensorrt(tmp_path)
    assert found is not None and (found.version, found.python) == ("10.3.0", "3.10")
    assert found.folder == tmp_path / "usr/lib/python3.10/dist-packages"
    assert how_to_see(found).startswith("make the environment with: python3.10 -m venv --system-site-packages .venv")


def test_an_environment_with_the_systems_packages_sees_them(tmp_path: Path) -> None:
    """The option that docs/jetson.md names does what it says: a module of the system's own Python is found."""
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    find = "import importlib.util; print(importlib.util.find_spec('pip') is not None)"
    if not base.is_file() or subprocess.check_output([base, "-c", find], text=True).strip() != "True":
        pytest.skip("the Python below this environment has no package of its own")
    seen = []
    for option in ([], ["--system-site-packages"]):
        folder = tmp_path / f"env{len(option)}"
        subprocess.run([base, "-m", "venv", "--without-pip", *option, folder], check=True)
        seen.append(subprocess.check_output([folder / "bin" / "python", "-c", find], text=True).strip())
    assert seen == ["False", "True"]
