"""A second, plain implementation of pruning for comparison: written from the contract, shares no code with ours."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from graphs.records.plan import PruningPlan


def select(
    scores: np.ndarray,
    similarity: np.ndarray | None,
    seeds: Sequence[int],
    *,
    keep: int,
    attention_quota: int,
    diversity_quota: int,
    pool: int,
    boundary: int,
) -> list[int]:
    """BtpSelectTokens on one item, rule by rule, in Python loops: the kept indices, ascending."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    candidates = order[:pool]
    low = [i for i in candidates if i < boundary]
    picks = (low + [i for i in candidates if i >= boundary])[:attention_quota]
    base: list[int] = []
    for token in [*picks, *farthest(similarity, [], diversity_quota), *seeds]:
        if token not in base:
            base.append(token)
    base = base[:keep]
    if similarity is None:
        rest = [i for i in order if i not in base]
        return sorted(base + rest[: keep - len(base)])
    return sorted(base + farthest(similarity, base, keep - len(base)))


def farthest(similarity: np.ndarray | None, start: Sequence[int], count: int) -> list[int]:
    """`count` more tokens by farthest-point selection from `start`."""
    if count == 0 or similarity is None:
        return []
    distance = np.float32(1.0) - similarity.astype(np.float32)
    tokens = range(len(distance))
    chosen, added = list(start), []
    while len(added) < count:
        best, best_gap = -1, -np.inf
        for token in tokens:
            if token in chosen:
                continue
            others = chosen or [i for i in tokens if i != token]
            gap = distance[token, others].min()
            if gap > best_gap:
                best, best_gap = token, gap
        chosen.append(best)
        added.append(best)
    return added


def grid_seeds(rows: int, columns: int, count: int) -> list[int]:
    """Well spread tokens of the grid, from token 0 on, Euclidean."""
    at = np.array([(r, c) for r in range(rows) for c in range(columns)], dtype=np.int64)
    squared = ((at[:, None] - at[None]) ** 2).sum(-1)
    chosen = [0]
    while len(chosen) < count:
        gaps = squared[:, chosen].min(1)
        gaps[chosen] = -1
        chosen.append(int(gaps.argmax()))
    return chosen[:count]


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
                picks = select(
                    scores,
                    (unit @ unit.T).numpy() if stage.needs_similarity else None,
                    grid_seeds(*plan.grid, stage.seeds) if stage.seeds else [],
                    keep=stage.keep,
                    attention_quota=stage.attention_quota,
                    diversity_quota=stage.diversity_quota,
                    pool=stage.pool,
                    boundary=stage.boundary,
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
