"""Importance scores and token similarity in PyTorch: the definitions that the selection graphs are built to.

The streamed reference calls these; graphs/building/onnx_scores.py writes the same formulas as ONNX nodes, and a test
compares the two. Everything runs in float32. B batch, n current image tokens, S sequence, P tokens before the image, T
after.
"""

from typing import TYPE_CHECKING

from graphs.pruning.spatial_set import NORM_EPSILON, random_scores, stage_pivots
from graphs.records.errors import InputError
from graphs.records.plan import ATTENTION_RULES, PruningPlan, Stage

if TYPE_CHECKING:
    from torch import Tensor

TEXT_TOLERANCE = 1e-6  # similar-text: a row this close below the average counts as reaching it


def unit_rows(hidden: "Tensor") -> "Tensor":
    """hidden [B,n,C] divided by its row norms, float32; rows with norm below NORM_EPSILON become (nearly) zero."""
    wide = hidden.float()
    norm = wide.square().sum(-1, keepdim=True).sqrt()
    return wide / norm.clamp_min(NORM_EPSILON)


def cosine_similarity(hidden: "Tensor") -> "Tensor":
    """Cosine of every pair of rows: hidden [B,n,C] -> [B,n,n] float32."""
    unit = unit_rows(hidden)
    return unit @ unit.transpose(1, 2)


def centred(image: "Tensor") -> "Tensor":
    """image [B,n,C] minus its mean over the n tokens, float32."""
    wide = image.float()
    return wide - wide.mean(1, keepdim=True)


def stage_similarity(stage: Stage, image: "Tensor") -> "Tensor":
    """What the selection takes as similarity of the stage's tokens image [B,n,C]: [B,n,n] float32."""
    return cosine_similarity(centred(image) if stage.features == "centred" else image)


def query_rows(plan: PruningPlan, stage: int) -> str:
    """Which query rows a stage looks from: "last" (the row at `last`) or "text" (the T rows after the image)."""
    return "text" if plan.importance_of(stage) in ("mean-text", "similar-text") else "last"


def uses_attention(plan: PruningPlan, stage: int) -> bool:
    """Whether the stage's scores need the query and the key of the layer before it."""
    return plan.stages[stage].keep > 0 and plan.stages[stage].layer > 0 and plan.importance_of(stage) in ATTENTION_RULES


def importance_scores(
    plan: PruningPlan,
    stage: int,
    *,
    prefix_tokens: int,
    hidden: "Tensor",
    last: "Tensor",
    query: "Tensor | None" = None,
    key: "Tensor | None" = None,
    vision_cls: "Tensor | None" = None,
) -> "Tensor":
    """Scores [B,n] float32 of the stage's current image tokens by the stage's rule.

    hidden [B,S,C] is the stage's input, last [B] the index of the last real token in it. For attention rules query
    is [B,H,Q,D] (Q = 1 for last-token, T for the text rules) and key [B,K,S,D], both after RoPE, of the layer before
    the stage. An attention rule at layer 0 has no layer to look at and scores every token 0. `vision_cls` [B,n] is the
    tower's class-token attention, which is the score by vision-cls.
    Raises InputError if a rule does not get what it needs.
    """
    import torch

    count, rule = plan.tokens_before(stage), plan.importance_of(stage)
    batch, device = hidden.shape[0], hidden.device
    image = hidden[:, prefix_tokens : prefix_tokens + count]
    if rule == "random":
        return torch.from_numpy(random_scores(count, stage)).to(device).expand(batch, -1).contiguous()
    if rule == "pivot-distance":
        return pivot_scores(image, stage_pivots(plan, stage).tolist())
    if rule == "norm":
        return centred(image).square().sum(-1).sqrt()
    if rule == "vision-cls":
        if vision_cls is None:
            raise InputError(f"stage {stage} scores by vision-cls but got no attention of the vision tower")
        return vision_cls.float()
    if not uses_attention(plan, stage):
        return torch.zeros(batch, count, device=device)
    if query is None or key is None:
        raise InputError(f"stage {stage} scores by {rule} but got no query and key", wanted="both, of the layer before")
    text_start = prefix_tokens + count
    rows = query.shape[2]
    column = torch.arange(key.shape[2], device=device)
    if rule == "last-token":
        visible = (column <= last[:, None])[:, None, None]  # [B,1,1,S]
        weights = torch.ones(batch, 1, device=device)
    else:
        visible = (column <= text_start + torch.arange(rows, device=device)[:, None])[None, None]  # [1,1,T,S]
        weights = text_weights(rule, hidden, last, prefix_tokens, text_start)
    attention = attention_weights(query, key, visible)[..., prefix_tokens:text_start].mean(1)  # [B,Q,n]
    return (weights[:, None] @ attention)[:, 0]


def attention_weights(query: "Tensor", key: "Tensor", visible: "Tensor") -> "Tensor":
    """softmax(query key^T / sqrt(D)) over the visible columns: [B,H,Q,D], [B,K,S,D] -> [B,H,Q,S] float32."""
    batch, heads, rows, size = query.shape
    kv_heads = key.shape[1]
    grouped = (query.float() * size**-0.5).reshape(batch, kv_heads, -1, size)
    scores = (grouped @ key.float().transpose(2, 3)).reshape(batch, heads, rows, -1)
    weights: Tensor = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return weights


def text_weights(rule: str, hidden: "Tensor", last: "Tensor", prefix_tokens: int, text_start: int) -> "Tensor":
    """How much each of the T text rows counts, [B,T] float32, each item's weights summing to 1.

    mean-text: every real row (index <= last) the same. similar-text: the same for every real row whose cosine to the
    mean image hidden state is at least the average of that cosine over the real rows (to within TEXT_TOLERANCE), 0
    for the others.
    """
    import torch

    real = (text_start + torch.arange(hidden.shape[1] - text_start, device=hidden.device) <= last[:, None]).float()
    if rule == "mean-text":
        return real / real.sum(1, keepdim=True).clamp_min(1)
    mean_image = hidden[:, prefix_tokens:text_start].float().mean(1, keepdim=True)
    cosine = (unit_rows(hidden[:, text_start:]) @ unit_rows(mean_image).transpose(1, 2))[..., 0]
    average = (cosine * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
    chosen = real * (cosine >= average - TEXT_TOLERANCE).float()
    return chosen / chosen.sum(1, keepdim=True).clamp_min(1)


def pivot_scores(image: "Tensor", pivots: list[int]) -> "Tensor":
    """min over pivots of 1 - cos(x_i, pivot), image [B,n,C] -> [B,n] float32; the pivots themselves +inf."""
    unit = unit_rows(image)
    scores = 1.0 - (unit @ unit[:, pivots].transpose(1, 2)).amax(-1)
    scores[:, pivots] = float("inf")
    return scores
