"""Running graphs that are larger than memory: a part of a graph is open at a time, and all samples go through it.

`StreamedRunner` is a runner for one graph, cut by graphs/building/graph_parts.py; engines/verify/streamed_chain.py
runs all graphs of a profile with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import onnx

from engines.runners.interface import Runner, TensorSpec
from engines.verify.protocol import Array
from graphs import dtypes
from graphs.building.graph_parts import Part, has_bfloat16, split, wide_weights, widen
from graphs.files.memory import PART_BYTES
from graphs.files.onnx_file import read_graph, refusing_graph
from graphs.records.errors import InputError
from graphs.records.progress import Report

STREAMED_TYPES = ("float32", "float16", "int32")  # what the parts of a graph compute in on a CPU

Seen = Callable[[int, Mapping[str, Array]], None]
Feeds = Sequence[Mapping[str, Array]]


class ModelOpener(Protocol):
    """A loader that opens graphs from memory too."""

    def open_model(self, content: bytes, path: Path) -> Runner:
        """Open a graph whose weights lie where those of the graph at `path` do."""


def run_each(runner: Runner, feeds: Feeds, see: Seen) -> None:
    """Run a graph on every feed; `see(number, outputs)` gets all outputs, perhaps in several parts, in graph order."""
    if isinstance(runner, StreamedRunner):
        runner.run_each(feeds, see)
        return
    for number, feed in enumerate(feeds):
        see(number, runner.run(feed))


class Shares:
    """Progress over several graphs, each with a share by its weights."""

    def __init__(self, files: Sequence[Path], progress: Report | None) -> None:
        self._sizes = [wide_weights(read_graph(path)) + 2**20 for path in files]  # selections have no weights
        self._progress = progress

    def of(self, number: int) -> Report:
        """A progress function for one of them."""
        before, size, everything = sum(self._sizes[:number]), self._sizes[number], sum(self._sizes)

        def report(done: int, total: int, text: str = "") -> None:
            if self._progress is not None:
                self._progress(before + size * done // total, everything, text)

        return report


class StreamedRunner:
    """One graph, opened part by part. bfloat16 graphs compute in float32 (see graphs/building/graph_parts.py)."""

    def __init__(self, path: Path, loader: ModelOpener, *, most: int = PART_BYTES, progress: Report | None = None):
        if not path.is_file():
            raise InputError(f"no graph {path}", wanted="a complete bundle", do="export it again")
        model = read_graph(path)
        with refusing_graph(path):
            if has_bfloat16(model):
                model = widen(model)
            self.inputs = {value.name: _spec(value, path) for value in model.graph.input}
            self.outputs = {value.name: _spec(value, path) for value in model.graph.output}
            self._parts: list[Part] = split(model, most)
        self._path, self._loader, self._progress = path, loader, progress

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs of one set of inputs."""
        outputs: dict[str, Array] = {}
        self.run_each([inputs], lambda _, part: outputs.update(part))
        return outputs

    def bind(self, inputs: Any, outputs: Any) -> Any:
        """Not for loops: parts are opened for every run."""
        raise NotImplementedError("a streamed graph is run, not bound")

    def run_each(self, feeds: Feeds, see: Seen) -> None:
        """Every feed through the first part, then every feed through the next, and so on."""
        carried: list[dict[str, Array]] = [{} for _ in feeds]
        steps = len(self._parts) * len(feeds)
        for number, part in enumerate(self._parts):
            runner = self._loader.open_model(part.model.SerializeToString(), self._path)
            later = {name for rest in self._parts[number + 1 :] for name in rest.inputs}
            for place, feed in enumerate(feeds):
                held = carried[place]
                inputs = {name: held[name] if name in held else feed[name] for name in part.inputs}
                outputs = runner.run(inputs)
                see(place, {name: value for name, value in outputs.items() if name in self.outputs})
                carried[place] = {name: value for name, value in (held | outputs).items() if name in later}
                if self._progress is not None:
                    self._progress(number * len(feeds) + place + 1, steps, self._path.stem)
            del runner  # before the next part is opened: two of them would take twice the memory


def _spec(value: onnx.ValueInfoProto, path: Path) -> TensorSpec:
    kind = value.type.tensor_type
    element = dtypes.BY_ONNX.get(kind.elem_type)
    static = all(dim.HasField("dim_value") for dim in kind.shape.dim)
    if element is None or element.name not in STREAMED_TYPES or not static:
        raise InputError(
            f"{path.name}: {value.name} has no static shape or a type that is not float32, float16 or int32",
            wanted="graphs as exported",
            do="export the bundle again",
        )
    return TensorSpec(value.name, element.numpy, tuple(dim.dim_value for dim in kind.shape.dim))
