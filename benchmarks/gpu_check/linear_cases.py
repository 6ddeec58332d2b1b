"""Large cases of BtpLinear: decode and prefill of the models in use. The file holds 256 rows of w and 16 of x, stacked.

Decode is timed on matrices larger than a GPU's L2 (50 MB on H100 and H200), as a whole model is: several layers' rows
one below the other. Prefill is bound by arithmetic, so its matrices are those of one layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.gpu_check.calls import Array, Given, Stacked, from_torch, to_torch
from graphs import dtypes
from graphs.ops.linear.cases import make

LINEAR = "linear"
ROWS = 256  # of w in the file
BEYOND_L2 = 65536  # rows: 134 MB of codes for K 4096


def large_cases() -> Iterator[Given]:
    """Timed; the smallest and largest of decode and prefill are replayed too."""
    for m in (1, 4, 8):
        tags = ("replayed", "green") if m == 1 else ()
        yield stacked(f"decode-{m}", m, BEYOND_L2, 4096, 128, tags=tags)
    yield stacked("decode-1-down", 1, BEYOND_L2 // 2, 11008, 128)
    yield stacked("decode-1-qwen", 1, BEYOND_L2, 3584, 128, dtype=dtypes.BFLOAT16)
    yield stacked("decode-1-group-32", 1, BEYOND_L2, 4096, 32)
    yield stacked("decode-1-keys", 1, 512, 3584, 128)
    for m in (16, 64, 128, 640):
        tags = ("replayed", "green") if m == 128 else ()
        yield stacked(f"prefill-{m}", m, 4096, 4096, 128, tags=tags)
    yield stacked("prefill-160-up", 160, 11008, 4096, 128)
    yield stacked("prefill-160-down", 160, 4096, 11008, 128, tags=("replayed",))
    yield stacked("prefill-128-qwen", 128, 3584, 3584, 128, dtype=dtypes.BFLOAT16)
    yield stacked("prefill-128-group-16", 128, 4096, 4096, 16)


def stacked(
    name: str,
    m: int,
    n: int,
    k: int,
    group: int,
    *,
    dtype: npt.DTypeLike = np.float16,
    tags: tuple[str, ...] = (),
) -> Given:
    """x [m,k] times w [n,k]; n is a multiple of 256."""
    from graphs.ops.linear import reference

    rows = 16 if m % 16 == 0 else m
    case = make(f"{k}-{group}", rows, ROWS, k, group, dtype=dtype)  # of one shape one w, which the file holds once
    tensors = {key: to_torch(value) for key, value in case.inputs.items()}
    part = from_torch(reference(**tensors, **case.attributes))
    inputs: dict[str, Any] = {key: Stacked(value, n // ROWS) for key, value in case.inputs.items()}
    inputs["x"] = Stacked(case.x, m // rows)
    return Given(
        LINEAR, name, inputs, case.attributes, ("large", "timed", *tags), wanted=part, tiles=(n // ROWS, m // rows)
    )


@dataclass(frozen=True)
class Product:
    """What the floor of a product is made of: bytes that are read and written once, and operations."""

    bytes: int
    operations: int


def product_of(given: Given, wanted: Array) -> Product:
    """The product of a case whose output is known."""
    moved, columns = wanted.nbytes, 0
    for name, tensor in given.inputs.items():
        assert isinstance(tensor, np.ndarray | Stacked)
        part, times = (tensor.part, tensor.times) if isinstance(tensor, Stacked) else (tensor, 1)
        moved += part.nbytes * times
        columns = part.shape[1] if name == "x" else columns
    return Product(moved, 2 * wanted.size * columns)
