"""Memory of keys and values: a cache and a new row for each layer of the decode graph, and what a prefill writes.

With one sample, all keys and values of a segment lie in one piece, [1, all heads, rows, D], so that one copy appends
the new rows of all its layers, and one puts those of a prefill there: on a GPU every copy is a launch of its own,
however few its bytes, and from Python each costs the more the smaller the model.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from engines.runners.interface import Buffer, Loader, TensorSpec
from graphs import names
from graphs.records.plan import Segment

ALIGNMENT = 256  # bytes: what TensorRT wants of every address


@dataclass
class LayerMemory:
    """Buffers by their names in the decode graph.

    appended: for each segment, what writes rows into its caches. pieces: its caches as one buffer, None where they lie
    apart.
    """

    caches: dict[str, Buffer] = field(default_factory=dict)
    rows: dict[str, Buffer] = field(default_factory=dict)
    appended: list[list[Callable[[Sequence[int]], None]]] = field(default_factory=list)
    pieces: list[Buffer | None] = field(default_factory=list)

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
        memory.pieces.append(joined_caches)
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


@dataclass
class Staging:
    """Where a prefill writes each layer's key and value [B,K,S_i,D], before they go into the caches' first rows.

    rows: by their names in the graphs. joined: for each segment, what puts all of them there at once, if they lie in
    one piece. single: what puts each there.
    """

    rows: dict[str, Buffer] = field(default_factory=dict)
    joined: list[Callable[[Sequence[int]], None] | None] = field(default_factory=list)
    single: dict[str, Callable[[Sequence[int]], None]] = field(default_factory=dict)

    def writers(self, segment: Segment, straight: Container[str]) -> list[Callable[[Sequence[int]], None]]:
        """What puts a segment's staged rows into its caches; those of `straight` are written there by the graph."""
        fresh = [name for layer in range(segment.start, segment.stop) for name in names.cache_rows(layer)]
        left = [name for name in fresh if name not in straight]
        joined = self.joined[segment.index]
        return [joined] if joined is not None and left == fresh else [self.single[name] for name in left]


def allocate_staging(
    loader: Loader,
    segments: Sequence[Segment],
    memory: LayerMemory,
    tokens: Sequence[int],
    *,
    whole: bool,
    alignment: int = ALIGNMENT,
) -> Staging:
    """tokens: S_i of each segment. whole: one graph gives all layers at once; else segments run one after another, and
    all of them write to the same memory. Every address is a multiple of `alignment` bytes from its beginning.
    """
    staging, offset = Staging(), 0
    first = memory.caches[names.past_key(segments[0].start)]
    batch, heads, _, size = first.shape
    shapes = [(batch, heads, count, size) for count in tokens]
    unit = max(1, alignment // first.dtype.itemsize)
    steps = [-(-prod(shape) // unit) * unit for shape in shapes]
    totals = [2 * (s.stop - s.start) * step for s, step in zip(segments, steps, strict=True)]
    flat = loader.allocate(first.dtype, (sum(totals) if whole else max(totals),))
    for segment, shape, step, total in zip(segments, shapes, steps, totals, strict=True):
        fresh = [name for layer in range(segment.start, segment.stop) for name in names.cache_rows(layer)]
        views = {name: flat.view(shape, offset=offset + place * step) for place, name in enumerate(fresh)}
        staging.rows |= views
        staging.single |= {name: memory.caches[names.past(name)].row_writer(view) for name, view in views.items()}
        piece, joined = memory.pieces[segment.index], None
        if piece is not None and step == prod(shape):
            joined = piece.row_writer(flat.view((1, len(views) * heads, *shape[2:]), offset=offset))
        staging.joined.append(joined)
        offset += total if whole else 0
    return staging
