"""One TensorRT on one GPU, and what all its engines share: runtime, stream, scratch memory, plugins, weights.

Not yet run on a GPU; see engines/tensorrt/run/runner.py.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from engines.native import libraries, plugins
from engines.runners import cuda
from engines.runners.arena import Arena
from engines.runners.cuda_stream import Stream
from engines.runners.interface import Buffer, Dtype
from engines.tensorrt import installed
from engines.tensorrt.messages import Messages
from engines.tensorrt.records import PLUGIN_LIBRARY, BuiltEngine, EngineGraph, EnginesRecord, Flavour, PluginForm
from engines.tensorrt.run.weights import SharedWeights
from graphs.files.atomic import sha256, size_text
from graphs.records.errors import BtpError, CheckError, InputError, UnavailableError


@dataclass(frozen=True)
class Process:
    """What TensorRT keeps for the whole process, whoever asks for it, and the sessions that are open in it."""

    sessions: "weakref.WeakValueDictionary[tuple[Flavour, int], Session]" = field(
        default_factory=weakref.WeakValueDictionary
    )
    loggers: list[Any] = field(default_factory=list)  # TensorRT goes on using the first one it was given
    plugins: dict[Flavour, tuple[PluginForm, str | None, Any]] = field(default_factory=dict)  # form, hash, library

    def session(self, flavour: Flavour, device: int) -> "Session":
        """The session of that TensorRT on that GPU: the one there is as long as anything uses it, else a new one.

        Raises UnavailableError without a GPU, its driver or TensorRT.
        """
        session = self.sessions.get((flavour, device))
        if session is None:
            session = self.sessions[flavour, device] = Session(flavour, device, self)
        return session


PROCESS: Final = Process()  # this one: TensorRT registers plugins and its logger once, not for each caller


class Session:
    """One TensorRT on one GPU, in one process."""

    def __init__(self, flavour: Flavour, device: int, process: Process) -> None:
        self.flavour, self.device, self.process = flavour, device, process
        self.compute_capability = cuda.compute_capability(device)
        self.library = installed.load(flavour)
        self.trt = self.library.module
        self.stream = Stream(device)
        self.log = Messages(self.trt, echo=False)
        process.loggers.append(self.log.logger)
        self.runtime = self._start()
        self.scratch = Scratch(device)
        self.weights = SharedWeights(
            partial(Arena, device=device, transfers=self.stream),
            self.stream.finish,
            give_back=cuda.shares_memory(device),
        )

    def _start(self) -> Any:
        try:
            return self.trt.Runtime(self.log.logger)
        except TypeError as error:  # pybind's words for a runtime that could not be made
            raise UnavailableError(
                f"{self.library.title} does not start: {' '.join(self.log.errors) or 'it does not say why'}",
                wanted="a TensorRT for this driver and CUDA",
                do="nvidia-smi shows the driver; install the TensorRT of that CUDA version",
            ) from error

    def allocate(self, dtype: Dtype, shape: Sequence[int]) -> Buffer:
        """Zeroed memory for one tensor."""
        return _allocate(self.device, self.stream, dtype, shape)

    def require_room(self, folder: Path, graphs: Sequence[EngineGraph]) -> None:
        """Raise UnavailableError if these engines cannot be open together, before anything is uploaded.

        Counted are the engine files, shared weights that are not there yet, and the largest need of memory to compute
        in, as estimated; inputs, outputs and caches come on top. On a board that shares its memory with the system,
        file pages that can be dropped count as free.
        """
        files = sum(graph.engine.size for graph in graphs if graph.engine is not None)
        scratch = max((graph.estimate.activation_bytes for graph in graphs), default=0)
        needed = files + self.weights.missing_bytes(folder, graphs) + scratch
        room = cuda.room(self.device)
        if needed > room:
            raise UnavailableError(
                f"the engines need about {size_text(needed)}, GPU {self.device} has {size_text(room)} for them",
                wanted="room for all engines of a profile",
                do="close other programs, build with --engine-weights shared, or export a smaller profile",
            )

    def require(self, folder: Path, record: EnginesRecord) -> None:
        """Raise UnavailableError unless engines of this record, in `folder`, can run here; registers their plugins."""
        for graph in record.graphs:
            if graph.engine is not None:
                self._require_engine(record, graph.engine)
        if any(graph.custom_nodes for graph in record.graphs):
            self._register(folder, record)

    def _require_engine(self, record: EnginesRecord, engine: BuiltEngine) -> None:
        if _release(engine.tensorrt_version) != _release(self.library.version):
            raise UnavailableError(
                f"{engine.file} was built by {installed.TITLES[self.flavour]} {engine.tensorrt_version}, "
                f"{self.library.version} is installed here",
                wanted="engines built by the version that runs them",
                do=f"{build_again(record)}, or install {engine.tensorrt_version}",
            )
        if engine.compute_capability != self.compute_capability:
            raise UnavailableError(
                f"{engine.file} was built for compute capability {engine.compute_capability}, "
                f"GPU {self.device} has {self.compute_capability}",
                wanted="engines built for this GPU",
                do="btp-export build BUNDLE --target <this device>; btp-export build --help lists the targets",
            )

    def _register(self, folder: Path, record: EnginesRecord) -> None:
        """Register the plugins in the form the engines were built with, once for the process."""
        form, digest = record.plugins.form, record.plugins.sha256
        if form == "none":
            return
        if self.flavour in self.process.plugins:
            if self.process.plugins[self.flavour][:2] != (form, digest):
                got = f"this process runs engines with other plugins than those for {record.target}"
                raise CheckError(got, "one form of the plugins in a process", "start a new process")
            return
        major, minor = (int(part) for part in self.compute_capability.split("."))
        name = "btp_trt_dynamic" if form == "library" else "btp_kernels"  # the Python plugins launch the kernels
        own = folder / PLUGIN_LIBRARY  # compiled by plugins/build.sh; taken if the engines were built with it
        path = own if digest is not None and own.is_file() and sha256(own) == digest else libraries.find(name)
        libraries.require_capability(libraries.inspect(name, path), (major, minor))
        if form == "library" and digest is not None and sha256(path) != digest:
            raise UnavailableError(
                f"{path} is not the plugin library that the engines were built with",
                wanted=f"sha256 {digest}",
                do=f"restore that library, or {build_again(record)}",
            )
        register = plugins.register_native if form == "library" else plugins.register_python
        self.process.plugins[self.flavour] = (form, digest, register(self.trt, path))


class Scratch:
    """Memory that engines compute in. It grows when an engine needs more; its address changes then."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._memory: cuda.DeviceMemory | None = None

    def reserve(self, size: int) -> None:
        """Make room for an engine that needs `size` bytes."""
        if size > self.size:
            self._memory = None  # freed first: both at once might not fit
            self._memory = cuda.DeviceMemory(size, device=self._device)

    @property
    def size(self) -> int:
        """Bytes there are."""
        return 0 if self._memory is None else self._memory.size

    @property
    def pointer(self) -> int:
        """The address, 0 while no engine needs any."""
        return 0 if self._memory is None else self._memory.data_ptr()


