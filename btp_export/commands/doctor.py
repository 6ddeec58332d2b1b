"""`btp-export doctor`: what is installed, what is missing and what to type, and what the machine has."""

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from btp_export import extras
from btp_export.console import JsonOption, emit, table

if TYPE_CHECKING:
    from btp_export.results.doctor import Doctor, NativeLibraryState, Package


ROOT: Final = "BTP_ROOT"  # where /proc, /sys, /etc and /usr are, for tests; profile.sh knows it too


class Need(NamedTuple):
    """A package, what it is for, the extra that brings it ("": it is required), and others with the same module."""

    package: str
    purpose: str
    extra: str = ""
    alternatives: tuple[str, ...] = ()


NEEDS = (
    Need("numpy", "numbers"),
    Need("pillow", "pictures"),
    Need("tokenizers", "prompts"),
    Need("jinja2", "chat templates and the report"),
    Need("onnxruntime", "running graphs", extras.CPU, ("onnxruntime-gpu",)),
    Need("onnx", "preparing graphs", extras.DEVICE),
    Need("onnx-ir", "preparing graphs", extras.DEVICE),
    Need("polygraphy", "building engines", extras.DEVICE),
    Need("torch", "vision capture and calibration", extras.EXPORT),
    Need("transformers", "checkpoints and the reference model", extras.EXPORT),
    Need("onnxscript", "vision capture", extras.EXPORT),
    Need("huggingface_hub", "fetching models", extras.EXPORT),
)


def command(as_json: JsonOption = False) -> None:
    """Show what is installed, how to install what is missing, and what this machine has; of a Jetson its board, power
    mode, clocks and known faults too.
    """
    from btp_export.results.doctor import Doctor, EngineBuilderState, NativeLibraryState
    from engines.jetson import outside_tensorrt, read_jetson, settings_advice
    from engines.native.libraries import survey
    from engines.tensorrt import installed
    from graphs.files.cores import available_cores
    from graphs.files.memory import available_memory

    packages = [find_package(need) for need in NEEDS]
    root = Path(os.environ.get(ROOT, "/"))
    board = read_jetson(root)
    result = Doctor(
        ok=all(package.version or package.extra for package in packages),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        packages=tuple(packages),
        # Without these the graphs' portable bodies run, and `build` prepares what a device needs.
        native=tuple(NativeLibraryState(**entry) for entry in survey()),
        tensorrt=tuple(EngineBuilderState(**entry) for entry in installed.survey(outside_tensorrt(root))),
        gpu_compute_capability=installed.gpu_capability(),
        jetson=board,
        advice=() if board is None else tuple(settings_advice(board)),
        onnxruntime_providers=tuple(_providers()),
        cores=available_cores(),
        memory_bytes=available_memory(),
        free_disk_bytes=_free_disk(),
        demo_model=_demo_model(),
    )
    emit(result, as_json=as_json, render=show)


def find_package(need: Need) -> "Package":
    """Which of the packages is installed, or how to install the first."""
    from btp_export.results.doctor import Package

    versions = {name: _version(name) for name in (need.package, *need.alternatives)}
    package = next((name for name, version in versions.items() if version is not None), need.package)
    version = versions[package]
    missing = extras.install(need.extra) if need.extra else f"pip install {need.package}"
    install = None if version else missing
    return Package(package=package, purpose=need.purpose, extra=need.extra or None, version=version, install=install)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _providers() -> list[str]:
    """Where onnxruntime can run graphs. Any of its builds will do, so the module decides and not a package's name."""
    try:
        from engines.runners.onnxruntime import providers
    except ImportError:
        return []
    remote = "AzureExecutionProvider"  # sends pictures to a service; built in, never used here
    return [name for name in providers() if name != remote]


def _free_disk() -> int | None:
    """Bytes free on the current folder's disk, None where that folder was removed."""
    try:
        return shutil.disk_usage(Path.cwd()).free
    except OSError:
        return None


def _demo_model() -> bool:
    from btp_export.demo import checkpoint_path

    return (checkpoint_path() / "model.safetensors").is_file()


def show(result: "Doctor") -> Any:
    """The document for the console."""
    from rich.console import Group

    from graphs.files.atomic import size_text

    rows = [[p.package, p.version or "missing", p.install or p.purpose] for p in result.packages]
    versions = table(["package", "version", "purpose, or install"], rows, text=3)
    memory, disk = (
        "unknown" if count is None else size_text(count) for count in (result.memory_bytes, result.free_disk_bytes)
    )
    providers = ", ".join(result.onnxruntime_providers) or "none"
    lines = [
        f"Python {result.python} on {result.system}",
        f"{result.cores} cores, {memory} memory available, {disk} free on this disk",
        f"ONNX Runtime runs on: {providers}",
        f"GPU: {_gpu(result.gpu_compute_capability)}",
        *_jetson_lines(result),
        "demo model: installed" if result.demo_model else "demo model: missing, install the package again",
        "everything required is installed" if result.ok else "something required is missing, see above",
    ]
    native = [_native_row(entry) for entry in result.native]
    libraries = table(["native library (optional)", "state", "purpose"], native, text=3)
    if any(entry.do for entry in result.native):
        from engines.native.libraries import how_to_build

        lines.append(f"build the native libraries: {how_to_build('btp_trt_dynamic')}")
    builders = table(["engine builder (optional)", "state", "purpose, or install"], _builder_rows(result), text=3)
    return Group(versions, libraries, builders, "\n".join(lines))


def _jetson_lines(result: "Doctor") -> list[str]:
    board = result.jetson
    if board is None:
        return []
    clocks = [
        f"{name} {'unknown' if hertz is None else f'{hertz / 1e6:.0f} MHz'}"
        for name, hertz in (
            ("GPU", board.gpu_clock_hz),
            ("at most", board.gpu_clock_max_hz),
            ("memory", board.memory_clock_hz),
        )
    ]
    return [
        f"Jetson: {board.model or 'unknown model'}"
        + (f", --target {board.target}" if board.target else ", a board without a target of its own"),
        f"L4T {board.l4t or 'unknown'}, CUDA {board.cuda or 'unknown'}, power mode {board.power_mode or 'unknown'}",
        f"clocks: {', '.join(clocks)}",
        *(f"advice: {text}" for text in result.advice),
        *(f"known fault: {text}" for text in board.faults),
    ]


def _gpu(capability: str | None) -> str:
    return "none found by the CUDA driver" if capability is None else f"compute capability {capability}"


def _builder_rows(result: "Doctor") -> list[list[str]]:
    purposes = {
        "TensorRT": "engines on servers and Jetsons",
        "TensorRT for RTX": "engines for RTX cards, on any machine",
    }
    rows = []
    for entry in result.tensorrt:
        state = entry.problem or entry.version or "missing"
        rows.append([entry.library, state, entry.do or purposes[entry.library]])
    return rows


def _native_row(entry: "NativeLibraryState") -> list[str]:
    if entry.problem:
        return [entry.library, entry.problem, entry.do or ""]
    if entry.path is None:
        return [entry.library, "not built", entry.purpose]
    target = f"GPU {', '.join(entry.architectures)}" if entry.architectures else "CPU"
    return [entry.library, f"built for {target}", entry.purpose]
