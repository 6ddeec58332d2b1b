"""Rounding a matrix to codes of four bits in groups, plainly or with ranges clipped where that lowers the output error.

A group's range [low, high] becomes a scale and a zero point: asymmetric s = (high - low) / 15, z = round(-low / s);
symmetric s = max|w| / 7, z = 8. Scales are rounded to the type that stores them before codes are chosen.

G = K/g groups; matrices are [N,K] float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from graphs.packing import LARGEST, MIDDLE

SHRINKS: Final = tuple(1 - step / 20 for step in range(11))  # of a group's range: 1 to 0.5


@dataclass(frozen=True)
class Rounded:
    """Codes [N,K] and zeros [N,G], 0 to 15; scales [N,G] in the type that stores them."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def numbers(self) -> torch.Tensor:
        """(q - z) s in float32 [N,K], as BtpLinear has it."""
        n, groups = self.scales.shape
        steps = self.codes.view(n, groups, -1).float() - self.zeros.float()[..., None]
        return (steps * self.scales.float()[..., None]).view(n, -1)


def round_matrix(
    weight: torch.Tensor,
    group: int,
    *,
    symmetric: bool,
    dtype: torch.dtype,
    shrink: torch.Tensor | float = 1.0,
) -> Rounded:
    """Each group's range times `shrink` (a number, or [N,G]), and codes to the nearest; `dtype` stores the scales."""
    grouped = weight.view(len(weight), -1, group)
    if symmetric:
        exact = grouped.abs().amax(dim=-1) * shrink / (MIDDLE - 1)
    else:
        low, high = grouped.amin(dim=-1).clamp(max=0) * shrink, grouped.amax(dim=-1).clamp(min=0) * shrink
        exact = (high - low) / LARGEST
    stored = exact.to(dtype)
    stored = torch.where(stored > 0, stored, torch.ones_like(stored))  # a group of zeros, or below the type's smallest
    scales = stored.float()
    zeros = torch.full_like(scales, MIDDLE) if symmetric else (-low / scales).round().clamp(0, LARGEST)
    codes = (grouped / scales[..., None]).round_().add_(zeros[..., None]).clamp_(0, LARGEST)
    return Rounded(codes.to(torch.uint8).view_as(weight), stored, zeros.to(torch.uint8))


def clip_matrix(
    weight: torch.Tensor, gram: torch.Tensor, group: int, *, symmetric: bool, dtype: torch.dtype
) -> Rounded:
    """The rounding whose ranges have the least output error, each group of a row for itself.

    `gram` [G,g,g] is X^T X of the inputs within each group, so that d^T gram d is the squared error of the outputs.
    """
    best: torch.Tensor | None = None
    chosen = torch.ones(len(weight), weight.shape[1] // group)
    for shrink in SHRINKS:
        rounded = round_matrix(weight, group, symmetric=symmetric, dtype=dtype, shrink=shrink)
        error = group_errors(rounded.numbers() - weight, gram)
        if best is None:
            best = error
            continue
        better = error < best
        chosen[better] = shrink
        best = torch.where(better, error, best)
    return round_matrix(weight, group, symmetric=symmetric, dtype=dtype, shrink=chosen)


def group_errors(difference: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """d^T gram d of every group [N,G] of a difference [N,K]; `gram` [G,g,g]."""
    groups, size = gram.shape[:2]
    parts = difference.view(-1, groups, size).transpose(0, 1)  # [G,N,g]
    return (torch.bmm(parts, gram) * parts).sum(dim=-1).T