def _release(version: str) -> list[str]:
    """Major, minor and patch number: engines run on the release that built them."""
    return version.split(".")[:3]


def explain(errors: Sequence[str], path: Path, doing: str, record: EnginesRecord) -> BtpError:
    """What TensorRT's own messages mean for the user."""
    text = " ".join(" ".join(errors).split()) or "no reason given"
    got = f"TensorRT cannot {doing} {path.name}: {text if len(text) < 300 else text[:300] + ' ...'}"
    low = text.lower()
    if "out of memory" in low or "outofmemory" in low or "cuda error 2" in low or "cudaerror 2:" in low:
        wanted = "more free GPU memory"
        return UnavailableError(got, wanted, f"close other programs, or {build_again(record)} --engine-weights shared")
    if doing != "open":
        return CheckError(got, "an engine that runs", "btp-export verify --target shows which part is wrong")
    if "plugin" in low:
        return UnavailableError(got, "the plugins the engine was built with", "see docs/native.md, or build it again")
    if "magic" in low or "truncat" in low or "corrupt" in low:
        return InputError(got, "the engine as it was built", build_again(record))
    if "version" in low:
        return UnavailableError(got, f"the TensorRT that built it ({record.tensorrt})", build_again(record))
    if "device" in low or "compute" in low or "platform" in low:
        return UnavailableError(got, f"a GPU of compute capability {record.compute_capability}", build_again(record))
    return InputError(got, "the engine as it was built", build_again(record))


def build_again(record: EnginesRecord) -> str:
    """The command that makes the engines anew."""
    return f"btp-export build BUNDLE --target {record.target}"


def _allocate(device: int, stream: Stream, dtype: Dtype, shape: Sequence[int]) -> Buffer:
    return cuda.CudaBuffer.allocate(dtype, shape, device=device, transfers=stream)
