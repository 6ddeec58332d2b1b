"""A job for the process that builds an engine, what it answers, and the errors that TensorRT's messages amount to."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

from engines.tensorrt.messages import Messages
from engines.tensorrt.records import EngineLayer, Expected, Flavour, PluginForm
from graphs.dtypes import Precision
from graphs.records.errors import BtpError, CheckError, UnavailableError
from graphs.records.manifest import TensorRecord
from graphs.records.record import Record

Report = Callable[[float], None]  # share of the build that is done, 0 to 1

# What TensorRT says in the log when memory of the host or the GPU is used up.
OUT_OF_MEMORY: Final = re.compile(r"out of memory|OutOfMemory|bad_alloc|insufficient memory", re.IGNORECASE)
CUDA_FAILURE: Final = re.compile(r"CUDA initialization failure with error: (\d+)")
CUDA_REASONS: Final = {
    "35": "the driver is older than the CUDA that this TensorRT was made with",
    "100": "there is no GPU",
    "999": "the driver does not answer",
}


class Job(Record):
    """One engine to build. Paths are absolute; `inputs` holds the weights too where they are network inputs."""

    graph: str
    flavour: Flavour
    onnx: Path
    engine: Path  # where to write it
    compute_capability: str
    precision: Precision  # of the bundle
    plugins: PluginForm
    plugin_library: Path | None = None
    timing_cache: Path | None = None
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    custom_nodes: dict[str, str]  # node name -> operator
    expected: Expected | None = None  # what the layers are checked for
    there: bool = False  # `engine` was built elsewhere: it is loaded and checked, not built


class Built(Record):
    """What a build gave, beside the file."""

    tensorrt_version: str
    seconds: float
    size: int
    peak_memory_bytes: int | None
    layers: tuple[EngineLayer, ...]
    layers_from: Literal["engine", "log"]
    findings: tuple[str, ...] = ()


def failure(log: Messages, graph: str, what: str) -> BtpError:
    """The error that TensorRT's messages amount to."""
    text = " ".join(log.errors)
    if OUT_OF_MEMORY.search(text):
        return out_of_memory(graph)
    if cuda := CUDA_FAILURE.search(text):
        reason = CUDA_REASONS.get(cuda[1], "see the CUDA documentation")
        return UnavailableError(
            f"CUDA does not start: error {cuda[1]}, {reason}",
            "a GPU and a driver that suit this TensorRT",
            "nvidia-smi shows the driver; install the TensorRT of your CUDA version",
        )
    return CheckError(
        f"{graph}: TensorRT {what}: {sentence(log.errors[-1]) if log.errors else 'it does not say why'}",
        "an engine",
        "the log has more; --opset 18 exports primitives only, --plugins none takes the portable bodies",
    )


def out_of_memory(graph: str) -> UnavailableError:
    """The error for a build that memory did not suffice for."""
    return UnavailableError(
        f"{graph}: the memory did not suffice for the build",
        "more free memory; btp-export build --dry-run shows what each engine takes",
        "close other programs, --engine-weights shared, --assemble segments, or export a smaller --shape",
    )


def sentence(message: str) -> str:
    """A message of TensorRT without where in its source it comes from."""
    flat = " ".join(message.split())
    return re.sub(r"^(?:[\w:~.]+: )?(?:ERROR: )?(?:\w+\.[ch]pp:\d+ In function \w+: )?(?:\[\d+\] )?", "", flat)[:300]
