"""transformers under torch.compile: prefill and step are compiled once each, for the shapes they have.

The cache is transformers' StaticCache, whose rows are written in place, as `generate` has it when it compiles.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.peers import Array, Given, Opened, Program
from benchmarks.peers.transformers_eager import decoder


class Compiled:
    """Compiled when it is first called, which is before anything is timed."""

    def __init__(self, given: Given) -> None:
        import torch
        from transformers import StaticCache

        model, head = decoder(given, "sdpa")
        self._ids = torch.tensor(given.ids)
        self._cache = StaticCache(config=model.config, max_cache_len=self._ids.shape[1] + given.room)
        self._rows = 0

        def logits(ids: Any, positions: Any) -> Any:
            hidden = model(
                input_ids=ids, position_ids=positions[None], past_key_values=self._cache, use_cache=True
            ).last_hidden_state
            return head(hidden[:, -1])

        self._logits = torch.compile(logits, dynamic=False)

    def prefill(self) -> Array:
        self._cache.reset()
        self._rows = 0
        return self._run(self._ids)

    def step(self, ids: Sequence[int]) -> Array:
        import torch

        return self._run(torch.tensor(ids)[:, None])

    def _run(self, ids: Any) -> Array:
        import torch

        with torch.no_grad():
            logits: Array = self._logits(ids, torch.arange(self._rows, self._rows + ids.shape[1])).numpy()
        self._rows += ids.shape[1]
        return logits


def _open(given: Given) -> Opened:
    return Compiled(given)


PROGRAM = Program("transformers, torch.compile", "transformers", _open)
