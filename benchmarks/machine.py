"""Where and with what a benchmark ran: what every recorded number stands beside."""

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path

from graphs.files.cores import available_cores
from graphs.files.memory import total_memory

# What does the work, ours or others'; those that are not installed are left out.
PACKAGES = ("numpy", "onnxruntime", "onnxruntime-genai", "torch", "transformers", "llama_cpp_python", "gguf", "onnx")
LOAD_FILE = Path("/proc/loadavg")


@dataclass(frozen=True)
class Machine:
    """Names, versions and the load of the last minute, of which what is measured is a part."""

    date: str
    processor: str
    cores: int
    memory_gib: float
    versions: dict[str, str]
    load: float

    def sentence(self) -> str:
        """In a line, for a page of results."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.date}, {self.cores} cores ({self.processor}), {self.memory_gib:.0f} GiB, load {self.load:.1f}, "
            f"{versions}"
        )


def this_machine(packages: Iterable[str] = PACKAGES) -> Machine:
    """The machine now."""
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    memory = total_memory() / 2**30
    return Machine(date.today().isoformat(), processor(), available_cores(), memory, versions, os.getloadavg()[0])


def processor() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()}, {named[0]}" if named else platform.machine()
