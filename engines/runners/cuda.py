"""Memory of an NVIDIA GPU: buffers at fixed addresses, and copies into them, out of them and between them.

The CUDA runtime library is called directly, because no Python interface of ONNX Runtime or TensorRT writes part of a
tensor. A row of a key/value cache lies once per head at a constant distance, so one strided copy writes it, and the
cache itself is never moved. Copies are made at once (`Immediate`, beside ONNX Runtime, which computes on a stream of
its own) or in the order of a stream (cuda_stream.Stream, beside TensorRT, which computes on the stream it is given).

Not yet run on a GPU: written after the CUDA runtime's documentation and tested against a library in host memory.
"""

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from engines.runners.host import check_rows
from engines.runners.interface import Array, Buffer, Dtype
from graphs.files.memory import available_memory
from graphs.records.errors import BtpError, CheckError, UnavailableError

LIBRARIES: Final = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "cudart64_13.dll", "cudart64_12.dll")
ALIGNMENT: Final = 256  # bytes: what cudaMalloc gives and TensorRT wants of every address
DETECT_DIRECTION: Final = 4  # cudaMemcpyDefault: the addresses tell which side is the device
MAJOR_ATTRIBUTE, MINOR_ATTRIBUTE = 75, 76  # cudaDevAttrComputeCapabilityMajor and ...Minor
INTEGRATED_ATTRIBUTE = 18  # cudaDevAttrIntegrated
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


class Owner(Protocol):
    """What holds device memory: it is freed when the owner is gone."""

    def data_ptr(self) -> int:
        """The address."""


class Transfers(Protocol):
    """How bytes are copied. Host memory given as `keep` stays alive until the copy has read it."""

    def copy(self, target: int, source: int, count: int, *, keep: object = None) -> None:
        """`count` bytes."""

    def copy_rows(
        self, target: int, pitch: int, source: int, source_pitch: int, width: int, height: int, *, keep: object = None
    ) -> None:
        """`height` rows of `width` bytes; the pitches are the bytes from one row to the next."""

    def finish(self) -> None:
        """Return when all copies are done."""


class CudaError(CheckError):
    """A function of the CUDA runtime failed. `code` is its cudaError_t."""

    def __init__(self, function: str, code: int, text: str) -> None:
        super().__init__(
            f"{function} failed with CUDA error {code}: {text}",
            wanted="a working GPU",
            do="nvidia-smi; or --device cpu",
        )
        self.code = code


class Immediate:
    """Copies that other work on the device cannot overtake."""

    def copy(self, target: int, source: int, count: int, *, keep: object = None) -> None:
        call("cudaMemcpy", target, source, count, DETECT_DIRECTION)

    def copy_rows(
        self, target: int, pitch: int, source: int, source_pitch: int, width: int, height: int, *, keep: object = None
    ) -> None:
        call("cudaMemcpy2D", target, pitch, source, source_pitch, width, height, DETECT_DIRECTION)

    def finish(self) -> None:
        # Copies inside the device return at once; ONNX Runtime computes on a stream that does not wait for them.
        call("cudaDeviceSynchronize")


class DeviceMemory:
    """Zeroed bytes on a device, freed with this object. Raises UnavailableError if there is not that much."""

    def __init__(self, size: int, *, device: int) -> None:
        use_device(device)
        pointer = ctypes.c_size_t()
        code = try_call("cudaMalloc", ctypes.byref(pointer), size)
        if code:
            raise refused(code, size, device)
        self._pointer, self.size = pointer.value, size
        free_with(self, "cudaFree", self._pointer)
        call("cudaMemset", self._pointer, 0, size)
        call("cudaDeviceSynchronize")  # setting memory does not wait, and other streams do not wait for it

    def data_ptr(self) -> int:
        return self._pointer


