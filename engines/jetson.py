"""What a Jetson says of itself: board, L4T, CUDA, TensorRT, power mode, clocks, memory; and known faults.

Everything is read from files that need no rights: /proc/device-tree, /etc/nv_tegra_release, sysfs and what nvpmodel
keeps. `root` is where they are, so that tests and images of boards can be read too.
"""

import re
import sys
from pathlib import Path
from typing import Final

from engines.targets import board_of
from graphs.files.memory import available_memory
from graphs.records.errors import InputError
from graphs.records.reading import read_file, read_json
from graphs.records.record import Record

SOC: Final = {"tegra234": "8.7", "tegra264": "11.0"}  # in /proc/device-tree/compatible -> compute capability
CLOCKS: Final = ("*gpu*", "*ga10b*")  # names of the GPU in /sys/class/devfreq, of several releases
NVMAP_SINCE: Final = (36, 4, 7)
FULL_POWER: Final = "MAXN"  # the mode without a limit, MAXN or MAXN_SUPER


class Jetson(Record):
    """A board as it is; None or "" where a file is missing or only root may read it. Clocks are in Hz.

    `target` is the name for --target where the board has a file in engines/targets.
    """

    model: str
    modules: str
    target: str | None
    compute_capability: str | None
    l4t: str
    cuda: str
    power_mode: str
    gpu_clock_hz: int | None
    gpu_clock_max_hz: int | None
    memory_clock_hz: int | None
    memory_bytes: int | None
    available_bytes: int | None
    faults: tuple[str, ...]


class OutsideTensorRT(Record):
    """A TensorRT module in the system's own Python, that this environment does not see."""

    folder: Path
    version: str
    python: str  # "3.10"


def read_jetson(root: Path = Path("/")) -> Jetson | None:
    """The board that this is; None where it is none."""
    modules = _words(root / "proc/device-tree/compatible")
    soc = next((name for name in SOC if name in modules), None)
    release = _l4t(root)
    if soc is None and not release:
        return None
    capability = None if soc is None else SOC[soc]
    gpu = next((path for pattern in CLOCKS for path in sorted((root / "sys/class/devfreq").glob(pattern))), None)
    memory = _memory(root)
    board = None if capability is None else board_of(capability, modules, None, memory)
    return Jetson(
        model=_words(root / "proc/device-tree/model"),
        modules=modules,
        target=None if board is None else board.name,
        compute_capability=capability,
        l4t=release,
        cuda=_cuda(root),
        power_mode=_power_mode(root),
        gpu_clock_hz=None if gpu is None else _number(gpu / "cur_freq"),
        gpu_clock_max_hz=None if gpu is None else _number(gpu / "max_freq"),
        memory_clock_hz=_number(root / "sys/kernel/debug/bpmp/debug/clk/emc/rate"),
        memory_bytes=memory,
        available_bytes=available_memory(root),
        faults=tuple(_faults(release, capability, _installed_tensorrt(root))),
    )


def outside_tensorrt(root: Path = Path("/")) -> OutsideTensorRT | None:
    """TensorRT's module in the folder of the system's packages, where JetPack and Debian put it; None if none is."""
    for folder in sorted(root.glob("usr/lib/python3*/dist-packages/tensorrt")):
        python = folder.parts[-3].removeprefix("python")
        python = f"{sys.version_info.major}.{sys.version_info.minor}" if python == "3" else python
        return OutsideTensorRT(folder=folder.parent, version=_installed_tensorrt(root) or "unknown", python=python)
    return None


def how_to_see(outside: OutsideTensorRT) -> str:
    """What to type so that an environment sees the system's TensorRT."""
    return f"make the environment with: python{outside.python} -m venv --system-site-packages .venv (docs/jetson.md)"


def settings_advice(board: Jetson) -> list[str]:
    """What to do before measuring, where mode or clocks would spoil the numbers."""
    advice = []
    if board.power_mode and FULL_POWER not in board.power_mode:
        advice.append(f"power mode {board.power_mode}: sudo nvpmodel -m 0, or the number of MAXN in /etc/nvpmodel.conf")
    now, most = board.gpu_clock_hz, board.gpu_clock_max_hz
    if now is not None and most is not None and now < most:
        advice.append(f"the GPU runs at {now / 1e6:.0f} of {most / 1e6:.0f} MHz: sudo jetson_clocks before measuring")
    return advice


# -- files -----------------------------------------------------------------------------------------------------------


def _l4t(root: Path) -> str:
    """ "36.4.7" of "# R36 (release), REVISION: 4.7, ..."."""
    match = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", _words(root / "etc/nv_tegra_release"))
    return f"{match[1]}.{match[2]}" if match else ""


def _cuda(root: Path) -> str:
    try:
        return str(read_json(root / "usr/local/cuda/version.json")["cuda"]["version"])
    except (InputError, LookupError, TypeError):
        return ""


def _installed_tensorrt(root: Path) -> str:
    """The version of libnvinfer of the system: "10.3.0"."""
    files = [path.name for path in root.glob("usr/lib/*-linux-gnu/libnvinfer.so.*.*.*")]
    versions = [match[1] for name in files if (match := re.fullmatch(r"libnvinfer\.so\.(\d+\.\d+\.\d+)", name))]
    return max(versions, key=_parts, default="")


def _power_mode(root: Path) -> str:
    """The name of nvpmodel's mode, or its number where the list of modes cannot be read; "" without nvpmodel."""
    match = re.search(r"pmode:\s*(\d+)", _words(root / "var/lib/nvpmodel/status"))
    if match is None:
        return ""
    number = int(match[1])
    named = re.search(rf"<\s*POWER_MODEL\s+ID={number}\s+NAME=(\S+)\s*>", _words(root / "etc/nvpmodel.conf"))
    return named[1] if named else str(number)


def _memory(root: Path) -> int | None:
    match = re.search(r"MemTotal:\s*(\d+) kB", _words(root / "proc/meminfo"))
    return int(match[1]) * 1024 if match else None


def _number(path: Path) -> int | None:
    text = _words(path)
    return int(text) if text.isdigit() else None


def _words(path: Path) -> str:
    """A file's text on one line; "" where it cannot be read. The device tree ends its words with zeros."""
    try:
        return " ".join(read_file(path).decode("utf-8", errors="replace").replace("\0", " ").split())
    except InputError:
        return ""


# -- known faults ----------------------------------------------------------------------------------------------------


def _faults(l4t: str, capability: str | None, tensorrt: str) -> list[str]:
    found = []
    release = _parts(l4t)
    if release[:1] == (36,) and release >= NVMAP_SINCE:
        found.append(
            f"L4T {l4t}: cudaMalloc may refuse a large piece although memory is free (NvMapMemAllocInternalTagged, "
            "error 12; ggml-org/llama.cpp#23732). Shared weights are then mapped in pieces; a reboot helps others"
        )
    if capability == "8.7":
        version = f"TensorRT {tensorrt}" if tensorrt else "TensorRT"
        found.append(
            f"{version} on compute capability 8.7 may build no engine of DequantizeLinear in INT8 or INT4 "
            "(NVIDIA/TensorRT#4832): four-bit weights need the plugin BtpLinear"
        )
    if l4t and release < (36, 4):
        found.append(f"L4T {l4t} comes with TensorRT 8.6, without IPluginV3: update to JetPack 6.1 or later")
    return found


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
