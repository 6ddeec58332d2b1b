"""Codes chosen column by column, each column's rounding error passed on to those that follow (GPTQ, arXiv 2210.17323).

With H = X^T X of the inputs, the error of the outputs is d H d^T. When column j is rounded by e, the columns after it
change by -e U[j, j+1:] / U[j, j], where U is the upper Cholesky factor of the inverse of H: the least error that is
left. H is kept and inverted in spans of columns along its diagonal, so that neither memory nor time grows with K^2;
errors are not passed on beyond a span.

Few rows say little about many columns: in directions that none of them has, errors would be free, and other pictures
have those directions. So H's diagonal is raised by its mean times columns / rows: as much in every direction as chance
alone moves the eigenvalues of so few rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from calibrate.quantise.rounding import Rounded, nearest, ranges

SPAN: Final = 4096  # columns whose errors are passed on to each other, at most
DAMPING: Final = 0.01  # of the mean of H's diagonal, added to it at least (as in GPTQ)
MOST_DAMPING: Final = 1000.0


def spans(width: int, group: int) -> list[slice]:
    """The columns [K] in spans of whole groups."""
    size = SPAN // group * group
    return [slice(start, min(start + size, width)) for start in range(0, width, size)]


def compensate_matrix(
    weight: torch.Tensor, factors: Sequence[torch.Tensor], group: int, *, symmetric: bool, dtype: torch.dtype
) -> Rounded:
    """Codes of a matrix [N,K]; `factors` are the `inverse_factor` of the inputs in each of its `spans`.

    A group's range is that of its columns when their turn comes. `dtype` stores the scales.
    """
    parts = [
        _span(weight[:, columns], factor, group, symmetric, dtype)
        for columns, factor in zip(spans(weight.shape[1], group), factors, strict=True)
    ]
    return Rounded(
        *(torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("codes", "scales", "zeros"))
    )


def _span(weight: torch.Tensor, factor: torch.Tensor, group: int, symmetric: bool, dtype: torch.dtype) -> Rounded:
    left = weight.clone()
    codes, scales, zeros = [], [], []
    for start in range(0, weight.shape[1], group):
        end = start + group
        part, inner = left[:, start:end], factor[start:end, start:end]
        scale, zero = ranges(part[:, None], symmetric=symmetric, dtype=dtype)
        errors = torch.empty_like(part)
        for j in range(group):
            rounded = Rounded(nearest(part[:, j, None, None], scale, zero)[:, 0], scale, zero)
            codes.append(rounded.codes)
            errors[:, j] = (part[:, j] - rounded.numbers()[:, 0]) / inner[j, j]
            part[:, j:].addr_(errors[:, j], inner[j, j:], alpha=-1)
        left[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
        scales.append(scale)
        zeros.append(zero)
    return Rounded(*(torch.cat(one, dim=1) for one in (codes, scales, zeros)))


def inverse_factor(gram: torch.Tensor, count: float) -> torch.Tensor:
    """U of the inverse of H, which is X^T X of `count` rows, damped as far as it takes.

    All matrices that read the same input share it.
    """
    mean, damping = float(gram.diagonal().mean()) or 1.0, max(DAMPING, len(gram) / max(count, 1.0))
    while True:
        damped = gram + damping * mean * torch.eye(len(gram))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper: torch.Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        assert damping < MOST_DAMPING, "a gram matrix has no large negative eigenvalues"
        damping *= 10
