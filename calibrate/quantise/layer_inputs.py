"""What goes into a decoder layer's linear layers, gathered over all rows of all samples without keeping them.

Layers that read the same input share it: q, k and v; o; gate and up; down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from calibrate.quantise.compensate import spans
from calibrate.reference.decoder import forward
from calibrate.reference.observers import Rows

SHARED: Final = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
SAMPLED_ROWS: Final = 512  # that output errors are computed on


@dataclass
class InputStatistics:
    """Of rows [R,K], each times the root of what it counts: X^T X of each span of columns, and some rows [r,K].

    `magnitude` [K]: the mean of the inputs' magnitudes, rows counted likewise. `count`: how many rows of equal weight
    say as much, (sum of weights)^2 / sum of their squares.
    """

    magnitude: torch.Tensor
    grams: list[torch.Tensor]
    rows: torch.Tensor
    count: float

    def scaled(self, scale: torch.Tensor) -> InputStatistics:
        """The same of inputs that were divided by `scale` [K]."""
        parts = torch.split(scale, [len(gram) for gram in self.grams])
        grams = [gram / torch.outer(part, part) for gram, part in zip(self.grams, parts, strict=True)]
        return InputStatistics(self.magnitude / scale, grams, self.rows / scale, self.count)


class _Gatherer:
    """Adds up one input's statistics; `parts` says what the rows of the run that is under way count."""

    def __init__(self, group: int, parts: _Parts) -> None:
        self._group, self._parts = group, parts
        self._total: torch.Tensor | None = None
        self._grams: list[torch.Tensor] = []
        self._rows: list[torch.Tensor] = []

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        rows = inputs[0].detach().float()[0]
        weights, taken, counts = self._parts.of_run
        weighted = rows * weights.sqrt()[:, None]
        grams = [weighted[:, span].T @ weighted[:, span] for span in spans(rows.shape[1], self._group)]
        total = weights @ rows.abs()
        self._grams = [sum_.add_(gram) for sum_, gram in zip(self._grams, grams, strict=True)] if self._grams else grams
        self._total = total if self._total is None else self._total.add_(total)
        self._rows.append(weighted[taken] * counts.sqrt()[:, None])

    def statistics(self) -> InputStatistics:
        assert self._total is not None, "the layer was run"
        return InputStatistics(self._total / self._parts.total, self._grams, torch.cat(self._rows), self._parts.count)


class _Parts:
    """How much rows count, and which are kept: those after the picture as much together as all before.

    There are ten times as many image tokens as words, and the answer is made of the words' rows: with equal weights
    scales follow the picture and the error of the words grows.
    """

    def __init__(self, rows: Sequence[Rows]) -> None:
        self._before = sum(one.text for one in rows)
        self._after = sum(one.hidden.shape[1] - one.text for one in rows)
        self._weight = min(1.0, self._after / max(1, self._before))  # of a row before the end of the picture
        self._steps = [max(1, count // (SAMPLED_ROWS // 2)) for count in (self._before, self._after)]
        self.total = self._weight * self._before + self._after
        self.count = self.total**2 / max(1.0, self._weight**2 * self._before + self._after)
        self.of_run: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = (torch.empty(0),) * 3

    def enter(self, run: Rows) -> None:
        """The run that comes next: weights of its rows, which of them are kept, and for how many each stands."""
        count = run.hidden.shape[1]
        weights = torch.ones(count, device=run.hidden.device)
        weights[: run.text] = self._weight
        before, after = torch.arange(0, run.text, self._steps[0]), torch.arange(run.text, count, self._steps[1])
        pairs = zip((before, after), self._steps, strict=True)
        counts = torch.cat([torch.full((len(part),), float(step)) for part, step in pairs])
        self.of_run = weights, torch.cat([before, after]), counts.to(weights)


def gather_inputs(module: nn.Module, rows: Sequence[Rows], group: int) -> dict[str, InputStatistics]:
    """Run a loaded layer on all samples' rows and look at what its linear layers get, by the names in SHARED."""
    parts = _Parts(rows)
    gatherers = {name: _Gatherer(group, parts) for name in SHARED}
    hooks = [
        module.get_submodule(members[0]).register_forward_pre_hook(gatherers[name]) for name, members in SHARED.items()
    ]
    try:
        for run in rows:
            parts.enter(run)
            forward(module, run.hidden, run.cos, run.sin)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: gatherer.statistics() for name, gatherer in gatherers.items()}
