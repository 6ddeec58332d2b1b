"""What a stage takes from the plan alone: the spread-out set on the token grid, pivots and random scores.

None of it looks at an image, so all of it is a constant of the graph. Everything is exact integer arithmetic or a
bit generator with a fixed stream: the same plan gives the same constants on every machine.
"""

import functools

import numpy as np

from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan, SpatialMetric
from graphs.records.token_layout import Blocks, count_tokens, token_positions

PIVOTS = 8  # tokens that pivot-distance measures from
NORM_EPSILON = 1e-12  # a hidden state with a smaller norm counts as zero: cosine 0 to everything, itself included


def spatial_seeds(grid: tuple[int, int], count: int, metric: SpatialMetric, blocks: Blocks = ()) -> np.ndarray:
    """`count` tokens of a rows x columns grid (or of blocks over it), spread out: int32 [count] as they were chosen.

    Farthest-point selection on the tokens' positions in the picture: token 0 first, then always the token whose nearest
    chosen token is farthest away, ties to the lower index. Positions are whole numbers and euclidean distances are
    compared squared, so no rounding decides. Raises InputError if there are fewer than `count` tokens.
    """
    rows, columns = grid
    tokens = count_tokens(blocks or (grid,))
    if not 0 <= count <= tokens:
        raise InputError(
            f"{count} spatial seeds on a grid of {rows} x {columns}",
            wanted=f"0 to {tokens}",
            do="lower the stage's seeds or give the grid of the model's image size",
        )
    return np.array(_spread_out(grid, count, metric, blocks), np.int32)


@functools.lru_cache(maxsize=256)  # every picture of a calibration asks for the same
def _spread_out(grid: tuple[int, int], count: int, metric: SpatialMetric, blocks: Blocks) -> tuple[int, ...]:
    if count == 0:
        return ()
    row, column = token_positions(grid, blocks)

    def distance_to(token: int) -> np.ndarray:
        down, right = np.abs(row - row[token]), np.abs(column - column[token])
        result: np.ndarray = down + right if metric == "manhattan" else down**2 + right**2
        return result

    chosen = [0]
    nearest = distance_to(0)
    while len(chosen) < count:
        chosen.append(int(np.argmax(nearest)))  # argmax gives the first of equal maxima
        nearest = np.minimum(nearest, distance_to(chosen[-1]))
    return tuple(chosen)


def stage_seeds(plan: PruningPlan, stage: int) -> np.ndarray | None:
    """The stage's spatial set, int32 [seeds], or None if it has none."""
    count = plan.stages[stage].seeds
    return spatial_seeds(plan.grid, count, plan.spatial_metric, plan.blocks) if count else None


def stage_pivots(plan: PruningPlan, stage: int) -> np.ndarray:
    """Indices of the pivots among the stage's tokens, int32 [min(PIVOTS, keep)], well spread over the grid.

    Raises InputError for a later stage, whose tokens are no longer a grid.
    """
    if stage != 0:
        raise InputError(
            f"stage {stage} scores its tokens by pivot-distance",
            wanted="pivot-distance in the first stage only: later stages see survivors, not a grid",
            do="use one stage with keep > 0, or another importance",
        )
    return spatial_seeds(plan.grid, min(PIVOTS, plan.stages[0].keep), plan.spatial_metric, plan.blocks)


def random_scores(count: int, stage: int) -> np.ndarray:
    """A seeded permutation of 0..count-1 as scores, float32 [count].

    The score of token i is the rank of the i-th raw 64-bit draw of numpy's PCG64(stage) among the first `count`
    draws. Raw draws are used because numpy keeps bit generators' streams fixed, but not what is made of them.
    """
    draws = np.random.PCG64(stage).random_raw(count)
    ranks = np.empty(count, np.float32)
    ranks[np.argsort(draws, kind="stable")] = np.arange(count, dtype=np.float32)
    return ranks
