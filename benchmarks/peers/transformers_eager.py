"""transformers without compilation: `attention` is "eager" or "sdpa" (PyTorch's own attention)."""

from collections.abc import Sequence
from typing import Any

from benchmarks.peers import Array, Given, Opened, Program


def decoder(given: Given, attention: str) -> tuple[Any, Any]:
    """The decoder of a LLaVA and its output projection, in float32, with so many threads."""
    import torch
    from transformers import LlavaForConditionalGeneration

    torch.set_num_threads(given.threads)
    model = LlavaForConditionalGeneration.from_pretrained(
        given.folder, dtype=torch.float32, attn_implementation=attention
    ).eval()
    return model.model.language_model, model.lm_head


class Eager:
    """The way `generate` calls a model: a cache that grows by concatenation."""

    def __init__(self, given: Given, attention: str) -> None:
        import torch

        self._decoder, self._head = decoder(given, attention)
        self._ids = torch.tensor(given.ids)
        self._cache: Any = None

    def prefill(self) -> Array:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._decoder.config)
        return self._run(self._ids)

    def step(self, ids: Sequence[int]) -> Array:
        import torch

        return self._run(torch.tensor(ids)[:, None])

    def _run(self, ids: Any) -> Array:
        import torch

        with torch.inference_mode():
            hidden = self._decoder(input_ids=ids, past_key_values=self._cache, use_cache=True).last_hidden_state
            logits: Array = self._head(hidden[:, -1]).numpy()
        return logits


def _open(given: Given) -> Opened:
    return Eager(given, "eager")


PROGRAM = Program("transformers, eager attention", "transformers", _open)
