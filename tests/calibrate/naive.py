"""A second, plain implementation of pruning for comparison: written from the contract, shares no code with ours."""

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from graphs.records.plan import PruningPlan
from tests.graphs.ops import oracle


def prefill(
    model: LlavaForConditionalGeneration, input_ids: torch.Tensor, features: torch.Tensor, plan: PruningPlan, start: int
) -> tuple[torch.Tensor, list[list[int]], list[torch.Tensor]]:
    """Whole model in memory, one prompt [n]: logits of the last token, absolute kept sets, hidden after each layer."""
    decoder = model.model.language_model
    hidden = decoder.embed_tokens(input_ids)[None].clone()
    hidden[0, start : start + plan.image_tokens] = features
    cos, sin = decoder.rotary_emb(hidden, torch.arange(len(input_ids))[None])
    alive, kept, states = list(range(plan.image_tokens)), [], []
    query = key = None
    for number, layer in enumerate(decoder.layers):
        for stage in plan.stages:
            if stage.layer != number:
                continue
            count = len(alive)
            image = hidden[0, start : start + count]
            picks: list[int] = []
            if stage.keep:
                if query is None or key is None:
                    scores = np.zeros(count, np.float32)
                else:
                    heads = query.shape[1] // key.shape[1]
                    products = query[0, :, -1:] @ key[0].repeat_interleave(heads, 0).transpose(1, 2)
                    weights = torch.softmax(products / query.shape[-1] ** 0.5, -1)
                    scores = weights[:, 0, start : start + count].mean(0).numpy()
                unit = torch.nn.functional.normalize(image, dim=-1)
                picks = oracle.select_stage(
                    stage,
                    scores,
                    (unit @ unit.T).numpy() if stage.needs_similarity else None,
                    oracle.grid_seeds(plan.grid, stage.seeds),
                )
            rows = [*range(start), *(start + p for p in picks), *range(start + count, hidden.shape[1])]
            hidden, cos, sin = hidden[:, rows], cos[:, rows], sin[:, rows]
            alive = [alive[p] for p in picks]
            kept.append(alive)
        normed = layer.input_layernorm(hidden)
        attention = layer.self_attn
        shape = (1, hidden.shape[1], -1, attention.head_dim)
        query, key = apply_rotary_pos_emb(
            attention.q_proj(normed).view(shape).transpose(1, 2),
            attention.k_proj(normed).view(shape).transpose(1, 2),
            cos,
            sin,
        )
        hidden = layer(hidden, attention_mask=None, position_embeddings=(cos, sin))
        states.append(hidden)
    return model.lm_head(decoder.norm(hidden))[0, -1], kept, states
