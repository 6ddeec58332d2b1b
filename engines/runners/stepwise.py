"""A program whose steps run one after another, each to its end, for backends that offer no stream of their own."""

import time
from collections.abc import Callable, Sequence

import numpy as np

from engines.runners.host import HostBuffer
from engines.runners.interface import Array, Buffer, Ran, Step


class StepwiseProgram:
    """See `Program`. The arrays of buffers in host memory are the buffers themselves, so nothing is copied."""

    def __init__(self, steps: Sequence[Step], *, writes: Sequence[Buffer], reads: Sequence[Buffer]) -> None:
        self._steps = steps
        self.inputs = [_array(buffer) for buffer in writes]
        self.outputs = [_array(buffer) for buffer in reads]
        self._writes = _elsewhere(writes, self.inputs)
        self._reads = _elsewhere(reads, self.outputs)

    def __call__(self, after: Callable[[], None] | None = None) -> Ran:
        begin = time.perf_counter()
        for buffer, array in self._writes:
            buffer.write(array)
        spans = {}
        for step in self._steps:
            if step.graph is not None:
                start = _since(begin)
                step.graph()
                if step.name:
                    spans[step.name] = start, _since(begin)
            if step.copies is not None:
                step.copies()
        for buffer, array in self._reads:
            array[...] = buffer.read()
        if after is not None:
            after()
        return Ran(spans, _since(begin))


def _array(buffer: Buffer) -> Array:
    """Host memory for a buffer's tensor: its own if it lies there."""
    return buffer.array if isinstance(buffer, HostBuffer) else np.zeros(buffer.shape, buffer.dtype)


def _elsewhere(buffers: Sequence[Buffer], arrays: Sequence[Array]) -> list[tuple[Buffer, Array]]:
    """Those that do not lie in host memory, with their arrays there."""
    pairs = zip(buffers, arrays, strict=True)
    return [(buffer, array) for buffer, array in pairs if not isinstance(buffer, HostBuffer)]


def _since(begin: float) -> float:
    return (time.perf_counter() - begin) * 1000.0
