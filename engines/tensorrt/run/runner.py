"""TensorRT engines: opened by their record, over device buffers that are bound once.

All engines of a process and a GPU share one `Session`: runtime, stream, the memory they compute in (they run one after
another, so the largest need is enough), plugins, and, where weights are network inputs, one device copy of each matrix.
Buffers are bound by address and never reallocated, so the caches are never copied, and a prefill or a decode step is
replayed as a CUDA graph from its second run on (program.py).

TensorRT for RTX has the same classes and is served by the same code.

Not yet run on a GPU: written after the Python API of TensorRT 10.3 to 11.1 and of TensorRT for RTX 1.7, and tested
against a stand-in that computes with ONNX Runtime in the order of a stream.
"""

import mmap
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from engines.runners import cuda
from engines.runners.binding import check_arrays, check_names, check_tensor
from engines.runners.interface import Array, Buffer, Dtype, Program, Step, TensorSpec
from engines.tensorrt.records import SCRIPTED_SUFFIX, BuiltEngine, EngineGraph, EnginesRecord, bundle_digest
from engines.tensorrt.run import session
from engines.tensorrt.run.bound import Context, TrtBound
from engines.tensorrt.run.program import TrtProgram
from engines.tensorrt.run.session import build_again, explain
from graphs import dtypes
from graphs.files.atomic import SMALL_FILE, sha256
from graphs.files.bundle import Bundle, Check
from graphs.files.page_cache import release
from graphs.records.errors import InputError
from graphs.records.manifest import TensorRecord
from graphs.records.progress import Note


def open_engines(
    bundle: Bundle,
    folder: Path,
    *,
    profile: str,
    device: str = "cuda",
    check: Check = "quick",
    cuda_graphs: bool = True,
    note: Note = lambda text: None,
) -> tuple["TrtLoader", dict[str, Path]]:
    """A loader for the engines in `folder`, and the engine file of each graph of a profile, in running order.

    `cuda_graphs`: whether sequences of engines are replayed as CUDA graphs; `note` is told where that cannot be.

    What the records can tell is checked first, then the GPU, then TensorRT; nothing is deserialised here. Raises
    InputError for engines that are missing, damaged or of another bundle, UnavailableError for a GPU, TensorRT or
    plugin library that is not there or not the one they were built for.
    """
    record = EnginesRecord.load(folder)
    if record.bundle_sha256 != bundle_digest(bundle):
        raise InputError(
            f"the engines in {folder} were made from another export of this bundle",
            wanted="engines of the bundle as it is now",
            do=build_again(record),
        )
    graphs = {graph.name: graph for graph in record.graphs if graph.profile == profile}
    if not graphs:
        names = ", ".join(dict.fromkeys(graph.profile for graph in record.graphs))
        raise InputError(
            f"there are no engines for profile {profile} in {folder}", wanted=names, do=build_again(record)
        )
    files = {name: folder / _check_engine(folder, record, graph, check).file for name, graph in graphs.items()}
    loader = TrtLoader(folder, record, device=device, cuda_graphs=cuda_graphs, note=note)
    loader.session.require_room(folder, list(graphs.values()))
    loader.session.weights.reserve(folder, graphs.values())
    return loader, files


def _check_engine(folder: Path, record: EnginesRecord, graph: EngineGraph, check: Check) -> BuiltEngine:
    """The engine's own record, if its file is the one that was built from the prepared graph."""
    engine = graph.engine
    if engine is None:
        scripted = next(folder.glob(f"{Path(graph.onnx.file).stem}.engine{SCRIPTED_SUFFIX}"), None)
        what = "no engine was built of it" if scripted is None else "its engine by build.sh is not taken over yet"
        raise InputError(
            f"graph {graph.name} in {folder} is prepared but {what}",
            wanted="engines built on the device that runs them",
            do=build_again(record),
        )
    path = folder / engine.file
    size = path.stat().st_size if path.is_file() else -1
    if size != engine.size:
        got = "is missing" if size < 0 else f"has {size} bytes"
        raise InputError(
            f"{path} {got}", wanted=f"the engine as it was built, {engine.size} bytes", do=build_again(record)
        )
    if engine.graph_sha256 != graph.onnx.sha256:
        raise InputError(f"{path} was built from another graph", wanted=f"{graph.onnx.file}", do=build_again(record))
    if (check == "full" or size <= SMALL_FILE) and sha256(path) != engine.sha256:
        raise InputError(f"{path} was changed or is damaged", wanted=f"sha256 {engine.sha256}", do=build_again(record))
    return engine


