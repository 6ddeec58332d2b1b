"""BtpSelectTokens in torch: the operator as it is defined, rule by rule. Every other form equals it index for index."""

import torch
from torch import Tensor

from graphs.ops.select_tokens.schema import NAME, check
from graphs.records.errors import InputError

# Distances are compared in float64, which has room for these below every float32, -inf included.
_MINUS_INFINITY, _NAN, _TAKEN = -1e300, -1e301, float("-inf")


def reference(
    scores: Tensor,
    similarity: Tensor | None = None,
    seeds: Tensor | None = None,
    *,
    keep: int,
    attention_quota: int,
    diversity_quota: int,
    pool: int,
    boundary: int,
) -> Tensor:
    """The kept tokens, [B,keep] int32, ascending, distinct.

    scores [B,V] float32, similarity [B,V,V] float32 or float16, seeds [m] integers. The rules are those of the schema.
    """
    _check_tensors(scores, similarity, seeds)
    check(
        scores.shape[1],
        keep=keep,
        attention_quota=attention_quota,
        diversity_quota=diversity_quota,
        pool=pool,
        boundary=boundary,
        similarity=similarity is not None,
        seeds=None if seeds is None else seeds.tolist(),
    )
    rows = []
    for b, row in enumerate(scores):
        order = _order(row)
        attention = _attention_picks(order, pool, boundary)[:attention_quota]
        if similarity is None:
            kept = _union([attention, order])[:keep]
        else:
            distance = _distance(similarity[b])
            diverse = _farthest_points(distance, order[:0], diversity_quota)
            base = _union([attention, diverse, *([] if seeds is None else [seeds.to(order)])])[:keep]
            kept = torch.cat([base, _farthest_points(distance, base, keep - len(base))])
        rows.append(kept.sort().values)
    return torch.stack(rows).to(torch.int32)


def _order(scores: Tensor) -> Tensor:
    """Rule 1: tokens [V] by score [V], highest first; NaN behind -inf, ties to the lower index."""
    missing = scores.isnan()
    values = torch.where(missing, float("-inf"), scores) + 0.0  # -0.0 becomes +0.0: they are equal
    order = values.sort(descending=True, stable=True).indices
    return order[missing[order].to(torch.uint8).sort(stable=True).indices]


def _attention_picks(order: Tensor, pool: int, boundary: int) -> Tensor:
    """Rule 1: the candidates, those below `boundary` first."""
    candidates = order[:pool]
    below = candidates < boundary
    return torch.cat([candidates[below], candidates[~below]])


def _distance(similarity: Tensor) -> Tensor:
    """[V,V] similarity -> float64 with the order of the float32 distances; a token's distance to itself is _TAKEN."""
    distance = 1.0 - similarity.to(torch.float32)
    ordered = distance.to(torch.float64).clamp(min=_MINUS_INFINITY)
    ordered[distance.isnan()] = _NAN
    return ordered.fill_diagonal_(_TAKEN)


def _farthest_points(distance: Tensor, selected: Tensor, count: int) -> Tensor:
    """Rules 2 and 4: the next `count` tokens, each the farthest from its nearest selected one."""
    if len(selected):
        nearest = distance[selected].amin(dim=0)
    else:  # from nothing: the distance to the nearest other token
        nearest = distance.clone().fill_diagonal_(float("inf")).amin(dim=1)
    picks: list[Tensor] = []
    for _ in range(count):
        pick = nearest.argmax(dim=0, keepdim=True)  # the first of equal ones
        taken = distance.index_select(0, pick)[0]
        nearest = torch.minimum(nearest, taken) if picks or len(selected) else taken
        picks.append(pick)
    return torch.cat(picks) if picks else selected[:0]


def _union(parts: list[Tensor]) -> Tensor:
    """All tokens of the parts in order, each where it comes first."""
    tokens = dict.fromkeys(torch.cat(parts).tolist())
    return torch.tensor(list(tokens), dtype=torch.int64, device=parts[0].device)


def _check_tensors(scores: Tensor, similarity: Tensor | None, seeds: Tensor | None) -> None:
    """Raise InputError unless the shapes and types are those of the schema."""

    def require(holds: bool, name: str, tensor: Tensor, wanted: str) -> None:
        if not holds:
            got = f"{NAME}: {name} is {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            raise InputError(got, wanted, f"reshape or convert {name}")

    floats, integers = (torch.float32, torch.float16), (torch.int32, torch.int64)
    fits = scores.ndim == 2 and scores.numel() > 0 and scores.dtype == torch.float32
    require(fits, "scores", scores, "[B,V] float32")
    if similarity is not None:
        square = (*scores.shape, scores.shape[1])
        fits = similarity.shape == square and similarity.dtype in floats
        require(fits, "similarity", similarity, f"{list(square)} float32 or float16")
    if seeds is not None:
        require(seeds.ndim == 1 and seeds.dtype in integers, "seeds", seeds, "[m] int32")
