"""BtpSelectTokens once more, in plain Python, slow, from the contract alone: what every selection is tested on.

The only one in the tests; with it the spatial set, which gives a selection its seeds.
"""

from collections.abc import Sequence

import numpy as np

from graphs.ops.select_tokens import Case
from graphs.records.plan import Stage

Key = tuple[bool, float]  # orders floats with NaN lowest


def select(case: Case) -> list[list[int]]:
    """The kept tokens of every batch row."""
    one = np.float32(1)
    seeds = [] if case.seeds is None else case.seeds.tolist()
    covers = case.similarity is not None and case.attributes.get("diversity_rule") == "coverage"
    with np.errstate(over="ignore", under="ignore"):
        distances = None if case.similarity is None else (one - case.similarity.astype(np.float32)).tolist()
        levels = similarity_levels(case.similarity) if covers else None
        return [
            select_row(
                scores,
                None if distances is None else distances[b],
                seeds,
                levels=None if levels is None else levels[b],
                **case.attributes,
            )
            for b, scores in enumerate(case.scores.tolist())
        ]


def select_stage(
    stage: Stage, scores: np.ndarray, similarity: np.ndarray | None, seeds: Sequence[int] = ()
) -> list[int]:
    """What a stage of a plan keeps of its tokens: scores [V], similarity [V,V] if it needs them."""
    case = Case(
        "stage",
        scores[None].astype(np.float32),
        None if similarity is None else similarity[None],
        None if similarity is None else np.array(seeds, np.int32),
        {name: getattr(stage, name) for name in ("keep", "attention_quota", "diversity_quota", "pool", "boundary")},
    )
    return select(case)[0]


def grid_seeds(grid: tuple[int, int], count: int, metric: str = "euclidean") -> list[int]:
    """`count` well spread tokens of a grid, rule by rule: from token 0 on, always the farthest from all so far."""
    points = [(r, c) for r in range(grid[0]) for c in range(grid[1])]

    def distance(a: int, b: int) -> int:
        dr, dc = abs(points[a][0] - points[b][0]), abs(points[a][1] - points[b][1])
        return dr + dc if metric == "manhattan" else dr * dr + dc * dc

    chosen = [0][:count]
    nearest = [distance(i, 0) for i in range(len(points))]
    while len(chosen) < count:
        chosen.append(nearest.index(max(nearest)))
        nearest = [min(gap, distance(i, chosen[-1])) for i, gap in enumerate(nearest)]
    return chosen


def similarity_levels(similarity: np.ndarray) -> list[list[list[int]]]:
    """round(32767 x), of similarities cut to 0 ... 1; NaN is 0."""
    cut = np.clip(np.where(np.isnan(similarity), 0, similarity).astype(np.float32), 0, 1)
    products: list[list[list[float]]] = (np.float32(32767) * cut).tolist()
    return [[[round(x) for x in row] for row in matrix] for matrix in products]  # Python rounds halves to even


def key(value: float) -> Key:
    return (False, 0.0) if value != value else (True, value)


def select_row(
    scores: Sequence[float],
    distance: Sequence[Sequence[float]] | None,
    seeds: Sequence[int],
    *,
    keep: int,
    attention_quota: int,
    diversity_quota: int,
    pool: int,
    boundary: int,
    levels: Sequence[Sequence[int]] | None = None,
    diversity_rule: str = "farthest",
    weighted: int = 0,
) -> list[int]:
    def following(selected: Sequence[int], count: int) -> list[int]:
        if diversity_rule == "coverage":
            weights = [max(x, 0.0) if x == x and weighted else float(not weighted) for x in scores]
            return covering(levels, weights, selected, count)
        return farthest(distance, selected, count)

    tokens = range(len(scores))
    order = sorted(tokens, key=lambda i: (scores[i] != scores[i], -scores[i] if scores[i] == scores[i] else 0.0, i))
    candidates = order[:pool]
    preferred = [i for i in candidates if i < boundary] + [i for i in candidates if i >= boundary]
    base: list[int] = []
    for token in [*preferred[:attention_quota], *following([], diversity_quota), *seeds]:
        if token not in base:
            base.append(token)
    base = base[:keep]
    rest = [token for token in order if token not in base] if distance is None else following(base, keep - len(base))
    return sorted((base + rest)[:keep])


def farthest(distance: Sequence[Sequence[float]] | None, selected: Sequence[int], count: int) -> list[int]:
    """The next `count` tokens, each farthest from its nearest selected one (at first, with none: from any other)."""
    if distance is None or count == 0:
        return []
    tokens = range(len(distance))
    if selected:
        nearest = [min(key(distance[other][i]) for other in selected) for i in tokens]
    else:
        nearest = [min((key(distance[i][j]) for j in tokens if j != i), default=(True, 0.0)) for i in tokens]
    taken, picks = set(selected), list[int]()
    for _ in range(count):
        pick = max((i for i in tokens if i not in taken), key=lambda i: (nearest[i], -i))
        row = [key(value) for value in distance[pick]]
        nearest = [min(a, b) for a, b in zip(nearest, row, strict=True)] if taken else row
        taken.add(pick)
        picks.append(pick)
    return picks


def covering(
    levels: Sequence[Sequence[int]] | None, weights: Sequence[float], selected: Sequence[int], count: int
) -> list[int]:
    """The next `count` tokens by gain; every gain is summed anew at every step, in Python's integers."""
    if levels is None or count == 0:
        return []
    matrix, kept, picks = np.array(levels, np.int64), list(selected), list[int]()
    for _ in range(count):
        covered = matrix[kept].max(axis=0) if kept else np.zeros(len(matrix), np.int64)
        gains = np.maximum(matrix - covered, 0).sum(axis=1)
        open_ = [i for i in range(len(matrix)) if i not in kept]
        pick = max(open_, key=lambda i: (value(int(gains[i]), weights[i]), -i))
        kept.append(pick)
        picks.append(pick)
    return picks


def value(gain: int, weight: float) -> float:
    """float32(gain) x weight, rounded once to float32."""
    return float(np.float32(gain) * np.float32(weight)) if gain else 0.0
