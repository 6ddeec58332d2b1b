"""Named examples of BtpLinear, made from seeds; every form of the operator is tested on them."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from graphs import dtypes
from graphs.packing import LARGEST, pack, pack_zeros

Array = npt.NDArray[Any]

# N and K of the decoders' projections: attention, its keys and values where they are fewer, up and gate, down, head.
MODEL_SHAPES: Final = {
    "llava-1.5-7b": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "llava-1.5-13b": ((5120, 5120), (13824, 5120), (5120, 13824)),
    "llava-1.6-7b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "qwen2.5-vl-7b": ((3584, 3584), (512, 3584), (18944, 3584), (3584, 18944)),
}


@dataclass(frozen=True)
class Case:
    """One call: x [M,K], qweight [N,K/group,group/2], scales [N,K/group], zeros, bias (or None); attributes."""

    name: str
    x: Array
    qweight: Array
    scales: Array
    zeros: Array | None
    bias: Array | None
    attributes: dict[str, int]

    @property
    def inputs(self) -> dict[str, Array]:
        """The inputs that are there, by name."""
        given = {name: getattr(self, name) for name in ("x", "qweight", "scales", "zeros", "bias")}
        return {name: array for name, array in given.items() if array is not None}


def make(
    name: str,
    m: int,
    n: int,
    k: int,
    group: int,
    *,
    zeros: bool = True,
    bias: bool = False,
    dtype: npt.DTypeLike = np.float32,
) -> Case:
    """A case of this shape; its numbers follow from `name` and are of the size that a decoder's are."""
    random = np.random.default_rng(np.frombuffer(name.encode(), np.uint8))
    codes = random.integers(0, LARGEST + 1, (n, k), np.uint8)
    points = random.integers(0, LARGEST + 1, (n, k // group), np.uint8)
    scales = random.lognormal(-1.5, 0.5, (n, k // group)) / np.sqrt(k)
    return Case(
        name,
        random.standard_normal((m, k), np.float32).astype(dtype),
        pack(codes, group),
        scales.astype(dtype),
        pack_zeros(points) if zeros else None,
        random.standard_normal(n).astype(dtype) if bias else None,
        {"bits": 4, "group": group},
    )


def cases() -> list[Case]:
    """Examples of all groups, types, inputs and sizes: one row to many, odd N, an odd number of groups."""
    groups = [make(f"group-{group}", 3, 24, 2 * group, group) for group in (16, 32, 64, 128, 256)]
    inputs = [
        make("plain", 2, 16, 64, 32, zeros=False),
        make("bias", 2, 16, 64, 32, zeros=False, bias=True),
        make("zeros-and-bias", 2, 16, 64, 32, bias=True),
    ]
    rows = [make(f"rows-{m}", m, 40, 96, 32, bias=True) for m in (1, 4, 8, 9, 17, 130)]
    odd = [
        make("one-of-each", 1, 1, 16, 16),
        make("one-column", 5, 1, 48, 16, bias=True),
        make("odd-n", 3, 37, 96, 32, bias=True),
        make("odd-groups", 3, 7, 11 * 64, 64),
        make("odd-groups-16", 19, 9, 7 * 16, 16, bias=True),
        make("one-group", 2, 5, 256, 256),
        make("long-k", 1, 6, 18944, 128),
        make("wide-n", 1, 300, 32, 16),
    ]
    kinds = [
        make(f"{case}-{np.dtype(dtype).name}", m, n, k, group, zeros=zeros, bias=bias, dtype=dtype)
        for dtype in (np.float16, dtypes.BFLOAT16)
        for case, m, n, k, group, zeros, bias in (
            ("decode", 1, 64, 512, 128, True, True),
            ("few-rows", 7, 33, 192, 64, False, True),
            ("few-rows-wide", 6, 210, 160, 32, True, True),
            ("few-rows-16", 5, 20, 7 * 16, 16, True, False),
            ("tile-of-64", 60, 40, 96, 32, True, True),
            ("prefill", 70, 48, 256, 32, True, False),
            ("many-rows", 150, 136, 320, 64, False, True),
            ("odd", 21, 9, 7 * 16, 16, True, True),
            ("long-k", 1, 6, 11008, 256, True, False),
            ("long-k-rows", 12, 10, 11008, 128, True, False),
        )
    ]
    return [*groups, *inputs, *rows, *odd, *kinds, *_special()]


def _special() -> list[Case]:
    """Scales of zero, codes at both ends, rows of zeros and of large numbers."""
    base = make("special", 3, 12, 128, 32)
    ends = np.random.default_rng(1).choice(np.array([0, LARGEST], np.uint8), (12, 128))
    loud = base.x * np.array([[1e4], [0], [1e-4]], np.float32)
    flat = base.scales * (np.arange(4) % 2).astype(np.float32)
    return [
        Case("codes-at-both-ends", base.x, pack(ends, 32), base.scales, base.zeros, None, base.attributes),
        Case("loud-and-silent-rows", loud, base.qweight, base.scales, base.zeros, None, base.attributes),
        Case("scales-of-zero", base.x, base.qweight, flat, base.zeros, None, base.attributes),
    ]
