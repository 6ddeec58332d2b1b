"""Records what flows into each graph of a run: real inputs for the profiler, so that selection sees real data.

The loader wraps another one. A graph is opened only while it runs, one at a time, so a 7B needs the memory of its
largest segment and not of the whole model; graphs that only have to be fed are not run at all.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from engines.runners.interface import Array, Bound, Buffer, Dtype, Loader, Program, Step, TensorSpec
from engines.runners.stepwise import StepwiseProgram
from graphs import dtypes
from graphs.building.graph_builder import dims, dtype_of
from graphs.files.onnx_file import read_model, refusing_graph


class RecordingLoader:
    """Writes each graph's inputs to `folder`/<graph>/<input>.bin, as raw little-endian bytes, when it is first called.

    The graph's name is the stem of its file. Graphs in `not_run` are recorded and not run: their outputs stay zeros.
    """

    def __init__(self, inner: Loader, folder: Path, *, not_run: Collection[str] = ()) -> None:
        self.inner, self.folder, self.not_run = inner, folder, frozenset(not_run)

    @property
    def device(self) -> str:
        """The inner loader's."""
        return self.inner.device

    def __call__(self, path: Path) -> "_RecordingRunner":
        return _RecordingRunner(self, path)

    def allocate(self, dtype: Dtype, shape: Sequence[int]) -> Buffer:
        return self.inner.allocate(dtype, shape)

    def program(self, steps: Sequence[Step], *, writes: Sequence[Buffer], reads: Sequence[Buffer]) -> Program:
        return StepwiseProgram(steps, writes=writes, reads=reads)


class _RecordingRunner:
    """One graph, not open yet: its tensors are read from the file's head."""

    def __init__(self, loader: RecordingLoader, path: Path) -> None:
        graph = read_model(path).graph
        self.loader, self.path = loader, path
        with refusing_graph(path):
            self.inputs = {str(value.name): _spec(value) for value in graph.inputs}
            self.outputs = {str(value.name): _spec(value) for value in graph.outputs}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        _write(self.loader.folder / self.path.stem, inputs)
        return self.loader.inner(self.path).run(inputs)

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Bound:
        return _RecordingBound(self, inputs, outputs)


class _RecordingBound:
    def __init__(self, runner: _RecordingRunner, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        self._runner, self._inputs, self._outputs = runner, dict(inputs), dict(outputs)

    def __call__(self) -> None:
        loader, path = self._runner.loader, self._runner.path
        folder = loader.folder / path.stem
        if not folder.exists():
            _write(folder, {name: buffer.read() for name, buffer in self._inputs.items()})
        if path.stem not in loader.not_run:
            loader.inner(path).bind(self._inputs, self._outputs)()


def constant_bytes(path: Path) -> int:
    """Bytes of a graph's constants, read from the file's head."""
    initializers = read_model(path).graph.initializers.values()
    return sum(value.const_value.nbytes for value in initializers if value.const_value is not None)


def _spec(value: ir.Value) -> TensorSpec:
    return TensorSpec(str(value.name), dtypes.BY_ONNX[dtype_of(value)].numpy, dims(value))


def _write(folder: Path, tensors: Mapping[str, Array]) -> None:
    folder.mkdir(parents=True)
    for name, values in tensors.items():
        np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False).tofile(folder / f"{name}.bin")
