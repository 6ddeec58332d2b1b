"""Programs that compute the same decoder, each in a process of its own that is told when to work.

A program is a file here with PROGRAM: a name, the module it needs, and what opens a model. `Process` starts one;
benchmarks/peers/worker.py is the other end. A process that waits for its turn blocks on its standard
input, so it takes nothing from the one that is measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Given:
    """What a program is to open.

    folder: the model as the program takes it. ids: the prompt, [B][S]. threads: of its operators. room: new tokens that
    the caches have room for. more: the program's own settings.
    """

    folder: str
    ids: Sequence[Sequence[int]]
    threads: int
    room: int
    more: dict[str, Any] = field(default_factory=dict)


class Opened(Protocol):
    """A model that is ready. Both answers are logits [B, vocab] of the last token in float32."""

    def prefill(self) -> Array:
        """The whole prompt, into empty caches."""

    def step(self, ids: Sequence[int]) -> Array:
        """One token more for each sample."""


@dataclass(frozen=True)
class Program:
    """How one is called in tables, which module it is found by, and how it opens a model."""

    label: str
    module: str
    open: Callable[[Given], Opened]
