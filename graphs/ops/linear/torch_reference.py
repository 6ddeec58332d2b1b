"""BtpLinear in torch: the operator as it is defined. Every other form agrees with it within the rounding of y."""

import torch
from torch import Tensor

from graphs.ops.linear.schema import NAME, check
from graphs.packing import MIDDLE
from graphs.records.errors import InputError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def reference(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group: int,
) -> Tensor:
    """y [M,N] of x's type.

    x [M,K], qweight [N,K/group,group/2] uint8, scales [N,K/group], zeros [N,ceil(K/group/2)] uint8, bias [N]; scales
    and bias of x's type. Raises InputError for tensors or attributes that do not fit; the message names them.
    """
    _check_types(x, qweight, scales, zeros, bias)
    shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (zeros, bias)]
    check(tuple(x.shape), tuple(qweight.shape), tuple(scales.shape), *shapes, bits=bits, group=group)
    y = x.float() @ dequantised(qweight, scales, zeros).float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def dequantised(qweight: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """w [N,K] of the type of scales: (q - z) s. The float32 product is rounded once; for 16-bit scales it is exact."""
    n, groups = scales.shape
    codes = _nibbles(qweight).reshape(n, groups, -1)
    points = torch.full_like(scales, MIDDLE, dtype=torch.int16) if zeros is None else _nibbles(zeros)[:, :groups]
    return ((codes - points[:, :, None]).float() * scales.float()[:, :, None]).to(scales.dtype).reshape(n, -1)


def _nibbles(packed: Tensor) -> Tensor:
    """[N,...] uint8 -> [N,two numbers a byte] int16, the low nibble first."""
    flat = packed.reshape(len(packed), -1).to(torch.int16)
    return torch.stack([flat & 15, flat >> 4], dim=-1).reshape(len(packed), -1)


def _check_types(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None) -> None:
    def require(name: str, tensor: Tensor | None, *wanted: torch.dtype) -> None:
        if tensor is not None and tensor.dtype not in wanted:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in wanted)
            got = f"{NAME}: {name} is {str(tensor.dtype).removeprefix('torch.')}"
            raise InputError(got, names, f"convert {name}")

    require("x", x, *FLOATS)
    require("qweight", qweight, torch.uint8)
    require("scales", scales, x.dtype)
    require("zeros", zeros, torch.uint8)
    require("bias", bias, x.dtype)
