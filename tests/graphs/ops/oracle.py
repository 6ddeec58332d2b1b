"""BtpSelectTokens once more, in plain Python, slow, from the contract alone: what the reference is tested on."""

from collections.abc import Sequence

import numpy as np

from graphs.ops.select_tokens import Case

Key = tuple[bool, float]  # orders floats with NaN lowest


def select(case: Case) -> list[list[int]]:
    """The kept tokens of every batch row."""
    one = np.float32(1)
    with np.errstate(over="ignore"):
        distances = None if case.similarity is None else (one - case.similarity.astype(np.float32)).tolist()
    seeds = [] if case.seeds is None else case.seeds.tolist()
    return [
        select_row(scores, None if distances is None else distances[b], seeds, **case.attributes)
        for b, scores in enumerate(case.scores.tolist())
    ]


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
) -> list[int]:
    tokens = range(len(scores))
    order = sorted(tokens, key=lambda i: (scores[i] != scores[i], -scores[i] if scores[i] == scores[i] else 0.0, i))
    candidates = order[:pool]
    preferred = [i for i in candidates if i < boundary] + [i for i in candidates if i >= boundary]
    base: list[int] = []
    for token in [*preferred[:attention_quota], *farthest(distance, [], diversity_quota), *seeds]:
        if token not in base:
            base.append(token)
    base = base[:keep]
    if distance is None:
        rest = [token for token in order if token not in base]
    else:
        rest = farthest(distance, base, keep - len(base))
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
