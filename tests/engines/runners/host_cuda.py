"""A CUDA runtime library in host memory, with the order of streams: what is put on a stream runs when it is waited for.

So work that is not waited for has not happened, host memory that is given up too early is read as it is then, and a
captured graph holds the work and not its results. Same functions and error codes as the real library, as far as
engines/runners/cuda.py uses them.
"""

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

Work = Callable[[], None]
INVALID_VALUE, NO_DEVICE, INVALID_CAPTURE = 1, 100, 901
CAPTURE_UNSUPPORTED, INVALID_HANDLE, NOT_READY = 900, 400, 600
# What waits or allocates ends a capture that the same thread makes.
NOT_IN_A_CAPTURE = frozenset(
    {"Malloc", "Free", "HostAlloc", "FreeHost", "Memset", "Memcpy", "Memcpy2D", "DeviceSynchronize"}
    | {"StreamSynchronize", "EventSynchronize"}
)
INVALID_DEVICE, OUT_OF_MEMORY = 101, 2


class Function:
    """Like a function of a ctypes library: `argtypes` and `restype` may be set, as many arguments are taken as said."""

    argtypes: tuple[Any, ...] | None = None
    restype: Any = ctypes.c_int

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        assert self.argtypes is None or len(arguments) == len(self.argtypes), self.argtypes
        return self._function(*(getattr(a, "_obj", a.value if hasattr(a, "value") else a) for a in arguments))


