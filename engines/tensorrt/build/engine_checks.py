"""What a built engine is checked for: its file, its inputs and outputs, and one plugin layer for each custom node."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from graphs.records.errors import CheckError
from graphs.records.manifest import TensorRecord

AGAIN = "btp-export build BUNDLE --target T --force"


def require_tensors(what: str, wanted: Sequence[TensorRecord], got: Sequence[TensorRecord]) -> None:
    """Raise CheckError unless there are the same tensors by name, type and shape; their order does not matter."""
    ours = {tensor.name: tensor for tensor in wanted}
    theirs = {tensor.name: tensor for tensor in got}
    for name in ours.keys() - theirs.keys():
        raise CheckError(f"{what}: {name} is missing", _described(ours[name]), AGAIN)
    for name in theirs.keys() - ours.keys():
        raise CheckError(f"{what}: {_described(theirs[name])} is there", f"only {', '.join(sorted(ours))}", AGAIN)
    for name, tensor in ours.items():
        if theirs[name] != tensor:
            raise CheckError(f"{what}: {_described(theirs[name])}", _described(tensor), AGAIN)


def require_plugins(graph: str, layers: Sequence[str], nodes: Mapping[str, str]) -> None:
    """Raise CheckError unless there is one plugin layer for each custom node (node name -> operator)."""
    wanted, got = Counter(nodes.values()), Counter(layers)
    if wanted != got:
        raise CheckError(
            f"{graph}: plugin layers in TensorRT: {_counts(got)}",
            f"one for each custom node: {_counts(wanted)}",
            "--plugins none builds from the portable bodies; btp-export build --dry-run shows what suits this version",
        )


def custom_layer(layer: str, nodes: Mapping[str, str]) -> str | None:
    """The operator of the custom node that a layer was made of; compilers put something behind a node's name."""
    names = [name for name in nodes if layer == name or layer.startswith((f"{name}_", f"{name} "))]
    return nodes[max(names, key=len)] if names else None


def require_file(path: Path, size: int) -> None:
    """Raise CheckError unless the engine file has its size: builds have reported success and written nothing."""
    if not path.is_file():
        raise CheckError(f"{path.name} is not there after the build", f"a file of {size} bytes", AGAIN)
    if path.stat().st_size != size or size == 0:
        raise CheckError(f"{path.name} has {path.stat().st_size} bytes", f"{size} as the build said", AGAIN)


def _described(tensor: TensorRecord) -> str:
    return f"{tensor.name} {tensor.dtype} {list(tensor.shape)}"


def _counts(operators: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(operators.items())) or "none"
