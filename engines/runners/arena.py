"""One range of device addresses for many tensors: all the weights that engines share.

It is one cudaMalloc. Where that is refused although there is enough memory, as happens on Jetsons with L4T 36.4.7 and
later (NvMapMemAllocInternalTagged, error 12), the range is reserved and physical memory mapped into it piece by piece,
with CUDA's virtual memory management: the way that was found to work there (ggml-org/llama.cpp#23732).

Not yet run on a GPU: written after the CUDA driver's documentation and tested against a library in host memory.
"""

import ctypes
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

from engines.runners import cuda
from engines.runners.interface import Dtype
from graphs.files.atomic import size_text
from graphs.records.errors import UnavailableError

PIECE: Final = 64 * 2**20  # bytes mapped at once
LIBRARIES: Final = ("libcuda.so.1", "nvcuda.dll")
PINNED, ON_DEVICE, READ_AND_WRITE = 1, 1, 3  # CU_MEM_ALLOCATION_TYPE_, CU_MEM_LOCATION_TYPE_, CU_MEM_ACCESS_FLAGS_PROT_


class Arena:
    """`size` bytes on a device, freed with the last tensor in them. `pieces`: how many they are made of.

    Raises UnavailableError if there is not that much, or if the device refuses it in one piece and in small ones.
    """

    def __init__(self, size: int, *, device: int, transfers: cuda.Transfers | None = None) -> None:
        self.size, self._transfers = size, transfers
        self._memory: _Whole | _Mapped
        cuda.use_device(device)
        pointer = ctypes.c_size_t()
        code = cuda.try_call("cudaMalloc", ctypes.byref(pointer), size)
        if code == 0:
            self._memory = _Whole(pointer.value)
        elif code == cuda.OUT_OF_MEMORY and size <= cuda.room(device):
            cuda.try_call("cudaGetLastError")
            self._memory = _Mapped(size, device)
        else:
            raise cuda.refused(code, size, device)

    @property
    def pieces(self) -> int:
        """1 for one cudaMalloc, else the number of mapped pieces."""
        return self._memory.pieces

    def tensor(self, dtype: Dtype, shape: Sequence[int], offset: int) -> cuda.CudaBuffer:
        """A tensor from byte `offset` on, a multiple of cuda.ALIGNMENT. Its memory is not zeroed."""
        assert offset % cuda.ALIGNMENT == 0, offset
        return cuda.CudaBuffer(self._memory, dtype, shape, self._transfers, offset // dtype.itemsize)


class _Whole:
    """Memory of one cudaMalloc."""

    pieces: Final = 1

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer
        cuda.free_with(self, "cudaFree", pointer)

    def data_ptr(self) -> int:
        return self._pointer


class _Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    """CUmemAllocationProp; `flags` are compression, GPUDirect, usage and what is reserved."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("requested_handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32_handle_metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class _Mapped:
    """A reserved range of addresses with physical memory mapped into it, piece after piece."""

    def __init__(self, size: int, device: int) -> None:
        properties = _Properties(type=PINNED, location=_Location(ON_DEVICE, device))
        unit = ctypes.c_size_t()
        _call("cuMemGetAllocationGranularity", ctypes.byref(unit), ctypes.byref(properties), 0)
        self._piece = _up(PIECE, unit.value)
        whole, start = _up(size, unit.value), ctypes.c_size_t()
        held: list[tuple[int, int]] = []  # place and handle of each piece
        code = _try("cuMemAddressReserve", ctypes.byref(start), whole, 0, 0, 0)
        if code == 0:
            code = _map(start.value, whole, self._piece, properties, held)
        self._pointer, self.pieces = start.value, len(held)
        weakref.finalize(self, _release, driver(), start.value, whole, self._piece, held)
        if code:
            mapped = sum(min(self._piece, whole - place) for place, _ in held)
            raise UnavailableError(
                f"the GPU refuses {size_text(size)} for weights in one piece, and in small ones after "
                f"{size_text(mapped)} (CUDA error {code}), although {size_text(cuda.room(device))} are available",
                wanted="memory for all weights: L4T 36.4.7 and later are known to refuse it (NvMap error 12)",
                do="reboot the board, close other programs, or see docs/jetson.md",
            )

    def data_ptr(self) -> int:
        return self._pointer


def _map(start: int, whole: int, piece: int, properties: _Properties, held: list[tuple[int, int]]) -> int:
    """Map pieces over [start, start + whole), note them in `held`; the first error's code, 0 if there is none."""
    access = _Access(properties.location, READ_AND_WRITE)
    for place in range(0, whole, piece):
        size, handle = min(piece, whole - place), ctypes.c_ulonglong()
        code = _try("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(properties), 0)
        if code:
            return code
        code = _try("cuMemMap", start + place, size, 0, handle.value, 0)
        if code:
            _try("cuMemRelease", handle.value)
            return code
        held.append((place, handle.value))
        code = _try("cuMemSetAccess", start + place, size, ctypes.byref(access), 1)
        if code:
            return code
    return 0


def _release(library: Any, start: int, whole: int, piece: int, held: Sequence[tuple[int, int]]) -> None:
    for place, handle in held:
        library.cuMemUnmap(_WIDE(start + place), _WIDE(min(piece, whole - place)))
        library.cuMemRelease(_LONG(handle))
    if start:
        library.cuMemAddressFree(_WIDE(start), _WIDE(whole))


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


# Argument types of the driver's functions used here; handles and sizes are 64 bits wide.
_WIDE, _INT, _OUT, _LONG = ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_ulonglong
_SIGNATURES: Final[dict[str, tuple[Any, ...]]] = {
    "cuMemGetAllocationGranularity": (_OUT, _OUT, _INT),  # granularity, properties, kind
    "cuMemAddressReserve": (_OUT, _WIDE, _WIDE, _WIDE, _LONG),  # address, bytes, alignment, wish, flags
    "cuMemAddressFree": (_WIDE, _WIDE),  # address, bytes
    "cuMemCreate": (_OUT, _WIDE, _OUT, _LONG),  # handle, bytes, properties, flags
    "cuMemRelease": (_LONG,),
    "cuMemMap": (_WIDE, _WIDE, _WIDE, _LONG, _LONG),  # address, bytes, offset, handle, flags
    "cuMemUnmap": (_WIDE, _WIDE),
    "cuMemSetAccess": (_WIDE, _WIDE, _OUT, _WIDE),  # address, bytes, descriptions, their number
}


def _call(name: str, *arguments: Any) -> None:
    code = _try(name, *arguments)
    if code:
        raise cuda.CudaError(name, code, "see the CUDA driver's documentation")


def _try(name: str, *arguments: Any) -> int:
    """Call one function of the driver; its error code, 0 for success."""
    converted = [
        argument if kind is _OUT else kind(argument)
        for kind, argument in zip(_SIGNATURES[name], arguments, strict=True)
    ]
    return int(getattr(driver(), name)(*converted))


@cache
def driver() -> Any:
    """The CUDA driver's library. Raises UnavailableError without one."""
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise UnavailableError(f"{LIBRARIES[0]} cannot be loaded", "the CUDA driver", "install the driver of this GPU")