class HostCuda:
    """`memory` bytes on one GPU of the given compute capability."""

    def __init__(self, *, capability: tuple[int, int] = (8, 7), memory: int = 1 << 30, devices: int = 1) -> None:
        self.capability, self.total, self.devices = capability, memory, devices
        self.blocks: dict[int, Any] = {}
        self.streams: dict[int, list[Work]] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.host: dict[int, Any] = {}  # pinned memory
        self.events: dict[int, tuple[bool, float | None]] = {}  # whether timed; when the stream came to it, if it did
        self.recorded: dict[int, tuple[int, Work]] = {}  # event -> stream and mark of its latest record
        self.capturing: int | None = None
        self.capturer: int | None = None  # the thread that captures
        self.broken = False  # the capture that is going on met work that cannot be captured
        self.integrated = False
        self.largest: int | None = None  # cudaMalloc refuses more in one piece, whatever is free
        self.calls: list[str] = []
        self._turn = threading.RLock()  # one thread at a time
        self._handles = iter(range(1000, 1 << 30))

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            raise AttributeError(name)
        function = getattr(type(self), name[4:])

        def call(*arguments: Any) -> Any:
            with self._turn:
                self.calls.append(name)
                if name[4:] in NOT_IN_A_CAPTURE and self._captures():
                    self.broken = True
                    return CAPTURE_UNSUPPORTED
                return function(self, *arguments)

        made = Function(call)
        setattr(self, name, made)
        return made

    @property
    def used(self) -> int:
        return sum(size for _, size in self.blocks.values())

    def _captures(self) -> bool:
        """Whether this thread captures something."""
        return self.capturing is not None and self.capturer == threading.get_ident()

    def enqueue(self, stream: int, work: Work, *, capturable: bool = True) -> bool:
        """Put work on a stream; False if the stream is being captured and the work cannot be."""
        assert self.capturing != stream or self._captures(), "another thread's work gets into the capture"
        if self.capturing == stream and not capturable:
            self.broken = True
            return False
        self.streams[stream].append(work)
        return True

    # The functions, with plain integers and ctypes objects to write to.

    def GetErrorString(self, code: int) -> bytes:
        return {2: b"out of memory", 100: b"no CUDA-capable device is detected"}.get(code, b"an error")

    def GetLastError(self) -> int:
        return 0

    def SetDevice(self, device: int) -> int:
        if not self.devices:
            return NO_DEVICE
        return 0 if device < self.devices else INVALID_DEVICE

    def MemGetInfo(self, free: Any, total: Any) -> int:
        free.value, total.value = self.total - self.used, self.total
        return 0

    def DeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
        value.value = {75: self.capability[0], 76: self.capability[1], 18: int(self.integrated)}[attribute]
        return 0

    def Malloc(self, pointer: Any, size: int) -> int:
        if self.used + size > self.total or (self.largest is not None and size > self.largest):
            return OUT_OF_MEMORY
        raw = (ctypes.c_uint8 * (size + 256))()
        ctypes.memset(raw, 0xFF, size + 256)  # NaN in every float type: what is not zeroed shows
        pointer.value = ctypes.addressof(raw) + -ctypes.addressof(raw) % 256
        self.blocks[pointer.value] = (raw, size)
        return 0

    def Free(self, pointer: int) -> int:
        self.blocks.pop(pointer)
        return 0

    def Memset(self, target: int, byte: int, count: int) -> int:
        ctypes.memset(target, byte, count)
        return 0

    def Memcpy(self, target: int, source: int, count: int, direction: int) -> int:
        self.DeviceSynchronize()
        ctypes.memmove(target, source, count)
        return 0

    def MemcpyAsync(self, target: int, source: int, count: int, direction: int, stream: int) -> int:
        self.enqueue(stream, lambda: ctypes.memmove(target, source, count) and None)
        return 0

    def Memcpy2D(
        self, target: int, pitch: int, source: int, source_pitch: int, width: int, height: int, direction: int
    ) -> int:
        self.DeviceSynchronize()
        _copy_rows(target, pitch, source, source_pitch, width, height)
        return 0

    def Memcpy2DAsync(self, *arguments: int) -> int:
        self.enqueue(arguments[-1], lambda: _copy_rows(*arguments[:6]))
        return 0

    def DeviceSynchronize(self) -> int:
        for stream in self.streams:
            self.StreamSynchronize(stream)
        return 0

    def StreamCreateWithFlags(self, stream: Any, flags: int) -> int:
        assert flags == 1, "a blocking stream waits for others' work on the default stream"
        stream.value = next(self._handles)
        self.streams[stream.value] = []
        return 0

    def StreamDestroy(self, stream: int) -> int:
        del self.streams[stream]
        return 0

    def StreamSynchronize(self, stream: int) -> int:
        self._run(stream, None)
        return 0

    def _run(self, stream: int, last: Work | None) -> None:
        """Do what is on a stream, up to `last` if it is there."""
        works = self.streams[stream]
        while works:
            work = works.pop(0)
            work()
            if work is last:
                return

    def StreamBeginCapture(self, stream: int, mode: int) -> int:
        assert self.capturing is None and mode == 1
        self.capturing, self.capturer, self.broken = stream, threading.get_ident(), False
        self.before, self.streams[stream] = self.streams[stream], []  # work from before the capture is not part of it
        return 0

    def StreamEndCapture(self, stream: int, graph: Any) -> int:
        assert self.capturing == stream
        works, self.streams[stream], self.capturing = self.streams[stream], self.before, None
        if self.broken:
            return INVALID_CAPTURE
        graph.value = next(self._handles)
        self.graphs[graph.value] = works
        return 0

    def HostAlloc(self, pointer: Any, size: int, flags: int) -> int:
        raw = (ctypes.c_uint8 * (size + 256))()
        pointer.value = ctypes.addressof(raw) + -ctypes.addressof(raw) % 256
        self.host[pointer.value] = raw
        return 0

    def FreeHost(self, pointer: int) -> int:
        del self.host[pointer]
        return 0

    def EventCreateWithFlags(self, event: Any, flags: int) -> int:
        assert flags in (0, 2)
        event.value = next(self._handles)
        self.events[event.value] = (flags == 0, None)
        return 0

    def EventDestroy(self, event: int) -> int:
        del self.events[event]
        self.recorded.pop(event, None)
        return 0

    def EventRecordWithFlags(self, event: int, stream: int, flags: int) -> int:
        if flags and not self._captures():
            return INVALID_VALUE  # an external record is for captures only

        def mark() -> None:
            self.events[event] = (self.events[event][0], time.perf_counter())

        if self._captures() and not flags:
            return 0  # orders the graph's nodes; no run of the graph records the event
        self.recorded[event] = stream, mark
        self.enqueue(stream, mark)
        return 0

    def EventSynchronize(self, event: int) -> int:
        if event in self.recorded:
            stream, mark = self.recorded[event]
            if mark in self.streams[stream]:
                self._run(stream, mark)
        return 0

    def EventElapsedTime(self, passed: Any, start: int, end: int) -> int:
        marks = [self.events[start], self.events[end]]
        if not all(timed for timed, _ in marks):
            return INVALID_HANDLE
        if any(when is None for _, when in marks):
            return NOT_READY
        passed.value = (marks[1][1] - marks[0][1]) * 1000  # type: ignore[operator]
        return 0

    def GraphInstantiateWithFlags(self, executable: Any, graph: int, flags: int) -> int:
        executable.value = next(self._handles)
        self.graphs[executable.value] = list(self.graphs[graph])
        return 0

    def GraphLaunch(self, executable: int, stream: int) -> int:
        self.streams[stream] += self.graphs[executable]
        return 0

    def GraphDestroy(self, graph: int) -> int:
        del self.graphs[graph]
        return 0

    GraphExecDestroy = GraphDestroy


