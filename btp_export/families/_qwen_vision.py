"""Qwen2.5-VL's vision tower for pictures of one size, with its window attention as a few batched attentions."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index


@dataclass(frozen=True)
class _Windows:
    """`count` windows of `size` patches each, one after another from patch `start` on."""

    start: int
    count: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.count * self.size


class ImageFeatures(nn.Module):
    """pixel_values [B*n,1176] -> image features [B,n/4,C], n patches a picture.

    What differs from transformers' forward, none of it in the numbers:
    1. Pictures are a batch, not one long sequence with borders.
    2. The patches' embedding is a matrix product: the convolution's kernel is as large as its input.
    3. Windows of the same size stand together (at most four sizes: inside, right, bottom, corner), so each layer
       runs one attention for each size, with no mask and no loop. A window's tokens see each other only, so the
       windows' order does not matter; it is undone at the end.
    4. Rotary tables are constants, in float32 in every precision, as in transformers.
    Linear layers get rows [B*n,C], not [B,n,C]: so torch.onnx makes them Gemm and leaves their weights as they are.
    """

    def __init__(self, tower: Any, grid: tuple[int, int]) -> None:
        """`tower`: transformers' vision module; `grid`: patches of a picture, down and across."""
        super().__init__()
        self.patch_embed, self.blocks, self.merger = tower.patch_embed, tower.blocks, tower.merger
        self.full = frozenset(tower.fullatt_block_indexes)
        self.patches, self.unit = grid[0] * grid[1], tower.spatial_merge_unit
        self.whole = [_Windows(0, 1, self.patches)]
        self.order, self.windows = self._arrange(tower, grid)
        self.back = torch.argsort(self.order)
        where = get_vision_position_ids(torch.tensor([[1, *grid]]), tower.spatial_merge_size)
        tables = [self._ordered(table, 1) for table in tower.rotary_pos_emb(where, where)]
        # [n,1,1,D/2] each, as both halves are the same. Not buffers: the module's precision must not reach them.
        self.tables = [table.chunk(2, dim=-1)[0][:, None, None] for table in tables]

    def _arrange(self, tower: Any, grid: tuple[int, int]) -> tuple[torch.Tensor, list[_Windows]]:
        """Order of the n/4 groups of merged patches, [n/4], and the windows it makes, by size."""
        index, borders = get_vision_window_index(
            torch.tensor([[1, *grid]]),
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        groups = (borders[1:] - borders[:-1]) // self.unit  # of merged patches in each window
        parts = sorted(index.split(groups.tolist()), key=len, reverse=True)  # stable: transformers' order otherwise
        runs: list[_Windows] = []
        for size in sorted({len(part) for part in parts}, reverse=True):
            count = sum(len(part) == size for part in parts)
            runs.append(_Windows(runs[-1].stop if runs else 0, count, size * self.unit))
        return torch.cat(parts), runs

    def _ordered(self, rows: torch.Tensor, batch: int) -> torch.Tensor:
        """Rows [B*n,C] of patches with the groups of merged patches in the windows' order."""
        groups = rows.reshape(batch, self.patches // self.unit, -1)
        return groups.index_select(1, self.order.to(rows.device)).reshape(rows.shape)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        batch = pixel_values.shape[0] // self.patches
        rows = self._ordered(functional.linear(pixel_values, self.patch_embed.proj.weight.flatten(1)), batch)
        cos, sin = (table.to(rows.device) for table in self.tables)
        for layer, block in enumerate(self.blocks):
            windows = self.whole if layer in self.full else self.windows
            rows = rows + self._attention(block.attn, block.norm1(rows), batch, windows, cos, sin)
            rows = rows + block.mlp(block.norm2(rows))
        merged = self.merger(rows).reshape(batch, self.patches // self.unit, -1)
        features: torch.Tensor = merged.index_select(1, self.back.to(rows.device))
        return features

    def _attention(
        self,
        attention: Any,
        rows: torch.Tensor,
        batch: int,
        windows: list[_Windows],
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """Attention within each window on rows [B*n,C], with the weights of transformers' module."""
        heads, width = attention.num_heads, rows.shape[1]
        stacked = attention.qkv(rows).reshape(batch, self.patches, 3 * width)
        queries_keys, value = torch.split(stacked, [2 * width, width], dim=-1)
        wide = queries_keys.reshape(batch, self.patches, 2, heads, -1).float()  # transformers rotates in float32
        left, right = wide.chunk(2, dim=-1)
        rotated = torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(rows.dtype)
        query, key = rotated.reshape(batch, self.patches, 2 * width).chunk(2, dim=-1)
        contexts = []
        for run in windows:
            taken = [part[:, run.start : run.stop] for part in (query, key, value)]
            q, k, v = (part.reshape(batch * run.count, run.size, heads, -1).transpose(1, 2) for part in taken)
            context = functional.scaled_dot_product_attention(q, k, v, scale=attention.scaling)
            contexts.append(context.transpose(1, 2).reshape(batch, run.count * run.size, width))
        joined = torch.cat(contexts, dim=1) if len(contexts) > 1 else contexts[0]
        projected: torch.Tensor = attention.proj(joined.reshape(rows.shape))
        return projected
