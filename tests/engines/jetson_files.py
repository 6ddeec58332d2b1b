"""Files by which a Jetson shows what it is, as L4T writes them, under a root of a test's own.

Texts are those of published boot logs and reports of users: /proc/device-tree, /etc/nv_tegra_release, sysfs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

RELEASE: Final = "# R{major} (release), REVISION: {revision}, GCID: 38968081, BOARD: generic, EABI: aarch64\n"
TREE, GPU = "proc/device-tree", "sys/class/devfreq/17000000.gpu"

ORIN_NX: Final = {
    f"{TREE}/model": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0",
    f"{TREE}/compatible": "nvidia,p3768-0000+p3767-0000\0nvidia,p3767-0000\0nvidia,tegra234\0",
    "etc/nv_tegra_release": RELEASE.format(major=36, revision="4.3"),
    "var/lib/nvpmodel/status": "pmode:0003 fmode:quiet\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=3 NAME=25W >\n",
    "proc/meminfo": "MemTotal:          15655 kB\nMemFree:            1000 kB\nMemAvailable:      12000 kB\n",
    f"{GPU}/cur_freq": "918000000\n",
    f"{GPU}/max_freq": "918000000\n",
    f"{GPU}/min_freq": "306000000\n",
}


AGX_ORIN: Final = {
    f"{TREE}/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    f"{TREE}/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0",
    "etc/nv_tegra_release": RELEASE.format(major=36, revision="4.7"),
    "proc/meminfo": "MemTotal:       64349000 kB\nMemFree:        1000000 kB\nMemAvailable:   60000000 kB\n",
    "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}',
    "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0": "",
    "usr/lib/python3.10/dist-packages/tensorrt/__init__.py": "",
    "var/lib/nvpmodel/status": "pmode:0002\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\nGPU MAX_FREQ -1\n< POWER_MODEL ID=2 NAME=MODE_30W >\n",
    f"{GPU}/cur_freq": "306000000\n",
    f"{GPU}/max_freq": "612000000\n",
    "sys/kernel/debug/bpmp/debug/clk/emc/rate": "3199000000\n",
}


def write(root: Path, files: Mapping[str, str]) -> None:
    """The files below `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
