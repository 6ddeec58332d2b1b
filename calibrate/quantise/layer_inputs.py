"""What goes into a decoder layer's linear layers, gathered over all rows of all samples without keeping them.

Layers that read the same input share it: q, k and v; o; gate and up; down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from calibrate.reference.streamed_model import Rows, forward

SHARED: Final = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
SAMPLED_ROWS: Final = 512  # that output errors are computed on


@dataclass
class InputStatistics:
    """Of rows [R,K]: their mean magnitudes [K], X^T X within each group [G,g,g], and some rows [r,K] themselves."""

    magnitude: torch.Tensor
    gram: torch.Tensor
    rows: torch.Tensor

    def scaled(self, scale: torch.Tensor) -> InputStatistics:
        """The same of inputs that were divided by `scale` [K]."""
        by_group = scale.view(len(self.gram), -1)
        gram = self.gram / (by_group[:, :, None] * by_group[:, None, :])
        return InputStatistics(self.magnitude / scale, gram, self.rows / scale)


class _Gatherer:
    """Adds up one input's statistics; `step` is the distance of the rows that are kept."""

    def __init__(self, group: int, step: int) -> None:
        self._group, self._step = group, step
        self._count = 0
        self._total: torch.Tensor | None = None
        self._gram: torch.Tensor | None = None
        self._rows: list[torch.Tensor] = []

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        rows = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1])
        grouped = rows.view(len(rows), -1, self._group).permute(1, 2, 0)  # [G,g,R]
        gram, total = torch.bmm(grouped, grouped.transpose(1, 2)), rows.abs().sum(dim=0)
        self._gram = gram if self._gram is None else self._gram.add_(gram)
        self._total = total if self._total is None else self._total.add_(total)
        first = -self._count % self._step
        self._rows.append(rows[first :: self._step].clone())
        self._count += len(rows)

    def statistics(self) -> InputStatistics:
        assert self._total is not None and self._gram is not None, "the layer was run"
        return InputStatistics(self._total / self._count, self._gram, torch.cat(self._rows))


def gather_inputs(module: nn.Module, rows: Sequence[Rows], group: int) -> dict[str, InputStatistics]:
    """Run a loaded layer on all samples' rows and look at what its linear layers get, by the names in SHARED."""
    count = sum(hidden.shape[1] for hidden, _, _ in rows)
    step = max(1, count // SAMPLED_ROWS)
    gatherers = {name: _Gatherer(group, step) for name in SHARED}
    hooks = [
        module.get_submodule(members[0]).register_forward_pre_hook(gatherers[name]) for name, members in SHARED.items()
    ]
    try:
        for hidden, cos, sin in rows:
            forward(module, hidden, cos, sin)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: gatherer.statistics() for name, gatherer in gatherers.items()}
