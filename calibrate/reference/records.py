"""What goes into the streamed reference and what it records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from calibrate.reference.pruning_stage import StageRecord
from graphs.records.plan import PruningPlan


@dataclass(frozen=True)
class ReferenceInput:
    """One unpadded prompt of n tokens whose image placeholders are expanded to V tokens.

    `input_ids` [n] int64; `image_features` [V, C]; `new_tokens` are generated ids to check (or none);
    `class_attention` [V] float32 of the vision tower, for plans that score by it;
    `expected` are the ids of the answer that the model probably gives, to its end (or none: nobody knows);
    `position_ids` [n + N] or, for M-RoPE, [3, n + N]; None means the model's own rule
    (calibrate/reference/positions.py).
    """

    input_ids: torch.Tensor
    image_features: torch.Tensor
    new_tokens: tuple[int, ...] = ()
    position_ids: torch.Tensor | None = None
    class_attention: torch.Tensor | None = None
    expected: tuple[int, ...] = ()


@dataclass(frozen=True)
class SegmentRecord:
    """What went through decoder layers [start, stop): float32, only real tokens, S_i rows.

    `hidden_in` and `hidden_out` [S_i, C]; `cos`, `sin` [S_i, D/2]; `keys`, `values` by layer, [K, S_i, D], keys after
    RoPE; `query` [H, S_i, D] of the segment's last layer, after RoPE; `last` is the prompt's last token.
    """

    start: int
    stop: int
    last: int
    hidden_in: np.ndarray
    hidden_out: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    keys: dict[int, np.ndarray]
    values: dict[int, np.ndarray]
    query: np.ndarray


@dataclass(frozen=True)
class EmbeddedRecord:
    """The unpruned sequence before layer 0: `hidden` [S, C], `cos` and `sin` [S, D/2], `last` of the prompt."""

    hidden: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    last: int


@dataclass(frozen=True)
class RunRecord:
    """One prompt under one plan. `logits` [1 + N, vocabulary] at the rows last .. last+N; `image_start` is P.

    `embedded` and `segments` are present only if the run was asked to record them.
    """

    plan: PruningPlan
    sample: int
    image_start: int
    prompt_tokens: int
    logits: np.ndarray
    stages: tuple[StageRecord, ...]
    segments: tuple[Any, ...]  # SegmentRecord, or calibrate.reference.recording.KeptSegment where they are kept on disk
    embedded: EmbeddedRecord | None = None

    @property
    def next_tokens(self) -> list[int]:
        """The likeliest ids at the rows last .. last+N, ties to the lower id: what the reference would generate."""
        return [int(token) for token in self.logits.argmax(axis=1)]
