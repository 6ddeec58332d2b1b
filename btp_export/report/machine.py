"""The machine that measured: what it is and what runs the graphs on it, without its name."""

import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from btp_export.results.report import Machine
from graphs.files.cores import available_cores

PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "numpy")


def machine() -> Machine:
    """This machine: processor, cores that this process may use, system and versions of what runs the graphs."""
    system, versions = f"{platform.system()} {platform.machine()}", installed(PACKAGES)
    return Machine(cpu=processor(), cores=available_cores(), system=system, versions=versions)


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of those of the packages that there are: not every step needs all."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def processor() -> str:
    """The processor's own name where the system tells it, else its architecture."""
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
