"""Rounding a matrix to codes of four bits in groups.

A group's range [low, high] becomes a scale and a zero point: asymmetric s = (high - low) / 15, z = round(-low / s);
symmetric s = max|w| / 7, z = 8. Scales are rounded to the type that stores them before codes are chosen.

G = K/g groups; matrices are [N,K] float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphs.packing import LARGEST, MIDDLE


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


def round_matrix(weight: torch.Tensor, group: int, *, symmetric: bool, dtype: torch.dtype) -> Rounded:
    """Codes to the nearest; `dtype` stores the scales."""
    grouped = weight.view(len(weight), -1, group)
    scales, zeros = ranges(grouped, symmetric=symmetric, dtype=dtype)
    return Rounded(nearest(grouped, scales, zeros).view_as(weight), scales, zeros)


def ranges(grouped: torch.Tensor, *, symmetric: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros [N,G] of groups [N,G,g]."""
    low, high = grouped.amin(dim=-1).clamp(max=0), grouped.amax(dim=-1).clamp(min=0)
    exact = grouped.abs().amax(dim=-1) / (MIDDLE - 1) if symmetric else (high - low) / LARGEST
    scales = exact.to(dtype)
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))  # a group of zeros, or below the type's smallest
    if symmetric:
        return scales, torch.full_like(scales, MIDDLE, dtype=torch.uint8)
    return scales, (-low / scales.float()).round().clamp(0, LARGEST).to(torch.uint8)


def nearest(grouped: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """The codes of groups [N,G,g], as they lie."""
    codes = (grouped / scales.float()[..., None]).round_().add_(zeros.float()[..., None]).clamp_(0, LARGEST)
    return codes.to(torch.uint8)
