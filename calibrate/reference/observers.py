"""What observers of a pass see of each layer, and what may change a layer before the runs go through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from graphs.records.plan import PruningPlan


@dataclass(frozen=True)
class LayerView:
    """One layer of one run as observers see it: [1, S_i, C] before and after, query and key after RoPE.

    `query` [1, H, S_i, D], `key` and `value` [1, K, S_i, D], `cos` and `sin` [1, S_i, D]; `kept` [V_i] are the image
    tokens there are, in the picture's numbering.
    """

    run: int
    layer: int
    module: nn.Module
    hidden_in: torch.Tensor
    hidden_out: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    last: int
    image_start: int
    image_tokens: int
    sample: int
    plan: PruningPlan
    kept: torch.Tensor


class Observer(Protocol):
    """Sees every layer of every run, and the head once at the end."""

    def see(self, view: LayerView) -> None:
        """Look at one layer of one run; `view.module` is loaded only now."""

    def finish(self, head: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """All layers are done; `head` maps hidden [..., C] to logits [..., vocabulary]."""


@dataclass(frozen=True)
class Rows:
    """What one run brings to a layer: hidden [1,S,C], cos and sin [1,S,D]; its text begins at row `text`."""

    hidden: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    text: int


class LayerEdit(Protocol):
    """Changes the weights of every layer before the runs go through it: what later layers see is what it made."""

    key: str
    """A hash of all that decides the changes."""

    def __call__(self, layer: int, module: nn.Module, rows: Sequence[Rows]) -> None:
        """The layer is loaded; `rows` are what each run brings to it, pruned already."""
