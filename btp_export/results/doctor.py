"""`btp-export doctor`: "btp-doctor/1"."""

from pathlib import Path
from typing import Literal

from btp_export.results.base import Result
from engines.jetson import Jetson
from graphs.records.record import Record


class Package(Record):
    """A Python package; `extra` brings it (null: it is required), `install` is what to type where it is missing."""

    package: str
    purpose: str
    extra: str | None
    version: str | None
    install: str | None


class NativeLibraryState(Record):
    """A library of the custom operators; `problem` says why one that is there cannot be used."""

    library: str
    purpose: str
    path: Path | None
    architectures: tuple[str, ...]
    problem: str | None
    do: str | None


class EngineBuilderState(Record):
    """A TensorRT; `problem` says why one that is there cannot be used, one outside this environment among them."""

    library: str
    version: str | None
    problem: str | None
    do: str | None


class Doctor(Result):
    """What is installed and what the machine has. `ok`: all that is required is there; no extra and no library is."""

    format: Literal["btp-doctor/1"] = "btp-doctor/1"
    ok: bool
    python: str
    system: str
    packages: tuple[Package, ...]
    native: tuple[NativeLibraryState, ...]
    tensorrt: tuple[EngineBuilderState, ...]
    gpu_compute_capability: str | None
    jetson: Jetson | None = None  # null where this is none
    advice: tuple[str, ...] = ()  # what to do before measuring
    onnxruntime_providers: tuple[str, ...]
    cores: int
    memory_bytes: int | None
    free_disk_bytes: int | None
    demo_model: bool


class Version(Result):
    """`btp-export --version`."""

    format: Literal["btp-version/1"] = "btp-version/1"
    version: str