class TrtLoader:
    """Opens the engines of one folder engines/<target>/. `path`s are those that `open_engines` gives."""

    def __init__(
        self,
        folder: Path,
        record: EnginesRecord,
        *,
        device: str = "cuda",
        cuda_graphs: bool = True,
        note: Note = lambda text: None,
    ) -> None:
        self.folder, self.record = folder, record
        self._cuda_graphs, self._note = cuda_graphs, note
        number = _device_number(device)
        self.device = f"cuda:{number}"
        self.session = session.PROCESS.session(record.flavour, number)
        self.session.require(folder, record)
        self._graphs = {graph.engine.file: graph for graph in record.graphs if graph.engine is not None}

    def __call__(self, path: Path) -> "TrtRunner":
        graph = self._graphs.get(path.name)
        if graph is None or not path.is_file():
            raise InputError(f"no engine {path}", wanted="engines as they were built", do=build_again(self.record))
        shared = self.session
        cuda.use_device(shared.device)
        weights = shared.weights.bind(self.folder, graph)
        shared.log.clear()
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            engine = shared.runtime.deserialize_cuda_engine(data)
            if cuda.shares_memory(shared.device):
                release(file.fileno())  # baked weights are on the device by now
        if engine is None:
            raise explain(shared.log.errors, path, "open", self.record)
        return TrtRunner(engine, path, graph, weights, self)

    def allocate(self, dtype: Dtype, shape: Sequence[int]) -> Buffer:
        return self.session.allocate(dtype, shape)

    def program(self, steps: Sequence[Step], *, writes: Sequence[Buffer], reads: Sequence[Buffer]) -> Program:
        return TrtProgram(self.session, steps, writes=writes, reads=reads, replay=self._cuda_graphs, note=self._note)

    def memory(self) -> dict[str, int]:
        """Bytes on the device by use, without inputs, outputs and caches. Engine files hold the baked weights."""
        baked = sum(graph.engine.size for graph in self._graphs.values() if graph.engine is not None)
        return {
            "shared_weight_bytes": self.session.weights.nbytes,
            "engine_file_bytes": baked,
            "scratch_bytes": self.session.scratch.size,
        }


class TrtRunner:
    """One deserialised engine. Weight inputs are bound already and not shown."""

    def __init__(
        self, engine: Any, path: Path, graph: EngineGraph, weights: Mapping[str, Buffer], loader: TrtLoader
    ) -> None:
        self.path, self.graph = path, graph
        self.inputs = {record.name: _spec(record) for record in graph.inputs}
        self.outputs = {record.name: _spec(record) for record in graph.outputs}
        self._weights = dict(weights)
        self._session = loader.session
        matrices = {name: TensorSpec(name, buffer.dtype, buffer.shape) for name, buffer in weights.items()}
        problem = _difference(loader.session.trt, engine, self.inputs | matrices, self.outputs)
        if problem:
            wanted = "the inputs and outputs in engines.json"
            raise InputError(f"{path}: {problem}", wanted=wanted, do=build_again(loader.record))
        self._context = Context(engine, path, loader.record, loader.session)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        check_arrays(self.path.name, inputs, self.inputs)
        buffers, bound = self._own
        for name, value in inputs.items():
            buffers[name].write(value)
        bound()
        return {name: buffers[name].read() for name in self.outputs}

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> "TrtBound":
        check_names(self.path.name, inputs, self.inputs)
        check_names(self.path.name, outputs, self.outputs)
        for name, spec in (self.inputs | self.outputs).items():
            buffer = inputs[name] if name in self.inputs else outputs[name]
            check_tensor(self.path.name, spec, buffer.dtype, buffer.shape)
            if buffer.pointer % cuda.ALIGNMENT:
                raise ValueError(f"{self.path.name}: {name} is not aligned to {cuda.ALIGNMENT} bytes")
        buffers = {**inputs, **outputs, **self._weights}
        return TrtBound(self.graph.name, self._context, buffers)

    @cached_property
    def _own(self) -> "tuple[dict[str, Buffer], TrtBound]":
        """Buffers of `run`, kept from call to call."""
        specs = self.inputs | self.outputs
        buffers = {name: self._session.allocate(spec.dtype, spec.shape) for name, spec in specs.items()}
        inputs, outputs = ({name: buffers[name] for name in part} for part in (self.inputs, self.outputs))
        return buffers, self.bind(inputs, outputs)


def _spec(record: TensorRecord) -> TensorSpec:
    return TensorSpec(record.name, dtypes.numpy_of(record.dtype), record.shape)


def _difference(
    trt: Any, engine: Any, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]
) -> str | None:
    """How the engine's tensors differ from those wanted, on the device and of static shape; None if they do not."""
    tensors: dict[Any, dict[str, TensorSpec]] = {trt.TensorIOMode.INPUT: {}, trt.TensorIOMode.OUTPUT: {}}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = engine.get_tensor_dtype(name).name
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            return f"{name} is in host memory"
        if kind not in dtypes.BY_TENSORRT:
            return f"{name} is {kind}"
        spec = TensorSpec(name, dtypes.BY_TENSORRT[kind].numpy, tuple(engine.get_tensor_shape(name)))
        tensors[engine.get_tensor_mode(name)][name] = spec
    for word, there, wanted in zip(("input", "output"), tensors.values(), (inputs, outputs), strict=True):
        for name in sorted(there.keys() ^ wanted.keys()):
            return f"it has {'an' if name in there else 'no'} {word} {name}"
        for name, spec in wanted.items():
            if there[name] != spec:
                return f"{word} {name} is {there[name].dtype} {list(there[name].shape)}"
    return None


def _device_number(device: str) -> int:
    kind, colon, number = device.partition(":")
    if kind != "cuda" or (colon and not number.isdigit()):
        raise InputError(f"device {device!r} for engines", wanted="cuda or cuda:<number>", do="leave --device out")
    return int(number or 0)
