"""A stream of a GPU, and what it takes to hand it a whole sequence of work at once: graphs, events, pinned memory.

Not yet run on a GPU: written after the CUDA runtime's documentation and tested against a library in host memory.
"""

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, Final

import numpy as np

from engines.runners.cuda import ALIGNMENT, call, free_with, refused, try_call, use_device
from engines.runners.interface import Array, Buffer
from graphs.records.errors import BtpError, CheckError

NON_BLOCKING: Final = 1  # cudaStreamNonBlocking: no order with the default stream, where others compute
CAPTURE_THIS_THREAD: Final = 1  # cudaStreamCaptureModeThreadLocal
DETECT_DIRECTION: Final = 4  # cudaMemcpyDefault: the addresses tell which side is the device
WITHOUT_TIME: Final = 2  # cudaEventDisableTiming
EXTERNAL: Final = 1  # cudaEventRecordExternal: a graph records the event in each of its runs; only within a capture


class NotCapturedError(CheckError):
    """Work that cannot be part of a CUDA graph; `got` says why."""


class Stream:
    """A stream of one device: what is put on it runs in order, while the host goes on.

    Threads may share it. `lock` keeps work together that must not have another thread's in between, such as a capture.
    """

    def __init__(self, device: int) -> None:
        use_device(device)
        handle = ctypes.c_size_t()
        call("cudaStreamCreateWithFlags", ctypes.byref(handle), NON_BLOCKING)
        self.device, self.handle = device, handle.value
        self.lock = threading.RLock()
        self._kept: list[object] = []
        self._capturing = False
        self._own = threading.local()  # an event for each thread that waits
        free_with(self, "cudaStreamDestroy", self.handle)

    def copy(self, target: int, source: int, count: int, *, keep: object = None) -> None:
        if count:
            with self.lock:
                self._keep(keep)
                call("cudaMemcpyAsync", target, source, count, DETECT_DIRECTION, self.handle)

    def copy_rows(
        self, target: int, pitch: int, source: int, source_pitch: int, width: int, height: int, *, keep: object = None
    ) -> None:
        if width and height:
            with self.lock:
                self._keep(keep)
                rows = (target, pitch, source, source_pitch, width, height)
                call("cudaMemcpy2DAsync", *rows, DETECT_DIRECTION, self.handle)

    def finish(self) -> None:
        """Return when all is done that is on the stream now. Other threads may put more on it meanwhile."""
        with self.lock:
            if not hasattr(self._own, "event"):
                self._own.event = Event(self.device, timed=False)
            self.record(self._own.event)
            kept, self._kept = self._kept, []
        self._own.event.wait()
        kept.clear()

    def record(self, event: "Event") -> None:
        """Put the event behind what is on the stream."""
        with self.lock:
            flags = EXTERNAL if self._capturing else 0
            call("cudaEventRecordWithFlags", event.handle, self.handle, flags)

    def capture(self, enqueue: Callable[[], None]) -> "Graph":
        """What `enqueue` puts on the stream as a graph, without running it.

        Raises NotCapturedError if it cannot be captured: work that waits or allocates ends a capture.
        """
        graph, problem = ctypes.c_size_t(), ""
        with self.lock, _without_collector():
            call("cudaStreamBeginCapture", self.handle, CAPTURE_THIS_THREAD)
            self._capturing = True
            try:
                enqueue()
            except BtpError as error:
                problem = error.got
            finally:
                self._capturing = False
                code = try_call("cudaStreamEndCapture", self.handle, ctypes.byref(graph))
            if problem or code or not graph.value:
                try_call("cudaGetLastError")  # an invalid capture leaves its error for the next call to find
                raise NotCapturedError(problem or f"the capture ended with CUDA error {code}")
            try:
                return Graph(graph.value)
            except CheckError as error:
                try_call("cudaGetLastError")
                raise NotCapturedError(error.got) from error

    def launch(self, graph: "Graph") -> None:
        """Put a captured graph on the stream."""
        with self.lock:
            call("cudaGraphLaunch", graph.handle, self.handle)

    def _keep(self, memory: object) -> None:
        if memory is not None:
            self._kept.append(memory)


@contextmanager
def _without_collector() -> Iterator[None]:
    """No garbage is collected: freeing device memory would end the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Graph:
    """A captured graph, ready to be launched again and again. It takes the handle over and frees it."""

    def __init__(self, captured: int) -> None:
        executable = ctypes.c_size_t()
        try:
            call("cudaGraphInstantiateWithFlags", ctypes.byref(executable), captured, 0)
        finally:
            try_call("cudaGraphDestroy", captured)
        self.handle = executable.value
        free_with(self, "cudaGraphExecDestroy", self.handle)


class Event:
    """A mark on a stream."""

    def __init__(self, device: int, *, timed: bool) -> None:
        use_device(device)
        handle = ctypes.c_size_t()
        call("cudaEventCreateWithFlags", ctypes.byref(handle), 0 if timed else WITHOUT_TIME)
        self.handle = handle.value
        free_with(self, "cudaEventDestroy", self.handle)

    def wait(self) -> None:
        """Return when the stream has come to the mark."""
        call("cudaEventSynchronize", self.handle)

    def since(self, earlier: "Event") -> float:
        """Milliseconds from an earlier mark to this one; the stream has come to both."""
        passed = ctypes.c_float()
        call("cudaEventElapsedTime", ctypes.byref(passed), earlier.handle, self.handle)
        return passed.value


class PinnedMemory:
    """Host memory that the device reads and writes by itself, at fixed addresses: an array for each buffer."""

    def __init__(self, buffers: Sequence[Buffer], *, device: int) -> None:
        use_device(device)
        sizes = [prod(buffer.shape) * buffer.dtype.itemsize for buffer in buffers]
        offsets = np.cumsum([0, *(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)]).tolist()
        pointer = ctypes.c_size_t()
        size = max(offsets[-1], 1)
        code = try_call("cudaHostAlloc", ctypes.byref(pointer), size, 0)
        if code:
            raise refused(code, size, device)
        self._interface = {"shape": (size,), "typestr": "|u1", "data": (pointer.value, False), "version": 3}
        free_with(self, "cudaFreeHost", pointer.value)
        raw = np.asarray(self)
        raw[...] = 0
        self.arrays: list[Array] = [
            raw[offset : offset + size].view(buffer.dtype).reshape(buffer.shape)
            for offset, size, buffer in zip(offsets, sizes, buffers, strict=False)
        ]
        self.addresses = [pointer.value + offset for offset in offsets[:-1]]

    @property
    def __array_interface__(self) -> dict[str, Any]:  # an array made of it keeps it alive
        return self._interface
