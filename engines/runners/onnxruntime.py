"""ONNX Runtime: graphs on the CPU or on CUDA, with buffers bound by address so that a loop copies nothing.

Every tensor goes in and out through an IOBinding by pointer and ONNX element type. That is one way for all dtypes
(numpy has no bfloat16) and for both devices, and a bound tensor is never copied by the runtime.
"""

import os
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

# Recent builds report their use to their makers, and warn where they find no home folder for the machine's number.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from engines.native import libraries
from engines.runners.binding import check_arrays, check_names, check_tensor, written
from engines.runners.host import HostBuffer
from engines.runners.interface import Array, Bound, Buffer, Dtype, Link, Program, Runner, Step, TensorSpec
from engines.runners.session_options import FOLDER_OPTION
from engines.runners.stepwise import StepwiseProgram
from graphs import dtypes, ops
from graphs.files.memory import total_memory
from graphs.files.onnx_file import graph_bytes, parse_graph, refusing_graph
from graphs.records.errors import BtpError, CheckError, InputError, UnavailableError

if TYPE_CHECKING:
    import onnx

    from engines.runners.on_cpu import Native, Replaced
    from engines.runners.packed_files import PackedFiles

ORT_ERRORS: tuple[type[Exception], ...] = tuple(
    value for value in vars(ort_errors).values() if isinstance(value, type) and issubclass(value, Exception)
)
RUN_ERRORS: tuple[type[Exception], ...] = (
    *ORT_ERRORS,
    RuntimeError,
)  # with a binding, a failing kernel is reported as a plain RuntimeError
# ONNX Runtime gives names on to Python as they are, UTF-8 or not, and its own errors not always types of their own.
OPEN_ERRORS: tuple[type[Exception], ...] = (*RUN_ERRORS, ValueError, TypeError, OverflowError)

INT8_LEVEL = 4  # the accuracy level at which rows are rounded
ASKED = re.compile(r"allocate memory for requested buffer of size (\d+)")


