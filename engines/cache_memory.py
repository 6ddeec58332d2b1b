"""Memory of the decode graph's keys and values: a cache and a new row for each layer.

With one sample, all keys and values of a segment lie in one piece, [1, all heads, rows, D], so that one copy appends
the new rows of all its layers: on a GPU every copy is a launch of its own, however few its bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from engines.runners.interface import Buffer, Loader, TensorSpec
from graphs import names
from graphs.records.plan import Segment

ALIGNMENT = 256  # bytes: what TensorRT wants of every address


@dataclass
class LayerMemory:
    """Buffers by their names in the decode graph; `appended`: for each segment, what writes rows into its caches."""

    caches: dict[str, Buffer] = field(default_factory=dict)
    rows: dict[str, Buffer] = field(default_factory=dict)
    appended: list[list[Callable[[Sequence[int]], None]]] = field(default_factory=list)

    def append(self, segment: int, starts: Sequence[int]) -> None:
        """Write the new rows of a segment's layers into their caches, sample b's at row starts[b]."""
        for write in self.appended[segment]:
            write(starts)


def allocate_layers(
    loader: Loader,
    segments: Sequence[Segment],
    inputs: Mapping[str, TensorSpec],
    outputs: Mapping[str, TensorSpec],
    *,
    alignment: int = ALIGNMENT,
) -> LayerMemory:
    """Memory for the layers' `past_*` inputs and the `key_*` and `value_*` outputs of a decode graph.

    Every address is a multiple of `alignment` bytes.
    """
    memory = LayerMemory()
    for segment in segments:
        layers = range(segment.start, segment.stop)
        fresh = [name for layer in layers for name in names.cache_rows(layer)]
        caches, joined_caches = _allocate(loader, [inputs[names.past(name)] for name in fresh], alignment)
        rows, joined_rows = _allocate(loader, [outputs[name] for name in fresh], alignment)
        memory.caches |= {names.past(name): cache for name, cache in zip(fresh, caches, strict=True)}
        memory.rows |= dict(zip(fresh, rows, strict=True))
        if joined_caches is not None and joined_rows is not None:
            memory.appended.append([joined_caches.row_writer(joined_rows)])
        else:
            memory.appended.append([cache.row_writer(row) for cache, row in zip(caches, rows, strict=True)])
    return memory


def _allocate(loader: Loader, specs: Sequence[TensorSpec], alignment: int) -> tuple[list[Buffer], Buffer | None]:
    """Buffers for tensors [B,K,N,D], and the one piece [1, all K, N, D] they are parts of if they can be.

    They can where there is one sample, their shapes are the same, and each stays aligned.
    """
    first = specs[0]
    batch, heads, count, size = first.shape
    alike = all((spec.shape, spec.dtype) == (first.shape, first.dtype) for spec in specs)
    if batch != 1 or not alike or first.nbytes % alignment:
        return [loader.allocate(spec.dtype, spec.shape) for spec in specs], None
    whole = loader.allocate(first.dtype, (1, len(specs) * heads, count, size))
    step = heads * count * size
    return [whole.view(first.shape, offset=place * step) for place in range(len(specs))], whole
