"""BtpGatherTokens in torch: the operator as it is defined. Every other form equals it bit for bit."""

import torch
from torch import Tensor

from graphs.ops.gather_tokens.schema import NAME, check
from graphs.records.errors import InputError


def reference(tokens: Tensor, indices: Tensor, *, start: int, count: int) -> Tensor:
    """tokens [B,S,...] of any float type, indices [B,k] integers in [0,count) -> [B,S-count+k,...]."""
    _check_tensors(tokens, indices)
    check(tokens.shape[1], indices.shape[1], start=start, count=count)
    strangers = indices[(indices < 0) | (indices >= count)]
    if strangers.numel():
        got = f"{NAME}: indices hold {strangers[:3].tolist()}"
        raise InputError(got, f"indices from 0 to {count - 1}", "use indices of image rows")
    kept = torch.stack([row[start + index.long()] for row, index in zip(tokens, indices, strict=True)])
    return torch.cat([tokens[:, :start], kept, tokens[:, start + count :]], dim=1)


def _check_tensors(tokens: Tensor, indices: Tensor) -> None:
    """Raise InputError unless the shapes and types are those of the schema."""

    def require(holds: bool, name: str, tensor: Tensor, wanted: str) -> None:
        if not holds:
            got = f"{NAME}: {name} is {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            raise InputError(got, wanted, f"reshape or convert {name}")

    require(tokens.ndim >= 2 and tokens.is_floating_point(), "tokens", tokens, "[B,S,...] of a float type")
    fits = indices.ndim == 2 and indices.shape[0] == tokens.shape[0] and indices.dtype in (torch.int32, torch.int64)
    require(fits, "indices", indices, f"[{tokens.shape[0]},k] int32")