class CudaBuffer:
    """A tensor in device memory at a fixed address, `offset` elements behind the beginning of its owner's memory."""

    def __init__(
        self,
        owner: Owner,
        dtype: Dtype,
        shape: Sequence[int],
        transfers: Transfers | None = None,
        offset: int = 0,
    ) -> None:
        self._owner = owner  # holds the memory
        self._offset = offset
        self._transfers: Transfers = Immediate() if transfers is None else transfers
        self.dtype: Dtype = dtype
        self.shape: tuple[int, ...] = tuple(shape)
        self.pointer: int = owner.data_ptr() + offset * dtype.itemsize

    @staticmethod
    def allocate(
        dtype: Dtype, shape: Sequence[int], *, device: int, transfers: Transfers | None = None
    ) -> "CudaBuffer":
        """Zeroed memory for one tensor. Raises UnavailableError without a GPU or without that much memory."""
        size = max(prod(shape) * dtype.itemsize, 1)
        return CudaBuffer(DeviceMemory(size, device=device), dtype, shape, transfers)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize

    def write(self, values: Array) -> None:
        if values.shape != self.shape:
            raise ValueError(f"cannot write {values.shape} into a buffer of shape {self.shape}")
        host = np.array(values, dtype=self.dtype, order="C")  # a copy: the caller may change his array at once
        self._transfers.copy(self.pointer, host.ctypes.data, host.nbytes, keep=host)

    def read(self) -> Array:
        host = np.empty(self.shape, self.dtype)
        self._transfers.copy(host.ctypes.data, self.pointer, host.nbytes)
        self._transfers.finish()
        return host

    def view(self, shape: Sequence[int], *, offset: int = 0) -> "CudaBuffer":
        if offset < 0 or offset + prod(shape) > prod(self.shape):
            raise ValueError(f"{tuple(shape)} at element {offset} needs more memory than {self.shape}")
        return CudaBuffer(self._owner, self.dtype, shape, self._transfers, self._offset + offset)

    def write_rows(self, rows: Array | Buffer, starts: Sequence[int]) -> None:
        if isinstance(rows, np.ndarray):
            host = np.array(rows, dtype=self.dtype, order="C")
            self._row_writer(rows.shape, host.ctypes.data, keep=host)(starts)
        else:
            self.row_writer(rows)(starts)

    def row_writer(self, rows: Buffer) -> Callable[[Sequence[int]], None]:
        return self._row_writer(rows.shape, rows.pointer)

    def _row_writer(self, shape: Sequence[int], source: int, keep: object = None) -> Callable[[Sequence[int]], None]:
        check_rows(self.shape, shape, [0] * self.shape[0])
        row = self.shape[-1] * self.dtype.itemsize
        width, pitch = shape[-2] * row, self.shape[-2] * row  # bytes copied, bytes from one head to the next
        heads = prod(self.shape[1:-2])
        batch, last = self.shape[0], self.shape[-2] - shape[-2]
        transfers, target = self._transfers, self.pointer

        def write(starts: Sequence[int]) -> None:
            if len(starts) != batch or min(starts) < 0 or max(starts) > last:
                raise ValueError(f"rows of shape {tuple(shape)} do not fit into {self.shape} at rows {list(starts)}")
            for sample, start in enumerate(starts):
                to, origin = target + sample * heads * pitch + start * row, source + sample * heads * width
                transfers.copy_rows(to, pitch, origin, width, width, heads, keep=keep)
            if isinstance(transfers, Immediate):
                transfers.finish()

        return write


def use_device(device: int) -> None:
    """Make `device` the one that this thread's next calls mean. Raises UnavailableError if it is not there."""
    code = try_call("cudaSetDevice", device)
    if code:
        try_call("cudaGetLastError")
        raise UnavailableError(
            f"no GPU {device}: CUDA error {code}, {error_text(code)}",
            wanted="an NVIDIA GPU and its driver",
            do="nvidia-smi shows the GPUs there are; without one, leave --target and --device out",
        )


def memory(device: int) -> tuple[int, int]:
    """Free and all bytes of the device."""
    use_device(device)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value


def room(device: int) -> int:
    """Bytes that can be had. Where the GPU uses the system's memory, file pages that can be dropped count too."""
    free, total = memory(device)
    available = available_memory() if shares_memory(device) else None
    return free if available is None else min(max(free, available), total)


def refused(code: int, size: int, device: int) -> BtpError:
    """The error for a cudaMalloc that failed: there is not that much memory, or there is and it was refused."""
    if code != OUT_OF_MEMORY:
        return CudaError("cudaMalloc", code, error_text(code))
    try_call("cudaGetLastError")
    there, total = room(device) / 2**20, memory(device)[1] / 2**20
    if size / 2**20 <= there and shares_memory(device):
        return UnavailableError(
            f"the GPU refuses {size / 2**20:.0f} MiB although {there:.0f} of {total:.0f} MiB are available",
            wanted="one piece of memory: L4T 36.4.7 and later are known to refuse it (NvMap error 12)",
            do="reboot the board, close other programs, or see docs/jetson.md",
        )
    return UnavailableError(
        f"the GPU has no {size / 2**20:.0f} MiB more: {there:.0f} of {total:.0f} MiB are free",
        wanted="more free GPU memory",
        do="close other programs, take a smaller profile, or build with --engine-weights shared",
    )


def compute_capability(device: int) -> str:
    """Such as "8.7". Raises UnavailableError without a GPU."""
    return f"{_attribute(MAJOR_ATTRIBUTE, device)}.{_attribute(MINOR_ATTRIBUTE, device)}"


def shares_memory(device: int) -> bool:
    """Whether the GPU has no memory of its own and uses the system's, as on a Jetson."""
    return bool(_attribute(INTEGRATED_ATTRIBUTE, device))


def _attribute(number: int, device: int) -> int:
    use_device(device)
    value = ctypes.c_int()
    call("cudaDeviceGetAttribute", ctypes.byref(value), number, device)
    return value.value


