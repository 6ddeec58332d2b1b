"""transformers' own decoder layers run piece by piece, as the independent reference of the segment graphs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from tests.graphs.models import Sample


@dataclass(frozen=True)
class Expected:
    hidden: torch.Tensor  # [B,S,C]
    keys: dict[int, torch.Tensor]  # [B,K,S,D]
    values: dict[int, torch.Tensor]
    query: torch.Tensor  # [B,H,S,D] of the last layer, after RoPE


def run_layers(
    sample: Sample, start: int, stop: int, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> Expected:
    """Layers [start, stop) on hidden [B,S,C] with cos and sin [B,S,D/2]; full causal attention."""
    decoder = sample.module.model.language_model
    tables = (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))
    tokens = hidden.shape[1]
    mask = torch.full((tokens, tokens), float("-inf")).triu(1)[None, None]
    cache = DynamicCache()
    projected: list[torch.Tensor] = []
    hook = decoder.layers[stop - 1].self_attn.q_proj.register_forward_hook(lambda *args: projected.append(args[2]))
    for layer in decoder.layers[start:stop]:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=tables, past_key_values=cache)
    hook.remove()
    query = projected[0].unflatten(-1, (-1, sample.spec.decoder.head_dim)).transpose(1, 2)
    modeling = importlib.import_module(type(decoder).__module__)
    query, _ = modeling.apply_rotary_pos_emb(query, query, *tables)
    keys = {layer: cache.layers[layer].keys for layer in range(start, stop)}
    values = {layer: cache.layers[layer].values for layer in range(start, stop)}
    return Expected(hidden, keys, values, query)


def logits_at(sample: Sample, hidden: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Final norm and lm_head of the row at `last` of each item."""
    rows = hidden[torch.arange(len(hidden)), last.long()]
    return sample.module.lm_head(sample.module.model.language_model.norm(rows)).float()


def embeddings(sample: Sample, batch: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B,S] (image tokens in place) and random-image embeddings [B,S,C] by transformers' own merge."""
    profile = sample.profile(batch)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, sample.spec.decoder.vocab_size, (batch, profile.total_tokens), generator=generator)
    image = slice(profile.prefix_tokens, profile.prefix_tokens + profile.image_tokens)
    ids[:, image] = sample.spec.image_token_id
    pixels = torch.randn(batch, 3, *profile.image_size, generator=generator)
    model = sample.module.model
    hidden = model.get_input_embeddings()(ids)
    hidden[:, image] = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))
    return ids, hidden
