"""What verification needs of a reference run, as protocols: calibrate/reference/streamed_model.py makes such runs, and
the two
packages do not know each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class StageRun(Protocol):
    """What one stage of the reference did to one prompt."""

    @property
    def indices(self) -> Array:
        """Kept tokens [k] among those the stage chose from, ascending."""

    @property
    def absolute(self) -> Array:
        """The same among all V."""

    @property
    def scores(self) -> Array:
        """[V_i] float32, empty for keep 0."""

    @property
    def margin(self) -> float:
        """Narrowest relative gap of the scores at a cut."""


class SegmentRun(Protocol):
    """One segment of one prompt, real rows only, appended tokens included: S_i rows."""

    @property
    def last(self) -> int:
        """Row of the prompt's last token."""

    @property
    def hidden_in(self) -> Array:
        """[S_i, C]."""

    @property
    def hidden_out(self) -> Array:
        """[S_i, C]."""

    @property
    def cos(self) -> Array:
        """[S_i, D/2]."""

    @property
    def sin(self) -> Array:
        """[S_i, D/2]."""

    @property
    def keys(self) -> Mapping[int, Array]:
        """By layer [K, S_i, D], after RoPE."""

    @property
    def values(self) -> Mapping[int, Array]:
        """By layer [K, S_i, D]."""

    @property
    def query(self) -> Array:
        """[H, S_i, D] of the last layer, after RoPE."""


class EmbeddedRun(Protocol):
    """The unpruned sequence before layer 0, S rows."""

    @property
    def hidden(self) -> Array:
        """[S, C]."""

    @property
    def cos(self) -> Array:
        """[S, D/2]."""

    @property
    def sin(self) -> Array:
        """[S, D/2]."""

    @property
    def last(self) -> int:
        """Row of the prompt's last token."""


class ReferenceRun(Protocol):
    """One prompt through the reference under one plan."""

    @property
    def image_start(self) -> int:
        """P."""

    @property
    def logits(self) -> Array:
        """[1 + N, vocabulary] at the rows last .. last+N."""

    @property
    def stages(self) -> Sequence[StageRun]:
        """One for each stage of the plan."""

    @property
    def segments(self) -> Sequence[SegmentRun]:
        """One for each segment of the plan."""

    @property
    def embedded(self) -> EmbeddedRun | None:
        """The sequence before layer 0."""


@dataclass(frozen=True)
class VerifySample:
    """A picture's pixels [3,h,w] and features [V,C], and what the reference made of them; float32.

    `class_attention` [V] is the vision tower's, where the plan scores by it.
    """

    pixel_values: Array
    image_features: Array
    run: ReferenceRun
    class_attention: Array | None = None

    @property
    def embedded(self) -> EmbeddedRun:
        """The sequence before layer 0."""
        assert self.run.embedded is not None, "the reference run must record its segments"
        return self.run.embedded
