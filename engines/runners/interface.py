"""What every backend offers: loaders open graphs and give runners; buffers are memory on the device of a loader."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

Dtype = np.dtype[Any]
Array = np.ndarray[Any, Dtype]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph. bfloat16 is ml_dtypes' dtype.

    roomy: of an output [B,K,S,D], whether its buffer may have more rows, of which the first S are written. It says how
    a runner gives the tensor, not which it is.
    """

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    roomy: bool = field(default=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


class Buffer(Protocol):
    """A tensor at an address that never changes, on the device of the loader that made it."""

    @property
    def dtype(self) -> Dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def pointer(self) -> int:
        """The address of the first byte, in the device's address space."""

    def write(self, values: Array) -> None:
        """Replace the whole tensor; `values` has the buffer's shape and is converted to its dtype."""

    def read(self) -> Array:
        """A copy in host memory."""

    def view(self, shape: Sequence[int], *, offset: int = 0) -> "Buffer":
        """A part of the same memory as a tensor of another shape, from element `offset` on."""

    def write_rows(self, rows: "Array | Buffer", starts: Sequence[int]) -> None:
        """Replace rows of the second last axis.

        With the buffer [B, ..., N, W] and rows [B, ..., n, W], sample b's rows starts[b] .. starts[b]+n-1 are
        replaced. `rows` is a host array or a buffer of the same device.
        """

    def row_writer(self, rows: "Buffer") -> Callable[[Sequence[int]], None]:
        """`write_rows` of that buffer at the starts it is called with: for copies that every token needs."""


class Bound(Protocol):
    """A graph tied to buffers: reads the input buffers, computes, writes the output buffers."""

    def __call__(self) -> None:
        """Run; returns when the results are there."""


@dataclass(frozen=True)
class Step:
    """One part of a program: a graph, and copies between buffers behind it.

    name: what the graph's time is reported under, "" for nothing. copies: always the same ones; none waits for its end.
    """

    name: str
    graph: Bound | None = None
    copies: Callable[[], None] | None = None


@dataclass(frozen=True)
class Ran:
    """Times of one run of a program in milliseconds: begin and end of each named step's graph, and the end of all.

    Where no step has a name, nothing is timed.
    """

    spans: Mapping[str, tuple[float, float]]
    end: float

    def lasted(self, name: str) -> float:
        """How long a step's graph took."""
        begin, end = self.spans[name]
        return end - begin


class Program(Protocol):
    """Work that is the same in every run: inputs are written, steps follow one another, outputs are read.

    A device may put all of it on its stream at once. The arrays are host memory at fixed addresses: fill `inputs`
    before a call; `outputs` hold that call's results until the next one.
    """

    @property
    def inputs(self) -> Sequence[Array]:
        """One array for each buffer that is written, of its shape and type."""

    @property
    def outputs(self) -> Sequence[Array]:
        """One array for each buffer that is read."""

    def __call__(self, after: Callable[[], None] | None = None) -> Ran:
        """Run; returns when the outputs are there. `after`: copies that differ from run to run, behind the rest."""


class Runner(Protocol):
    """One loaded graph."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]: ...
    @property
    def outputs(self) -> Mapping[str, TensorSpec]: ...

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute all outputs from host arrays of exactly the declared names, dtypes and shapes."""

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Bound:
        """Tie every input and output to a buffer of this runner's loader."""


class Loader(Protocol):
    """How graphs are opened: backend, device and settings."""

    @property
    def device(self) -> str: ...

    def __call__(self, path: Path) -> Runner:
        """Open one graph. Raises InputError if it is missing or damaged, UnavailableError if it cannot run here."""

    def allocate(self, dtype: Dtype, shape: Sequence[int]) -> Buffer:
        """Memory for one tensor, zeroed, aligned to 64 bytes."""

    def program(self, steps: Sequence[Step], *, writes: Sequence[Buffer], reads: Sequence[Buffer]) -> Program:
        """The steps, with buffers of this loader that are written before and read after them."""


@dataclass(frozen=True)
class Link:
    """One of several graphs that follow one another, and what flows from it to those behind.

    gives: its outputs, by the inputs that they are there. shown: those of them that somebody else wants as well.
    ends: whether what flowed before it ends here.
    """

    name: str
    path: Path
    gives: Mapping[str, str] = field(default_factory=dict)
    shown: Collection[str] = ()
    ends: bool = False

    def own(self, tensor: str) -> str:
        """What a tensor of the graph is called where graphs are joined."""
        return f"{self.name}.{tensor}"


@runtime_checkable
class JoiningLoader(Loader, Protocol):
    """A loader that can open graphs that follow one another as one."""

    def join(self, links: Sequence[Link]) -> Runner | None:
        """All of them as one graph; None where that is no faster, or where they do not fit together.

        Its inputs are what no graph of them gives, its outputs `link.own(output)` of all that does not flow on or is
        shown, and of each segment `names.TIMES`: [2] int64, nanoseconds of time.perf_counter_ns() when its layers began
        and ended.
        """