class OrtLoader:
    """Opens graphs in ONNX Runtime.

    Args:
        device: "cpu", "cuda" or "cuda:<number>".
        threads: threads inside an operator; None lets ONNX Runtime take one for each core.
        custom_ops: shared library with kernels of the `btp` operators; "found" takes the one that was built
            (engines.native.libraries), if there is one. With None the graphs' own function bodies run.
        prepack: False keeps float32 weights mapped from their file instead of copying them into a kernel's own layout:
            slower, but a model larger than memory runs.
        accuracy_level: how ONNX Runtime multiplies with four-bit weights: 1 with x in float32, to verify with; 4 with x
            rounded to int8, several times as fast.
        packed: folder for weights that sessions on the CPU share (engines/runners/packed_files.py); None lets each
            session pack its own.
        tf32: whether CUDA may compute float32 products in TF32 (graphs/tf32.py says when).
        joins: False lets graphs that follow one another be opened one by one, also where one is faster.
        log_severity: what ONNX Runtime itself writes on standard error: 0 everything, 2 warnings, 3 errors, 4 nothing
            that it does not also raise.

    Raises InputError for an unknown device or a missing library, UnavailableError if the device cannot be used.
    """

    def __init__(
        self,
        *,
        device: str = "cpu",
        threads: int | None = None,
        custom_ops: Path | Literal["found"] | None = "found",
        prepack: bool = True,
        accuracy_level: Literal[1, 4] = 1,
        tf32: bool = False,
        packed: Path | None = None,
        joins: bool = True,
        log_severity: int = 4,
    ) -> None:
        self.device = onnxruntime_device(device)
        self._kind, self._number = _parse_device(self.device)
        if threads is not None and threads < 1:
            raise InputError(f"{threads} threads", wanted="1 or more", do="leave threads out to use every core")
        if custom_ops == "found":
            custom_ops = libraries.custom_ops()
        if custom_ops is not None and not custom_ops.is_file():
            raise InputError(f"no file {custom_ops}", wanted="the library with the custom operators", do="build it")
        if self._kind == "cuda":
            _require_cuda()
            if custom_ops is not None:
                _require_code_for_gpu(custom_ops, self._number)
        self.custom_ops = custom_ops
        self.accuracy_level = accuracy_level
        self._multiplies = self._kind == "cpu" and custom_ops is not None and libraries.multiplies(custom_ops)
        self._packed = None if packed is None or self._kind != "cpu" else _packed_files(packed)
        self.tf32, self._joins = tf32, joins
        self._settings = (threads or 0, custom_ops, prepack, log_severity)

    def __call__(self, path: Path) -> "OrtRunner":
        if not path.is_file():
            raise InputError(f"no graph {path}", wanted="a complete bundle", do="export it again")
        content = graph_bytes(path)
        if self._packed is not None or ops.wants_onnxruntime_nodes(content) or self._takes_faster_nodes(content):
            return self.open_model(content, path)
        return self._open(str(path), path, self._options())

    def open_model(self, content: bytes, path: Path) -> "OrtRunner":
        """Open a graph from memory; its weights lie where those of the graph at `path` do. Raises as for a file."""
        options = self._options()
        own_nodes, faster = self._takes_own_nodes(content), self._takes_faster_nodes(content)
        if self._packed is None and not own_nodes and not faster:
            options.add_session_config_entry(FOLDER_OPTION, str(path.parent))
            return self._open(content, path, options)
        model = parse_graph(content, path)
        replaced: Replaced | None = None
        with refusing_graph(path):
            if faster:
                replaced = _on_cpu().for_cpu(model, self._native)
            if own_nodes:
                ops.for_onnxruntime(model, accuracy_level=self.accuracy_level)
        if self._packed is not None:
            kept = self._packed.share(model, path, options)
        else:
            kept = self._weights(model, path.parent, options)
        runner = self._open(model.SerializeToString(), path, options, replaced)
        runner.weights = kept
        return runner

    def join(self, links: Sequence[Link]) -> Runner | None:
        """See `JoiningLoader`: on a CPU, where all segments are decoder layers as one operator of btp_ort each."""
        may = self._joins and self._multiplies and self._packed is None and find_spec("onnx") is not None
        there = may and all(link.path.is_file() for link in links)
        found = _on_cpu().joined(links, self._native) if there else None
        if found is None:
            return None
        model, replaced = found
        options = self._options()
        kept = self._weights(model, links[0].path.parent, options)
        runner = self._open(model.SerializeToString(), links[0].path.with_name("prefill"), options, replaced)
        runner.weights = kept
        return runner

    def _weights(self, model: "onnx.ModelProto", folder: Path, options: ort.SessionOptions) -> list[Any]:
        """Let a session on the CPU read the weights where other sessions have them mapped; a GPU takes a copy."""
        if self._kind != "cpu":
            options.add_session_config_entry(FOLDER_OPTION, str(folder))
            return []
        from engines.runners.mapped_weights import share_weights

        return share_weights(model, folder, options)

    def _takes_own_nodes(self, content: bytes) -> bool:
        """Whether nodes are put in that ONNX Runtime has itself; on CUDA our library's come first."""
        return ops.wants_onnxruntime_nodes(content) and (self._kind == "cpu" or self.custom_ops is None)

    def _takes_faster_nodes(self, content: bytes) -> bool:
        """Whether nodes are put in that are faster on a CPU; without onnx graphs are taken as they are."""
        there = self._kind == "cpu" and find_spec("onnx") is not None
        return there and _on_cpu().may_have(content, self._native)

    @property
    def _native(self) -> "Native":
        """What btp_ort does in this loader's sessions."""
        return _on_cpu().Native(  # type: ignore[no-any-return]
            selections=self.custom_ops is not None,
            halves=self._multiplies,
            int8=self._multiplies and self.accuracy_level == INT8_LEVEL,
            rows=self._multiplies,
            floats=self._multiplies,
            attention=self._multiplies,
        )

    def _open(
        self, source: str | bytes, path: Path, options: ort.SessionOptions, replaced: "Replaced | None" = None
    ) -> "OrtRunner":
        try:
            # Its fallback prints what went wrong and tries the CPU, which is said here.
            session = ort.InferenceSession(source, options, providers=self._providers(), enable_fallback=0)
            runner = OrtRunner(session, path, self, replaced)
        except OPEN_ERRORS as error:
            raise explain(error, path, "open") from error
        if self._kind == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
            raise UnavailableError(
                "ONNX Runtime could not start CUDA and fell back to the CPU",
                wanted="CUDA and cuDNN libraries of the versions this onnxruntime-gpu was built for",
                do='pip install "onnxruntime-gpu[cuda,cudnn]", or --device cpu',
            )
        return runner

    def allocate(self, dtype: Dtype, shape: Sequence[int]) -> Buffer:
        if self._kind == "cpu":
            return HostBuffer.allocate(dtype, shape)
        from engines.runners.cuda import CudaBuffer

        return CudaBuffer.allocate(dtype, shape, device=self._number)

    def program(self, steps: Sequence[Step], *, writes: Sequence[Buffer], reads: Sequence[Buffer]) -> Program:
        return StepwiseProgram(steps, writes=writes, reads=reads)

    @property
    def target(self) -> tuple[str, int]:
        """Device name and number as the IOBinding wants them."""
        return self._kind, self._number

    def _options(self) -> ort.SessionOptions:
        threads, custom_ops, prepack, log_severity = self._settings
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1  # a decoder is a chain: there is nothing to run side by side
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = log_severity
        # Many sessions run in turn: threads that spin while they wait would take the cores from the next session.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if custom_ops is not None:
            try:
                options.register_custom_ops_library(str(custom_ops))
            except ORT_ERRORS as error:
                raise explain(error, custom_ops, "load") from error
        return options

    def _providers(self) -> list[Any]:
        if self._kind == "cpu":
            return ["CPUExecutionProvider"]
        options = {"device_id": self._number, "arena_extend_strategy": "kSameAsRequested", "use_tf32": int(self.tf32)}
        return [("CUDAExecutionProvider", options), "CPUExecutionProvider"]


