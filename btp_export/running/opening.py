"""How the graphs or engines of a profile are opened, and in which files they are."""

from pathlib import Path
from typing import Final, Literal

from btp_export.running.memory_fit import shares_weights
from engines.runners.interface import Loader
from graphs.files.bundle import Bundle, Check
from graphs.files.cache_folder import cache_folder
from graphs.records.errors import InputError
from graphs.records.progress import Note
from graphs.records.stored_weights import Activations
from graphs.tf32 import allows_tf32

LEVELS: Final[dict[Activations, Literal[1, 4]]] = {"float32": 1, "int8": 4}  # OrtLoader's accuracy_level


def open_graphs(
    bundle: Bundle,
    profile: str,
    *,
    threads: int | None = None,
    device: str = "cpu",
    target: str | None = None,
    activations: Activations = "int8",
    cuda_graphs: bool = True,
    part: str = "",
    check: Check = "quick",
    note: Note = lambda text: None,
) -> tuple[Loader, dict[str, Path]]:
    """How the graphs of a profile are opened, and the file of each by name: the ONNX graphs, or a target's engines.

    `activations`: what ONNX Runtime multiplies four-bit weights with. `cuda_graphs`, `note`: see `load`. `part` is the
    folder of other engines inside the target's, such as the unpruned ones.
    """
    if target is None and not cuda_graphs:
        raise InputError("--no-cuda-graph without --target", wanted="both, or neither", do="leave it out")
    if target is None:
        from engines.runners.onnxruntime import OrtLoader

        files = {graph.name: bundle.root / graph.file for graph in bundle.graphs(profile)}
        tf32 = allows_tf32(bundle.manifest.build.precision)
        packed = cache_folder("onnxruntime") if shares_weights(bundle, profile, activations) else None
        if activations not in LEVELS:
            raise InputError(f"activations {activations!r}", wanted=" or ".join(LEVELS), do="leave them out")
        level = LEVELS[activations]
        return OrtLoader(device=device, threads=threads, tf32=tf32, accuracy_level=level, packed=packed), files
    from engines.targets import find_target
    from engines.tensorrt.records import engines_folder
    from engines.tensorrt.run.runner import open_engines

    if threads is not None:
        raise InputError(f"--threads {threads} with --target", wanted="one or the other", do="leave --threads out")
    folder = engines_folder(bundle, find_target(target).name) / part
    gpu = "cuda" if device in ("cpu", "auto") else device  # engines run on nothing else
    return open_engines(bundle, folder, profile=profile, device=gpu, check=check, cuda_graphs=cuda_graphs, note=note)


def activations_in(bundle: Bundle, activations: Activations, target: str | None = None) -> Activations | None:
    """What four-bit weights are multiplied with; None for a bundle without, and for engines, which round nothing."""
    return activations if bundle.manifest.quantization is not None and target is None else None
