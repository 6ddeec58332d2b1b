"""Positions of a prompt's tokens by transformers' own rule, so that the reference shares none with the graphs.

Most decoders number the tokens. Models with M-RoPE give each token a temporal, a vertical and a horizontal position;
what those are for a prompt with a picture, and where the text goes on, says transformers' own `get_rope_index`.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

PositionRule = Callable[[torch.Tensor, int, tuple[int, int]], torch.Tensor]
"""(prompt ids [n], generated tokens N, grid of image tokens) -> positions, int64 [n + N] or [3, n + N]."""

IMAGE = 1  # transformers' token type of a picture; text is 0


def position_rule(config: Any, image_token: int) -> PositionRule:
    """The rule of the model that `config`, its whole configuration object, describes."""
    if not hasattr(MODEL_MAPPING[type(config)], "get_rope_index"):
        return lambda ids, new_tokens, grid: torch.arange(len(ids) + new_tokens)
    with torch.device("meta"):  # the method belongs to the model, but no weight takes part
        model = AutoModel.from_config(config)
    merged = int(config.vision_config.spatial_merge_size)

    def positions(ids: torch.Tensor, new_tokens: int, grid: tuple[int, int]) -> torch.Tensor:
        # A generated token is text, also if it is the placeholder.
        types = torch.cat([(ids == image_token).int() * IMAGE, torch.zeros(new_tokens, dtype=torch.int32)])
        patches = torch.tensor([[1, grid[0] * merged, grid[1] * merged]])
        indices, _ = model.get_rope_index(torch.zeros(1, len(types), dtype=torch.int64), types[None], patches)
        rows: torch.Tensor = indices[:, 0]
        return rows

    return positions