class OrtRunner:
    """One ONNX Runtime session. replaced: by nodes with inputs and outputs that are bound here, and are not told."""

    def __init__(
        self, session: ort.InferenceSession, path: Path, loader: OrtLoader, replaced: "Replaced | None" = None
    ) -> None:
        self.session, self.path, self.loader = session, path, loader
        self.in_place = {} if replaced is None else replaced.in_place
        self.room = {} if replaced is None else replaced.room
        self.weights: list[Any] = []  # mapped tensors that the session reads
        self.inputs = {node.name: _spec(node, path) for node in session.get_inputs() if node.name not in self.room}
        tokens = {name: room.tokens for room in self.room.values() for name in room.outputs}
        given = [node for node in session.get_outputs() if node.name not in self.in_place]
        self.outputs = {node.name: _spec(node, path, tokens.get(node.name)) for node in given}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        check_arrays(self.path.name, inputs, self.inputs)
        buffers = {name: self._allocate(spec) for name, spec in (self.inputs | self.outputs).items()}
        for name, value in inputs.items():
            buffers[name].write(value)
        self.bind({name: buffers[name] for name in self.inputs}, {name: buffers[name] for name in self.outputs})()
        return {name: buffers[name].read() for name in self.outputs}

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Bound:
        check_names(self.path.name, inputs, self.inputs)
        check_names(self.path.name, outputs, self.outputs)
        for name, spec in (self.inputs | self.outputs).items():
            buffer = inputs[name] if name in self.inputs else outputs[name]
            check_tensor(self.path.name, spec, buffer.dtype, written(spec, buffer.shape))
        return _OrtBound(self, inputs, outputs)

    def _allocate(self, spec: TensorSpec) -> Buffer:
        return self.loader.allocate(spec.dtype, spec.shape)


