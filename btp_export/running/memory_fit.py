"""Which bundles this machine's memory holds whole, and which have to be opened one part of a graph at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from engines.runners.session_options import LARGE
from graphs import dtypes, names
from graphs.files.atomic import size_text
from graphs.files.bundle import Bundle
from graphs.files.memory import LIBRARIES, PART_BYTES, available_memory
from graphs.files.onnx_wire import GraphFile
from graphs.files.resume import INTERVAL
from graphs.records.errors import InputError
from graphs.records.stored_weights import Activations

STREAM_ABOVE = 3 * 2**30  # bytes of weights in float32 over which graphs are opened part by part


@dataclass(frozen=True)
class Streaming:
    """When graphs are opened part by part (over `above` bytes of weights in float32), and how.

    `part_bytes` of weights are open at a time, a layer at least; `interval` are the seconds between checkpoints.
    """

    above: int = STREAM_ABOVE
    part_bytes: int = PART_BYTES
    interval: float = INTERVAL


def open_bytes(files: Mapping[str, Path], *, models: int = 1, shared: bool = False) -> int:
    """Weights of all graphs of so many models together, floats in float32, in which ONNX Runtime computes on a CPU.

    The models have one vision graph. shared: large matrices are mapped from files that all sessions share, and count
    once.
    """
    total, once = 0, dict[str, int]()
    for name, path in files.items():
        graph = GraphFile(path)
        matrices = graph.matrices(LARGE) if shared else {}
        total += (1 if name == names.VISION else models) * (graph.wide_weights() - sum(matrices.values()))
        once |= matrices
    return total + sum(once.values())


def must_stream(files: Mapping[str, Path], device: str, *, above: int = STREAM_ABOVE) -> bool:
    """Whether the graphs are too large to be open together, or of a type that this device has no kernels for."""
    bfloat16 = dtypes.BY_NAME["bfloat16"].onnx
    return open_bytes(files) > above or (device == "cpu" and GraphFile(files[names.DECODE]).has(bfloat16))


def too_large(
    bundle: Bundle, profile: str | None = None, *, models: int = 1, activations: Activations = "int8"
) -> str | None:
    """Why the bundle cannot be run as a whole on the CPU of this machine, None if it can.

    `models` are how many of its size are open at a time (another plan's graphs take about as much).
    """
    files = {graph.name: bundle.root / graph.file for graph in bundle.graphs(profile)}
    shared = shares_weights(bundle, bundle.profile(profile).name, activations)
    needed, there = open_bytes(files, models=models, shared=shared) + LIBRARIES, available_memory()
    if there is None or needed <= max(there, STREAM_ABOVE):
        return None
    return (
        f"{bundle.spec.name} in float32, as ONNX Runtime computes on the CPU, needs about {size_text(needed)} of "
        f"memory, {size_text(there)} are available"
    )


def shares_weights(bundle: Bundle, profile: str, activations: Activations) -> bool:
    """Whether sessions share weights through files: that costs disk, and float32 rows are for checking part by part.

    Of bundles with full weights only large ones do, those that cannot be checked as a whole.
    """
    if activations != "int8" or find_spec("onnx") is None:
        return False
    files = {graph.name: bundle.root / graph.file for graph in bundle.graphs(profile)}
    return bundle.manifest.quantization is not None or open_bytes(files) > STREAM_ABOVE


def check_fits_memory(
    bundle: Bundle, profile: str | None, device: str, *, models: int = 1, activations: Activations = "int8"
) -> None:
    """Raise InputError if the graphs are to be open together on the CPU and memory does not hold them."""
    from engines.runners.onnxruntime import onnxruntime_device

    if onnxruntime_device(device) == "cpu" and (
        reason := too_large(bundle, profile, models=models, activations=activations)
    ):
        raise InputError(
            reason,
            wanted="enough memory for all graphs at once",
            do="--device cuda, or a machine with more memory; btp-export verify needs only one layer at a time",
        )


def streaming_bytes(bundle: Bundle, profile: str, samples: int) -> int:
    """About how much memory verifying with one layer at a time takes: a layer twice, and what flows."""
    spec, shape = bundle.spec.decoder, bundle.profile(profile)
    layer, head = 4 * spec.layer_elements, 4 * spec.head_elements
    caches = 2 * 4 * spec.head_dim * spec.num_kv_heads * sum(
        shape.capacity_with(tokens) for tokens in bundle.plan_for(profile).tokens_per_layer()
    )  # fmt: skip
    rows = 4 * shape.total_tokens * (4 * spec.hidden_size + 3 * spec.intermediate_size)
    return LIBRARIES + max(layer + layer // 2, head + head // 2) + samples * caches + shape.batch * rows
