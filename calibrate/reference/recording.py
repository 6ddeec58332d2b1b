"""What verification wants to see of a reference run: in memory, or on disk if there is much of it and a work folder.

A prompt's keys and values are 650 MB for a 7B without pruning. On disk each array is a file of its own, mapped when it
is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from calibrate.reference.records import EmbeddedRecord, SegmentRecord
from graphs import names
from graphs.files.resume import KeptArray, Work

SPILL_BYTES = 2**28  # more than this is kept on disk

Kept = np.ndarray | KeptArray


@dataclass
class OpenSegment:
    """Layers [start, stop) so far; arrays by their names in `SegmentRecord`, with key_<l> and value_<l> by layer."""

    start: int
    stop: int
    query: torch.Tensor
    arrays: dict[str, Kept] = field(default_factory=dict)


@dataclass(frozen=True)
class KeptSegment:
    """A `SegmentRecord` whose arrays are read from disk each time they are asked for."""

    start: int
    stop: int
    last: int
    arrays: Mapping[str, Kept]

    @property
    def hidden_in(self) -> np.ndarray:
        return read(self.arrays["hidden_in"])

    @property
    def hidden_out(self) -> np.ndarray:
        return read(self.arrays["hidden_out"])

    @property
    def cos(self) -> np.ndarray:
        return read(self.arrays["cos"])

    @property
    def sin(self) -> np.ndarray:
        return read(self.arrays["sin"])

    @property
    def query(self) -> np.ndarray:
        return read(self.arrays["query"])

    @property
    def keys(self) -> Mapping[int, np.ndarray]:
        return _Layers(self, "key")

    @property
    def values(self) -> Mapping[int, np.ndarray]:
        return _Layers(self, "value")


@dataclass(frozen=True)
class _Layers(Mapping[int, np.ndarray]):
    segment: KeptSegment
    kind: str

    def __getitem__(self, layer: int) -> np.ndarray:
        return read(self.segment.arrays[f"{self.kind}_{layer}"])

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.segment.start, self.segment.stop))

    def __len__(self) -> int:
        return self.segment.stop - self.segment.start


class Recorder:
    """Takes down embedded sequences and segments; `work` (if any) gets the arrays."""

    def __init__(self, work: Work | None) -> None:
        self._work = work

    def embedded(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, last: int) -> EmbeddedRecord:
        """The sequence before layer 0."""
        half = cos.shape[-1] // 2
        return EmbeddedRecord(to_numpy(hidden), to_numpy(cos)[:, :half], to_numpy(sin)[:, :half], last)

    def extend(
        self, part: OpenSegment | None, run: int, layer: int, *, before: torch.Tensor, cos: torch.Tensor,
        sin: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    ) -> OpenSegment:  # fmt: skip
        """The segment with one more layer; None begins one."""
        if part is None:
            half = cos.shape[-1] // 2
            part = OpenSegment(layer, layer, query)
            part.arrays["hidden_in"] = self._keep(run, layer, "hidden_in", to_numpy(before))
            part.arrays["cos"], part.arrays["sin"] = to_numpy(cos)[:, :half], to_numpy(sin)[:, :half]
        part.query, part.stop = query, layer + 1
        for name, tensor in (("key", key), ("value", value)):
            part.arrays[f"{name}_{layer}"] = self._keep(run, layer, name, to_numpy(tensor))
        return part

    def close(self, part: OpenSegment, run: int, *, hidden: torch.Tensor, last: int) -> SegmentRecord | KeptSegment:
        """The finished segment."""
        arrays = dict(part.arrays)
        arrays["query"] = self._keep(run, part.stop, "query", to_numpy(part.query))
        arrays["hidden_out"] = self._keep(run, part.stop, "hidden_out", to_numpy(hidden))
        return make_segment(part.start, part.stop, last, arrays)

    def _keep(self, run: int, layer: int, name: str, array: np.ndarray) -> Kept:
        return array if self._work is None else self._work.keep(f"{run}-{layer}-{name}", array)


def make_segment(start: int, stop: int, last: int, arrays: dict[str, Kept]) -> SegmentRecord | KeptSegment:
    """A segment in memory if all its arrays are, else one that reads from disk."""
    plain = {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
    if len(plain) < len(arrays):
        return KeptSegment(start, stop, last, arrays)
    layers = range(start, stop)
    keys, values = ({layer: plain[name(layer)] for layer in layers} for name in (names.key, names.value))
    rest = {name: plain[name] for name in ("hidden_in", "hidden_out", "cos", "sin", "query")}
    return SegmentRecord(start=start, stop=stop, last=last, keys=keys, values=values, **rest)


def segment_arrays(segment: SegmentRecord | KeptSegment) -> dict[str, Any]:
    """The arrays by name, as `make_segment` takes them."""
    if isinstance(segment, KeptSegment):
        return dict(segment.arrays)
    arrays = {name: getattr(segment, name) for name in ("hidden_in", "hidden_out", "cos", "sin", "query")}
    arrays |= {names.key(layer): array for layer, array in segment.keys.items()}
    return arrays | {names.value(layer): array for layer, array in segment.values.items()}


def read(array: Kept) -> np.ndarray:
    """The array itself."""
    return array if isinstance(array, np.ndarray) else array.read()


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """float32 on the CPU without the batch dimension."""
    return np.asarray(tensor[0].float().cpu().numpy())
