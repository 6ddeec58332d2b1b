"""What every runner does with names, types and shapes, whatever computes."""

from collections.abc import Mapping, Sequence

from engines.runners.interface import Array, Dtype, TensorSpec
from graphs.records.errors import InputError


def check_names(graph: str, given: Mapping[str, object], wanted: Mapping[str, TensorSpec]) -> None:
    """Raise InputError unless exactly the graph's own tensors are given."""
    differences = [("missing", wanted.keys() - given.keys()), ("unknown", given.keys() - wanted.keys())]
    if any(names for _, names in differences):
        raise InputError(
            f"{graph}: " + "; ".join(f"{word} {', '.join(sorted(names))}" for word, names in differences if names),
            wanted=f"exactly {', '.join(wanted)}",
            do="give each tensor under the graph's own name",
        )


def check_tensor(graph: str, spec: TensorSpec, dtype: Dtype, shape: Sequence[int]) -> None:
    """Raise InputError unless a tensor has the declared type and shape."""
    if dtype != spec.dtype or tuple(shape) != spec.shape:
        raise InputError(
            f"{graph}: {spec.name} is {dtype} {list(shape)}",
            wanted=f"{spec.dtype} {list(spec.shape)}",
            do="convert it",
        )


def written(spec: TensorSpec, shape: Sequence[int]) -> Sequence[int]:
    """The shape of what is written into a buffer of a shape: fewer rows where the tensor lets it have more."""
    fits = spec.roomy and len(shape) == len(spec.shape) and shape[2] >= spec.shape[2]
    return (*shape[:2], spec.shape[2], *shape[3:]) if fits else shape


def check_arrays(graph: str, given: Mapping[str, Array], wanted: Mapping[str, TensorSpec]) -> None:
    """Raise InputError unless `given` are host arrays of exactly the declared names, types and shapes."""
    check_names(graph, given, wanted)
    for name, value in given.items():
        check_tensor(graph, wanted[name], value.dtype, value.shape)
