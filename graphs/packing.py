"""Weights of four bits as bytes, in numpy: the one layout of checkpoints, graphs and kernels.

    codes [N,K]    0 to 15  <->  qweight [N,K/group,group/2] uint8     read as int32 words: [N,K/8]
    zeros [N,G]    0 to 15  <->  zeros   [N,ceil(G/2)] uint8           read as int32 words: [ceil(N*ceil(G/2)/4)]
    w [N,K] = (q - z) * s, with scales s [N,G], z 8 where no zeros are stored, rounded once

Two numbers lie in a byte, the earlier one in the low nibble. Packing never changes the order of the codes, so a row of
qweight is the row of codes. The words are the same bytes: views where numpy allows it. These are the bytes that the
operator BtpLinear takes (graphs/ops/linear); files hold them too, hence they are told here, below both.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from graphs.records.errors import InputError

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.int32]

BITS: Final = 4
LARGEST: Final = 15
MIDDLE: Final = 8  # the zero point of weights that have no zeros
GROUPS: Final = (16, 32, 64, 128, 256)
_WORD: Final = np.dtype("<i4")  # as files hold it, whatever the machine's own order


def qweight_shape(n: int, k: int, group: int) -> tuple[int, int, int]:
    """Bytes of the codes of w [N,K]: [N,K/group,group/2]."""
    return n, k // group, group * BITS // 8


def zeros_shape(n: int, groups: int) -> tuple[int, int]:
    """Bytes of the zeros of `groups` groups a row: [N,ceil(groups/2)]."""
    return n, (groups * BITS + 7) // 8


def check_group(k: int, group: int) -> None:
    """Raise InputError unless rows of K = `k` weights can be stored in such groups."""
    if group not in GROUPS:
        wanted = "16, 32, 64, 128 or 256 (a scale for a whole row is written out in groups)"
        raise InputError(f"group is {group}", wanted, "quantise the weights in groups of one of these sizes")
    if k < 1 or k % group:
        raise InputError(
            f"group is {group} and K is {k}", "a group that divides K", "quantise the weights in smaller groups"
        )


def pack(codes: npt.NDArray[Any], group: int) -> Bytes:
    """codes [N,K], integers 0 to 15 -> qweight [N,K/group,group/2].

    Raises InputError for other codes or a group that does not divide K.
    """
    _require_matrix("codes", codes)
    _require_four_bits("codes", codes)
    n, k = codes.shape
    check_group(k, group)
    return _nibbles_to_bytes(codes).reshape(qweight_shape(n, k, group))


def unpack(qweight: Bytes) -> Bytes:
    """qweight [N,K/group,group/2] (or [N,K/2]) -> codes [N,K] uint8."""
    _require_bytes("qweight", qweight)
    return _bytes_to_nibbles(qweight.reshape(len(qweight), -1))


def pack_zeros(zeros: npt.NDArray[Any]) -> Bytes:
    """zeros [N,G], integers 0 to 15 -> [N,ceil(G/2)]; an unused nibble is 0. Raises InputError for other zeros."""
    _require_matrix("zeros", zeros)
    _require_four_bits("zeros", zeros)
    if zeros.shape[1] % 2:
        zeros = np.pad(zeros, ((0, 0), (0, 1)))
    return _nibbles_to_bytes(zeros)


def unpack_zeros(packed: Bytes, groups: int) -> Bytes:
    """[N,ceil(G/2)] and G = `groups` -> zeros [N,G] uint8."""
    _require_bytes("zeros", packed)
    if packed.shape != zeros_shape(len(packed), groups):
        got = f"zeros has shape {list(packed.shape)}"
        raise InputError(got, f"{list(zeros_shape(len(packed), groups))} for {groups} groups", "pack the zeros again")
    return _bytes_to_nibbles(packed)[:, :groups]


def words(qweight: Bytes) -> Words:
    """The same bytes as little-endian int32 [N,K/8], as graphs for TensorRT declare them; a view if contiguous."""
    _require_bytes("qweight", qweight)
    return np.ascontiguousarray(qweight).reshape(len(qweight), -1).view(_WORD)


def zero_words(zeros: Bytes) -> Words:
    """The same bytes as little-endian int32 in one row; zero bytes fill up the last word."""
    _require_bytes("zeros", zeros)
    flat = np.ascontiguousarray(zeros).reshape(-1)
    missing = -flat.size % 4
    return (np.pad(flat, (0, missing)) if missing else flat).view(_WORD)


def dequantise(
    qweight: Bytes, scales: npt.NDArray[Any], zeros: Bytes | None = None, *, dtype: np.dtype[Any] | None = None
) -> npt.NDArray[Any]:
    """w [N,K] in `dtype`, by default the type of scales [N,K/group]: (q - z) * s, rounded once.

    In float32 the product with scales of 16 bits is exact.
    """
    n, groups = scales.shape
    codes = unpack(qweight).reshape(n, groups, -1).astype(np.float32)
    codes -= MIDDLE if zeros is None else unpack_zeros(zeros, groups).astype(np.float32)[:, :, None]
    codes *= scales.astype(np.float32)[:, :, None]
    return codes.astype(scales.dtype if dtype is None else dtype, copy=False).reshape(n, -1)


def check_scales(scales: npt.NDArray[Any], what: str = "scales") -> None:
    """Raise InputError if a scale is no finite number: it would be carried into every output of its row."""
    broken = ~np.isfinite(scales.astype(np.float32))
    if broken.any():
        place = [int(index) for index in np.argwhere(broken)[0]]
        got = f"{what} holds {scales[tuple(place)]} at {place}"
        raise InputError(got, "finite numbers", "quantise the weights again, or read an undamaged checkpoint")


def _require_matrix(name: str, numbers: npt.NDArray[Any]) -> None:
    if numbers.ndim != 2 or not np.issubdtype(numbers.dtype, np.integer):
        got = f"{name} is {list(numbers.shape)} {numbers.dtype}"
        raise InputError(got, "a matrix of integers", f"give {name} row by row, one integer each")


def _require_four_bits(name: str, numbers: npt.NDArray[Any]) -> None:
    if numbers.size and (numbers.min() < 0 or numbers.max() > LARGEST):
        got = f"{name} go from {numbers.min()} to {numbers.max()}"
        raise InputError(got, f"0 to {LARGEST}", f"shift signed {name} by {MIDDLE}, and look at how they were read")


def _require_bytes(name: str, packed: Bytes) -> None:
    if packed.dtype != np.uint8 or packed.ndim < 2:
        got = f"{name} is {list(packed.shape)} {packed.dtype}"
        raise InputError(got, "packed rows of uint8", f"pack {name}")


def _nibbles_to_bytes(numbers: npt.NDArray[Any]) -> Bytes:
    """[N,an even number of columns] -> [N,half]."""
    small = numbers.astype(np.uint8)
    return small[:, 0::2] | np.left_shift(small[:, 1::2], 4, dtype=np.uint8)


def _bytes_to_nibbles(packed: Bytes) -> Bytes:
    """[N,C] -> [N,2C]."""
    pairs: Bytes = np.stack([packed & LARGEST, packed >> 4], axis=-1)
    return pairs.reshape(len(packed), -1)
