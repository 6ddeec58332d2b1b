"""Muon for the matrices of the layers, AdamW for everything else, under one learning rate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Muon:
    """Momentum whose step is made orthogonal (Jordan et al. 2024); matrices of one shape are worked on together.

    The step is scaled to the size AdamW's would have, so both take the same learning rate.
    """

    def __init__(self, parameters: Sequence[Tensor], momentum: float = 0.95) -> None:
        self._momentum = momentum
        self._groups: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            self._groups[parameter.shape].append(parameter)
        self._buffers = {shape: torch.zeros(len(group), *shape) for shape, group in self._groups.items()}

    @torch.no_grad()
    def step(self, rate: float, decay: float = 0.0) -> None:
        """Move every matrix; `decay` shrinks it by rate * decay first."""
        for shape, group in self._groups.items():
            buffers = self._buffers[shape]
            # A matrix that a phase does not train only decays: its last momentum would move it as far as a fresh
            # gradient does.
            moving = [i for i, parameter in enumerate(group) if parameter.grad is not None]
            for parameter in group:
                parameter.mul_(1 - rate * decay)
            if not moving:
                continue
            gradient = torch.stack([parameter.grad for parameter in group if parameter.grad is not None])
            buffer = buffers[moving].lerp_(gradient, 1 - self._momentum)
            buffers[moving] = buffer
            step = orthogonal(gradient.lerp(buffer, self._momentum)) * (0.2 * max(shape) ** 0.5)
            for i, change in zip(moving, step, strict=True):
                group[i].sub_(change, alpha=rate)

    def state_dict(self) -> dict[str, Any]:
        return {str(tuple(shape)): buffer for shape, buffer in self._buffers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for shape, buffer in self._buffers.items():
            buffer.copy_(state[str(tuple(shape))])


def orthogonal(matrices: Tensor) -> Tensor:
    """[n, rows, columns] -> nearly orthogonal matrices of the same shape, by five Newton-Schulz steps in bfloat16."""
    wide = matrices.shape[1] < matrices.shape[2]  # the products below are smallest for tall matrices
    x = matrices.transpose(1, 2) if wide else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)).bfloat16()
    for _ in range(5):
        square = x.transpose(1, 2) @ x
        x = 3.4445 * x + x @ (-4.7750 * square + 2.0315 * square @ square)
    upright: Tensor = x.transpose(1, 2) if wide else x
    return upright.float()


class Optimiser:
    """Both optimisers over the parameters that a phase trains."""

    def __init__(self, modules: list[nn.Module]) -> None:
        named = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if p.ndim == 2 and not _is_table(name)]
        self._rest = [p for name, p in named if p.ndim != 2 or _is_table(name)]
        self._all = [p for _, p in named]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(self._rest, betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, rate: float, clip: float = 1.0) -> float:
        """One step at a learning rate; returns the gradient's norm before clipping."""
        norm = float(nn.utils.clip_grad_norm_(self._all, clip))
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.muon.step(rate, decay=0.02)
        self.adam.step()
        for parameter in self._all:
            parameter.grad = None
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


def _is_table(name: str) -> bool:
    """Embeddings and output heads are looked up by row: orthogonal steps do not suit them."""
    return any(part in name for part in ("embed", "lm_head", "patch_head"))