def _copy_rows(target: int, pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
    assert width <= pitch and width <= source_pitch
    for row in range(height):
        ctypes.memmove(target + row * pitch, source + row * source_pitch, width)


class HostDriver:
    """Virtual memory management of the CUDA driver, over the memory of a HostCuda.

    A range of addresses is host memory from the beginning; `mapped` says which of it may be used. `pieces` is how many
    pieces of physical memory can be had.
    """

    GRANULARITY = 1 << 21

    def __init__(self, machine: HostCuda, *, pieces: int = 1 << 20) -> None:
        self.machine, self.pieces = machine, pieces
        self.ranges: dict[int, Any] = {}
        self.handles: dict[int, int] = {}  # handle -> bytes
        self.mapped: dict[int, int] = {}  # address -> handle
        self.usable: set[int] = set()
        self._handles = iter(range(1, 1 << 30))

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuMem"):
            raise AttributeError(name)
        return Function(getattr(self, name.removeprefix("cuMem")))

    def GetAllocationGranularity(self, granularity: Any, properties: Any, kind: int) -> int:
        assert (properties.type, properties.location.type, properties.location.id) == (1, 1, 0)
        granularity.value = self.GRANULARITY
        return 0

    def AddressReserve(self, address: Any, size: int, alignment: int, wish: int, flags: int) -> int:
        assert size % self.GRANULARITY == 0
        raw = (ctypes.c_uint8 * (size + 256))()
        address.value = ctypes.addressof(raw) + -ctypes.addressof(raw) % 256
        self.ranges[address.value] = raw
        return 0

    def AddressFree(self, address: int, size: int) -> int:
        assert not self.mapped, "memory is still mapped"
        del self.ranges[address]
        return 0

    def Create(self, handle: Any, size: int, properties: Any, flags: int) -> int:
        assert size % self.GRANULARITY == 0 and size <= 64 * 2**20
        if len(self.handles) >= self.pieces:
            return OUT_OF_MEMORY
        handle.value = next(self._handles)
        self.handles[handle.value] = size
        return 0

    def Release(self, handle: int) -> int:
        del self.handles[handle]
        return 0

    def Map(self, address: int, size: int, offset: int, handle: int, flags: int) -> int:
        assert self.handles[handle] == size and not offset
        self.mapped[address] = handle
        return 0

    def Unmap(self, address: int, size: int) -> int:
        assert self.handles[self.mapped.pop(address)] == size
        return 0

    def SetAccess(self, address: int, size: int, access: Any, count: int) -> int:
        assert access.flags == 3 and count == 1
        self.usable |= set(range(address, address + size, self.GRANULARITY))
        return 0
