"""Blocks of image tokens: how a picture's V tokens lie on its plane where they are not one grid.

LLaVA-1.6 looks at a picture twice: coarsely as a whole, and finely in tiles. Its tokens are the coarse grid's rows,
then the fine grid's rows, each of which ends with one newline token. `grid` is the fine grid without the newline
column; `blocks` are rows x columns of every block of tokens in order, newline column included: ((24, 24), (48, 49))
with the grid (48, 48). No blocks means that the tokens are the one grid.
"""

import math
from typing import Any, Final

import numpy as np
from pydantic import Field

MOST_TOKENS: Final = 2**20  # V: sixty times what the largest picture of Qwen2.5-VL takes
Grid = tuple[int, int]  # rows, columns
Blocks = tuple[Grid, ...]


def blocks_field() -> Any:
    """A record's field `blocks`, which is left out of the file where it is empty."""
    return Field(default=(), exclude_if=lambda blocks: not blocks)


def check_blocks(blocks: Blocks, grid: Grid, image_tokens: int) -> None:
    """Raise ValueError (pydantic turns it into a validation error) unless blocks, grid and V belong together.

    More tokens than MOST_TOKENS are refused here, because whoever reads a record makes arrays of that size.
    """
    for tokens in (image_tokens, count_tokens((grid,)), count_tokens(blocks)):
        if tokens > MOST_TOKENS:
            raise ValueError(f"{tokens} image tokens; at most {MOST_TOKENS}")
    if not blocks:
        return
    if min(min(block) for block in blocks) < 1:
        raise ValueError(f"blocks {list(blocks)} hold an empty one")
    if count_tokens(blocks) != image_tokens:
        raise ValueError(f"blocks {list(blocks)} hold {count_tokens(blocks)} tokens, not {image_tokens}")
    finest = max(blocks, key=math.prod)
    if tuple(grid) not in (finest, (finest[0], finest[1] - 1)):
        raise ValueError(f"grid {list(grid)} is not the finest of the blocks {list(blocks)}")


def count_tokens(blocks: Blocks) -> int:
    """V of the blocks."""
    return sum(rows * columns for rows, columns in blocks)


def token_positions(grid: Grid, blocks: Blocks = ()) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every token on the picture's plane, int64 [V] each, in one unit for both.

    Every block covers the whole picture: the cells of a coarse block are larger, and a token stands at the centre of
    its cell. A newline token stands where the next cell of its row would be. The unit is a 2m-th of a cell of `grid`,
    with m the least number that makes all centres whole.
    """
    if not blocks:
        row, column = np.indices(grid, dtype=np.int64).reshape(2, -1)
        return row, column
    cells = [grid if block == (grid[0], grid[1] + 1) else block for block in blocks]
    unit = math.lcm(*(side for block in cells for side in block))
    rows, columns = [], []
    for block, (down, right) in zip(blocks, cells, strict=True):
        row, column = np.indices(block, dtype=np.int64).reshape(2, -1)
        rows.append((2 * row + 1) * (grid[0] * unit // down))
        columns.append((2 * column + 1) * (grid[1] * unit // right))
    return np.concatenate(rows), np.concatenate(columns)
