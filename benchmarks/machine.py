"""Where and with what a benchmark ran: what every recorded number stands beside."""

import os
import platform
from dataclasses import dataclass
from datetime import date

from btp_export.report.machine import installed, processor
from graphs.files.cores import available_cores
from graphs.files.memory import total_memory

# What does the work, ours or others'; those that are not installed are left out.
PACKAGES = ("numpy", "onnxruntime", "onnxruntime-genai", "torch", "transformers", "llama_cpp_python", "gguf", "onnx")


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


def this_machine() -> Machine:
    """The machine now."""
    named, architecture, memory = processor(), platform.machine(), total_memory() / 2**30
    full = named if named == architecture else f"{architecture}, {named}"
    return Machine(date.today().isoformat(), full, available_cores(), memory, installed(PACKAGES), os.getloadavg()[0])
