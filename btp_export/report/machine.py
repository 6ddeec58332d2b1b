"""The machine that measured: what it is and what runs the graphs on it, without its name."""

import platform
from importlib import metadata
from pathlib import Path

from btp_export.results.report import Machine
from graphs.files.cores import available_cores

PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "numpy")


def machine() -> Machine:
    """This machine: processor, cores that this process may use, system and versions of what runs the graphs."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # not needed for every step; the page lists what there is
    return Machine(
        cpu=_processor(), cores=available_cores(), system=f"{platform.system()} {platform.machine()}", versions=versions
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    # "model name" on x86; many ARM boards have only "Model" or "Hardware".
    for key in ("model name", "Model", "Hardware"):
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == key and value.strip():
                return " ".join(value.split())
    return platform.processor() or platform.machine() or "unknown"
