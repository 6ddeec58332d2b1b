"""Attention for training on a CPU: PyTorch's fused forward, and a backward that works one picture at a time.

PyTorch's own fused backward takes half of a training step here, because its bfloat16 products do not reach the matrix
units. One picture's scores fit into the cache, where plain products and one fused pass over the scores are faster.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The same as `attend` with PyTorch's own backward: slower here, but nothing is compiled."""
    return functional.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """[B, H, T, D] x [B, H, S, D] -> [B, H, T, D]; `mask` [T, S] is added to the scores, None means causal."""
    return _attend(query, key, value, mask)[0]  # type: ignore[no-any-return]


@torch.library.custom_op("btp_demo::attend", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    scale = query.shape[-1] ** -0.5
    out, sums = _forward(query, key, value, 0.0, mask is None, attn_mask=mask, scale=scale)
    return out.contiguous(), sums.contiguous()


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return _like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("btp_demo::attend_backward", mutates_args=())
def _attend_backward(
    change: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _like(query), _like(key), _like(value)
    added = causal_mask(query.shape[2]) if mask is None else mask
    picture_grads = _compiled()
    for i in range(len(query)):
        parts = picture_grads(change[i], query[i], key[i], value[i], out[i], sums[i], added)
        for grad, part in zip(grads, parts, strict=True):
            grad[i] = part
    return grads


@_attend_backward.register_fake
def _(
    change: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(query), _like(key), _like(value)


@lru_cache(maxsize=8)
def causal_mask(size: int) -> Tensor:
    """[size, size] float32: minus infinity above the diagonal."""
    return torch.triu(torch.full((size, size), float("-inf")), 1)


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`_picture_grads`, compiled where it is first used: only saying so imports the compiler, which takes a second."""
    return torch.compile(_picture_grads, dynamic=False)


def _picture_grads(
    change: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one picture's attention, [H, T, D] and [H, S, D], from the row sums the forward kept."""
    scale = query.shape[-1] ** -0.5
    chance = ((query @ key.transpose(-1, -2)).float() * scale + mask - sums[..., None]).exp()
    mean = (change.float() * out.float()).sum(-1, keepdim=True)
    slope = (chance * ((change @ value.transpose(-1, -2)).float() - mean) * scale).to(query.dtype)
    chance = chance.to(query.dtype)
    return slope @ key, slope.transpose(-1, -2) @ query, chance.transpose(-1, -2) @ change


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask = inputs
    ctx.mask = mask
    ctx.save_for_backward(query, key, value, *output)


def _backward(ctx: Any, change: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_attend_backward(change, *ctx.saved_tensors, ctx.mask), None


_attend.register_autograd(_backward, setup_context=_keep)
