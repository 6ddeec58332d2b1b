"""Matrices of four bits in a checkpoint: the one form that the project keeps them in, whatever they were read from.

A packed checkpoint is a Hugging Face folder like any other, in which a quantised linear layer has, in place of
`<module>.weight` [N,K]:

    <module>.qweight      U8 [N, K/g, g/2]        codes, as graphs/packing.py says
    <module>.scales       [N, K/g]                F16, BF16 or F32
    <module>.zeros        U8 [N, ceil(K/g/2)]     zero points; where there are none they are 8
    <module>.input_scale  [K]                     if there is one, the module's input is multiplied by it first

and config.json a `quantization_config` of `graphs.records.quantization`.
"""

from dataclasses import dataclass
from typing import Any, Final, NoReturn

import numpy as np

from graphs import dtypes
from graphs.files.checkpoint import Checkpoint, TensorRef
from graphs.packing import GROUPS, MIDDLE, check_scales, dequantise, pack, pack_zeros
from graphs.records.errors import InputError

QWEIGHT, SCALES, ZEROS, INPUT_SCALE = "qweight", "scales", "zeros", "input_scale"
PARTS: Final = (QWEIGHT, SCALES, ZEROS, INPUT_SCALE)


@dataclass(frozen=True)
class PackedLinear:
    """One quantised matrix [n,k] in groups of `group` along k; where its tensors lie."""

    module: str
    qweight: TensorRef
    scales: TensorRef
    zeros: TensorRef | None
    input_scale: TensorRef | None
    n: int
    k: int
    group: int
    bits: int = 4

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        parts = (self.qweight, self.scales, self.zeros, self.input_scale)
        return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True)
class PackedMatrix:
    """The same as arrays: what is written for one module."""

    qweight: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None
    input_scale: np.ndarray | None = None

    @staticmethod
    def of(
        codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, input_scale: np.ndarray | None = None
    ) -> "PackedMatrix":
        """Of codes [N,K] and zeros [N,K/g], 0 to 15; zeros that are all 8 are left out.

        Raises InputError for other numbers, groups that cannot be stored, and scales that are not finite.
        """
        check_scales(scales)
        group = codes.shape[1] // max(1, scales.shape[1])
        symmetric = zeros is None or bool((zeros == MIDDLE).all())
        points = None if zeros is None or symmetric else pack_zeros(zeros)
        return PackedMatrix(pack(codes, group), scales, points, input_scale)

    def named(self, module: str) -> dict[str, np.ndarray]:
        """The arrays by their names in a checkpoint."""
        parts = {QWEIGHT: self.qweight, SCALES: self.scales, ZEROS: self.zeros, INPUT_SCALE: self.input_scale}
        return {f"{module}.{part}": array for part, array in parts.items() if array is not None}

    def numbers(self, dtype: np.dtype[Any] | None = None) -> np.ndarray:
        """The matrix [N,K] as `read_matrix` gives it."""
        return dequantise(self.qweight, self.scales, self.zeros, dtype=dtype)


def packed_linear(checkpoint: Checkpoint, module: str) -> PackedLinear | None:
    """The packed matrix of a module by its canonical name; None where the checkpoint has none for it.

    Raises InputError for tensors whose shapes or types do not fit together.
    """
    parts = {part: checkpoint.tensors.get(f"{module}.{part}") for part in PARTS}
    qweight = parts[QWEIGHT]
    if qweight is None:
        return None
    scales = checkpoint[f"{module}.{SCALES}"]
    if qweight.dtype != "U8" or len(qweight.shape) != 3 or 2 * qweight.shape[2] not in GROUPS:
        _refuse(qweight, f"U8 [N, K/g, g/2] with groups g of {', '.join(map(str, GROUPS))}")
    rows, groups, group = qweight.shape[0], qweight.shape[1], 2 * qweight.shape[2]
    linear = PackedLinear(
        module, qweight, scales, parts[ZEROS], parts[INPUT_SCALE], n=rows, k=groups * group, group=group
    )
    _check(scales, (rows, groups), of_float=True)
    if linear.zeros is not None:
        _check(linear.zeros, (rows, -(-groups // 2)), of_float=False)
    if linear.input_scale is not None:
        _check(linear.input_scale, (linear.k,), of_float=True)
    return linear


def check_packed(checkpoint: Checkpoint) -> None:
    """Read the scales of all packed matrices; raises InputError for one that is not finite, naming its tensor."""
    for name, ref in checkpoint.tensors.items():
        module, _, part = name.rpartition(".")
        if part in (SCALES, INPUT_SCALE) and f"{module}.{QWEIGHT}" in checkpoint.tensors:
            check_scales(ref.read(), f"{ref.shard}: {ref.stored_name}")


def read_matrix(checkpoint: Checkpoint, module: str, dtype: np.dtype[Any] | None = None) -> np.ndarray:
    """A packed matrix [N,K] as numbers, (q - z) * s, rounded once to `dtype` (by default the type of its scales).

    Its `input_scale` is left out. Raises InputError for a module that is not packed.
    """
    linear = packed_linear(checkpoint, module)
    if linear is None:
        checkpoint[f"{module}.{QWEIGHT}"]  # raises, naming it
        raise AssertionError
    zeros = None if linear.zeros is None else linear.zeros.read()
    return dequantise(linear.qweight.read(), linear.scales.read(), zeros, dtype=dtype)


def read_tensor(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A tensor by its canonical name as transformers' modules have it; stored ones are memory-mapped.

    A packed `<module>.weight` is made of its codes in float32, where the product with scales of 16 bits is exact, with
    the input's scale multiplied into the columns. Raises InputError for a tensor that is not there either way.
    """
    module = name.removesuffix(".weight")
    linear = packed_linear(checkpoint, module) if name.endswith(".weight") else None
    if linear is None:
        return checkpoint[name].read()
    matrix = read_matrix(checkpoint, module, np.dtype(np.float32))
    if linear.input_scale is not None:
        matrix *= linear.input_scale.read().astype(np.float32)
    return matrix


def _check(ref: TensorRef, shape: tuple[int, ...], *, of_float: bool) -> None:
    fits = dtypes.BY_SAFETENSORS[ref.dtype].is_precision if of_float else ref.dtype == "U8"
    if ref.shape != shape or not fits:
        _refuse(ref, f"{'F16, BF16 or F32' if of_float else 'U8'} {list(shape)}, as its codes say")


def _refuse(ref: TensorRef, wanted: str) -> NoReturn:
    raise InputError(
        f"{ref.shard}: {ref.stored_name} is {ref.dtype} {list(ref.shape)}",
        wanted=wanted,
        do="get the checkpoint again, with its own quantization_config in config.json",
    )