class _OrtBound:
    def __init__(self, runner: OrtRunner, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        self._runner = runner
        self._binding = runner.session.io_binding()
        self._kind, self._number = runner.loader.target
        # Kept so that the memory lives as long as its addresses are bound.
        self._inputs, self._outputs = dict(inputs), dict(outputs)
        for name, buffer in self._inputs.items():
            self._bind_input(name, buffer)
        for name, room in runner.room.items():
            rows = HostBuffer(np.array([outputs[output].shape[2] for output in room.outputs], np.int32))
            self._inputs[name] = rows
            self._bind_input(name, rows)
        same = {name: self._inputs[source] for name, source in runner.in_place.items()}
        for name, buffer in (self._outputs | same).items():
            element = dtypes.BY_NUMPY[buffer.dtype].onnx
            self._binding.bind_output(name, self._kind, self._number, element, buffer.shape, buffer.pointer)
        # On a GPU, ONNX Runtime places small integer arithmetic on the CPU and copies such an input over when it is
        # bound, not when the graph runs: bind these again before every run. (Not yet run on a GPU.)
        self._rebind = {
            name: buffer
            for name, buffer in self._inputs.items()
            if self._kind != "cpu" and np.issubdtype(buffer.dtype, np.integer)
        }

    def _bind_input(self, name: str, buffer: Buffer) -> None:
        element = dtypes.BY_NUMPY[buffer.dtype].onnx
        self._binding.bind_input(name, self._kind, self._number, element, buffer.shape, buffer.pointer)

    def __call__(self) -> None:
        for name, buffer in self._rebind.items():
            self._bind_input(name, buffer)
        try:
            self._runner.session.run_with_iobinding(self._binding)
            if self._kind != "cpu":
                self._binding.synchronize_outputs()
        except RUN_ERRORS as error:
            raise explain(error, self._runner.path, "run") from error


def _packed_files(folder: Path) -> "PackedFiles":
    """Only bundles with four-bit weights have them, and only they need onnx."""
    from engines.runners.packed_files import PackedFiles

    return PackedFiles(folder)


def _on_cpu() -> ModuleType:
    """It needs onnx, which not every installation has."""
    from engines.runners import on_cpu

    return on_cpu


def explain(error: Exception, path: Path, doing: str) -> BtpError:
    """What an ONNX Runtime error means for the user."""
    text = " ".join(str(error).split())
    short = text if len(text) < 300 else text[:300] + " ..."
    got = f"ONNX Runtime {ort.__version__} cannot {doing} {path.name}: {short}"
    if any(int(size) > total_memory() for size in ASKED.findall(text)):  # nobody has exported a graph like this
        return InputError(got, wanted="a graph as exported", do="export the bundle again")
    if "allocate" in text or "bad_alloc" in text or "out of memory" in text.lower():
        return UnavailableError(got, wanted="more free memory", do="close other programs, or take a smaller profile")
    if isinstance(error, (ort_errors.NotImplemented, ort_errors.EPFail)):
        return UnavailableError(
            got,
            wanted="kernels for every operator and precision of the graph",
            do="--device cuda, or export with --precision float32",
        )
    if "escapes model directory" in text:
        return InputError(
            f"ONNX Runtime cannot open {path}: weights beside it are symbolic links that lead out of its folder",
            wanted="the files themselves, or hard links",
            do="copy the bundle with cp -rL, which copies what links lead to",
        )
    if doing == "open":
        return InputError(got, wanted="the graph and the weight files as exported", do="export the bundle again")
    return CheckError(got, wanted="a graph that runs", do="btp-export verify shows which part is wrong")


def providers() -> list[str]:
    """Where this onnxruntime can run graphs, in its own words."""
    return list(ort.get_available_providers())


def onnxruntime_device(name: str) -> str:
    """The device as asked for; `auto` is CUDA where this onnxruntime has it and a driver is there, else the CPU."""
    if name != "auto":
        return name
    there = "CUDAExecutionProvider" in providers() and Path("/dev/nvidiactl").exists()
    return "cuda" if there else "cpu"


def _parse_device(device: str) -> tuple[str, int]:
    kind, colon, number = device.partition(":")
    if device == "cpu":
        return "cpu", 0
    if kind == "cuda" and (number.isdigit() if colon else True):
        return "cuda", int(number or 0)
    raise InputError(f"unknown device {device!r}", wanted="cpu, cuda, cuda:<number> or auto", do="--device cpu")


def _require_code_for_gpu(library: Path, number: int) -> None:
    """Raise UnavailableError if the operators' CUDA kernels are for other GPUs; without any, they run on the CPU."""
    from engines.runners.cuda import compute_capability

    inspected = libraries.inspect("btp_ort", library)
    if inspected.architectures:
        major, minor = map(int, compute_capability(number).split("."))
        libraries.require_capability(inspected, (major, minor))


def _require_cuda() -> None:
    if "CUDAExecutionProvider" not in providers():
        raise UnavailableError(
            f"onnxruntime {ort.__version__} here has no CUDA",
            wanted="onnxruntime-gpu in place of onnxruntime",
            do="pip uninstall onnxruntime; pip install onnxruntime-gpu; or --device cpu",
        )
    if hasattr(ort, "preload_dlls"):  # finds CUDA and cuDNN in the nvidia-* wheels
        ort.preload_dlls()


def _spec(node: Any, path: Path, rows: int | None = None) -> TensorSpec:
    """rows: of an output that may have more."""
    shape = node.shape if rows is None else [*node.shape[:2], rows, *node.shape[3:]]
    if node.type not in dtypes.BY_ONNXRUNTIME or not all(isinstance(size, int) for size in shape):
        raise InputError(
            f"{path.name}: {node.name} is {node.type} {list(node.shape)}",
            wanted="tensors of static shape",
            do="export the bundle again",
        )
    return TensorSpec(node.name, dtypes.BY_ONNXRUNTIME[node.type].numpy, tuple(shape), roomy=rows is not None)
