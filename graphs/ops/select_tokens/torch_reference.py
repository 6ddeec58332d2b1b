"""BtpSelectTokens in torch: the operator as it is defined, rule by rule. Every other form equals it index for index."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from graphs.ops.select_tokens.schema import COVERAGE, FARTHEST, NAME, check
from graphs.records.errors import InputError

# Distances are compared in float64, which has room for these below every float32, -inf included.
_MINUS_INFINITY, _NAN, _TAKEN = -1e300, -1e301, float("-inf")
_SCALE = 32767.0  # similarity 1 as an integer of 16 bits


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
    diversity_rule: str = FARTHEST,
    weighted: int = 0,
) -> Tensor:
    """The kept tokens, [B,keep] int32, ascending, distinct.

    scores [B,V] float32, similarity [B,V,V] float32 or float16, seeds [m] integers. The rules are those of the schema.
    Raises InputError for tensors or attributes that do not fit, seeds that name no token among them.
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
        diversity_rule=diversity_rule,
        weighted=weighted,
    )
    rows = []
    for b, row in enumerate(scores):
        order = _order(row)
        attention = _attention_picks(order, pool, boundary)[:attention_quota]
        if similarity is None:
            kept = _union([attention, order])[:keep]
        else:
            pick = _picker(row, similarity[b], diversity_rule, weighted)
            diverse = pick(order[:0], diversity_quota)
            base = _union([attention, diverse, *([] if seeds is None else [seeds.to(order)])])[:keep]
            kept = torch.cat([base, pick(base, keep - len(base))])
        rows.append(kept.sort().values)
    return torch.stack(rows).to(torch.int32)


def picks_from_nothing(
    scores: Tensor, similarity: Tensor, count: int, *, diversity_rule: str = FARTHEST, weighted: int = 0
) -> Tensor:
    """What rule 4 picks where nothing was selected before, in its order, [count] of scores [V], similarity [V,V].

    Each pick depends on those before it alone: the first k of them, sorted, are what `reference` gives for a `keep` of
    k without quotas and seeds.
    """
    return _picker(scores, similarity, diversity_rule, weighted)(torch.empty(0, dtype=torch.int64), count)


def _picker(scores: Tensor, similarity: Tensor, diversity_rule: str, weighted: int) -> Callable[[Tensor, int], Tensor]:
    """Rules 2 and 4 on one sample: selected tokens, count -> the next `count` tokens."""
    if diversity_rule == COVERAGE:
        return partial(_best_covering, _columns(similarity), _weights(scores, weighted))
    return partial(_farthest_points, _distance(similarity))


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
    distance = (1.0 - similarity.to(torch.float32)).to(torch.float64)
    ordered = distance.nan_to_num_(nan=_NAN, posinf=float("inf"), neginf=_MINUS_INFINITY)
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


def _columns(similarity: Tensor) -> Tensor:
    """[V,V] similarity -> int32 [V,V]: row j holds s_ij of all tokens i, so that a column of s is read at once."""
    positive = similarity.to(torch.float32).nan_to_num(nan=0.0).clamp(0.0, 1.0)
    return (positive * _SCALE).round().to(torch.int32).T.contiguous()


def _weights(scores: Tensor, weighted: int) -> Tensor:
    """w [V] float32, none negative or NaN."""
    return scores.nan_to_num(nan=0.0, posinf=float("inf")).clamp(min=0.0) if weighted else torch.ones_like(scores)


def _best_covering(columns: Tensor, weights: Tensor, selected: Tensor, count: int) -> Tensor:
    """Rules 2 and 4 by gain: the next `count` tokens, each the one that adds most to what is covered."""
    if count == 0:
        return selected[:0]
    covered = columns[:, selected].amax(dim=1) if len(selected) else torch.zeros_like(columns[:, 0])  # c
    gain = _gain(columns, covered)
    least = torch.zeros_like(weights).index_fill(0, selected, -1.0)  # the value of no gain; one taken has none left
    picks: list[int] = []
    for _ in range(count):
        pick = int(torch.where(gain > 0, gain * weights, least).argmax())  # the first of equal ones
        least[pick] = -1.0
        better = torch.maximum(covered, columns[:, pick])
        changed = (better > covered).nonzero()[:, 0]  # only these columns lose gain; the sums stay exact
        # max(0, s - c) - max(0, s - better) is s between the two, less c.
        low, high = covered.index_select(0, changed), better.index_select(0, changed)
        lost = columns.index_select(0, changed).clamp_(low[:, None], high[:, None]).sum(dim=0, dtype=torch.int32)
        gain = gain - lost + low.sum(dtype=torch.int32)
        covered = better
        picks.append(pick)
    return torch.tensor(picks, dtype=torch.int64, device=columns.device)


def _gain(columns: Tensor, covered: Tensor) -> Tensor:
    """What each token i would add to these columns j: the sum of max(0, s_ij - c_j), [V] int32."""
    return (columns - covered[:, None]).clamp(min=0).sum(dim=0, dtype=torch.int32)


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