# Argument types of the CUDA runtime functions used here; addresses, sizes and handles are as wide as a pointer.
_WIDE, _INT, _OUT = ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
SIGNATURES: Final[dict[str, tuple[Any, ...]]] = {
    "cudaSetDevice": (_INT,),
    "cudaMemGetInfo": (_OUT, _OUT),  # free, total
    "cudaDeviceGetAttribute": (_OUT, _INT, _INT),  # value, attribute, device
    "cudaMalloc": (_OUT, _WIDE),  # address, bytes
    "cudaFree": (_WIDE,),
    "cudaMemset": (_WIDE, _INT, _WIDE),  # target, byte, count
    "cudaMemcpy": (_WIDE, _WIDE, _WIDE, _INT),  # target, source, count, direction
    "cudaMemcpyAsync": (_WIDE, _WIDE, _WIDE, _INT, _WIDE),  # ..., stream
    "cudaMemcpy2D": (_WIDE, _WIDE, _WIDE, _WIDE, _WIDE, _WIDE, _INT),  # target, pitch, source, pitch, width, height
    "cudaMemcpy2DAsync": (_WIDE, _WIDE, _WIDE, _WIDE, _WIDE, _WIDE, _INT, _WIDE),
    "cudaDeviceSynchronize": (),
    "cudaGetLastError": (),
    "cudaStreamCreateWithFlags": (_OUT, _INT),
    "cudaStreamDestroy": (_WIDE,),
    "cudaHostAlloc": (_OUT, _WIDE, _INT),  # address, bytes, flags
    "cudaFreeHost": (_WIDE,),
    "cudaEventCreateWithFlags": (_OUT, _INT),
    "cudaEventDestroy": (_WIDE,),
    "cudaEventRecordWithFlags": (_WIDE, _WIDE, _INT),  # event, stream, flags
    "cudaEventSynchronize": (_WIDE,),
    "cudaEventElapsedTime": (_OUT, _WIDE, _WIDE),  # milliseconds, from, to
    "cudaStreamBeginCapture": (_WIDE, _INT),  # stream, mode
    "cudaStreamEndCapture": (_WIDE, _OUT),  # stream, graph
    "cudaGraphInstantiateWithFlags": (_OUT, _WIDE, ctypes.c_ulonglong),  # executable graph, graph, flags
    "cudaGraphLaunch": (_WIDE, _WIDE),  # executable graph, stream
    "cudaGraphDestroy": (_WIDE,),
    "cudaGraphExecDestroy": (_WIDE,),
}


def call(name: str, *arguments: Any) -> None:
    """Call one function of the CUDA runtime. Raises CudaError if it reports an error."""
    _check(name, try_call(name, *arguments))


def try_call(name: str, *arguments: Any) -> int:
    """Call one function of the CUDA runtime; its error code, 0 for success."""
    function = getattr(library(), name)
    if function.argtypes is None:  # a decode step makes a dozen calls: ctypes converts faster than we do
        function.argtypes = SIGNATURES[name]
    return int(function(*arguments))


def error_text(code: int) -> str:
    """The runtime's own words for an error code."""
    describe = library().cudaGetErrorString
    describe.restype = ctypes.c_char_p
    text = describe(ctypes.c_int(code))
    return text.decode() if isinstance(text, bytes) else str(code)


def _check(name: str, code: int) -> None:
    if code:
        raise CudaError(name, code, error_text(code))


def free_with(owner: object, function: str, handle: int) -> None:
    """Have a function of the runtime called on `handle` when `owner` is gone; its error would help nobody then."""
    weakref.finalize(owner, getattr(library(), function), _WIDE(handle))


@cache
def library() -> Any:
    """The CUDA runtime library. Raises UnavailableError without one, without a driver, or with one that is too old."""
    problem = ""
    for name in _places():
        try:
            loaded = ctypes.CDLL(name)
        except OSError:
            continue
        runtime, driver = ctypes.c_int(), ctypes.c_int()
        loaded.cudaRuntimeGetVersion(ctypes.byref(runtime))
        loaded.cudaDriverGetVersion(ctypes.byref(driver))
        if driver.value // 1000 >= runtime.value // 1000:  # a driver serves every runtime of its major version
            return loaded
        problem = problem or _version_problem(runtime.value, driver.value)
    if problem:
        raise UnavailableError(
            problem,
            wanted="an NVIDIA GPU with a driver for this CUDA version",
            do="install one, or a newer one; nvidia-smi shows what there is",
        )
    raise UnavailableError(
        f"none of {', '.join(LIBRARIES[:3])} can be loaded",
        wanted="the CUDA runtime library",
        do='pip install "onnxruntime-gpu[cuda,cudnn]", or the CUDA toolkit; or --device cpu',
    )


def _version_problem(runtime: int, driver: int) -> str:
    if driver == 0:
        return "there is no NVIDIA driver on this machine"
    wanted, got = (f"{version // 1000}.{version % 1000 // 10}" for version in (runtime, driver))
    return f"the NVIDIA driver is for CUDA {got}, the CUDA runtime library is {wanted}"


def _places() -> Iterator[str]:
    """Names that the loader looks for, then files in packages that carry the library."""
    yield from LIBRARIES
    yield from map(str, sorted(Path("/usr/local/cuda/lib64").glob("libcudart.so.*")))  # JetPack's
    for package, pattern in (("nvidia", "*/lib/libcudart.so.*"), ("onnxruntime_ep_nv_tensorrt_rtx", "libcudart.so.*")):
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            yield from map(str, sorted(Path(folder).glob(pattern)))
