"""Blocks of image tokens: checked in every record, placed on the picture, and spread seeds over."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from graphs.pruning.spatial_set import spatial_seeds, stage_pivots, stage_seeds
from graphs.records.plan import PruningPlan, Stage
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import VisionSpec
from graphs.records.token_layout import token_positions
from tests.btp_export.families.parity import block_seeds

Blocks = tuple[tuple[int, int], ...]


def profile(blocks: Blocks, grid: tuple[int, int], tokens: int, **fields: object) -> ShapeProfile:
    shape = {"image_size": (48, 48), "prefix_tokens": 3, "text_tokens": 8, "new_tokens": 4, "name": "p"}
    return ShapeProfile(grid=grid, image_tokens=tokens, blocks=blocks, **(shape | fields))  # type: ignore[arg-type]


def plan(blocks: Blocks, grid: tuple[int, int], tokens: int, *stages: Stage) -> PruningPlan:
    return PruningPlan(
        model_type="m", num_layers=6, image_tokens=tokens, grid=grid, blocks=blocks, stages=tuple(stages)
    )


@pytest.mark.parametrize("make", [profile, plan])
def test_blocks_must_add_up_to_the_tokens(make: object) -> None:
    assert callable(make)
    assert make(((6, 6), (6, 13)), (6, 12), 114).blocks == ((6, 6), (6, 13))
    assert make((), (6, 6), 36).blocks == ()
    for blocks, grid, tokens, words in (
        (((6, 6), (6, 13)), (6, 12), 115, "hold 114 tokens, not 115"),
        (((6, 6), (6, 13)), (6, 11), 114, "is not the finest"),
        (((6, 6), (6, 13)), (6, 6), 114, "is not the finest"),
        (((6, 6), (0, 13)), (6, 6), 36, "an empty one"),
    ):
        with pytest.raises(ValidationError, match=words):
            make(blocks, grid, tokens)


@pytest.mark.parametrize("grid", [(24, 2**31), (2**20 + 1, 1)])
def test_more_tokens_than_any_picture_has_are_refused(grid: tuple[int, int]) -> None:
    """Whoever reads a record makes arrays of that size: `run` of such a manifest took all memory."""
    tokens = grid[0] * grid[1]
    for make in (profile, plan):
        with pytest.raises(ValidationError, match=f"{tokens} image tokens"):
            make((), grid, 576)
    with pytest.raises(ValidationError, match=f"{tokens} image tokens"):
        VisionSpec(image_size=(48, 48), grid=grid)
    assert VisionSpec(image_size=(48, 48), grid=(2**10, 2**10)).image_tokens == 2**20


def test_records_without_blocks_are_written_as_before() -> None:
    """Files of models with one grid do not change."""
    assert "blocks" not in plan((), (6, 6), 36).to_json()
    assert '"blocks":[[6,6],[6,13]]' in plan(((6, 6), (6, 13)), (6, 12), 114).model_dump_json()
    assert profile((), (6, 6), 36).model_dump().keys() == {
        "name", "batch", "image_size", "grid", "prefix_tokens", "image_tokens", "text_tokens", "new_tokens",
    }  # fmt: skip
    plain = VisionSpec(image_size=(24, 24), grid=(6, 6))
    assert plain.model_dump().keys() == {"image_size", "grid", "channels"}
    assert (plain.image_tokens, plain.dynamic) == (36, False)


def test_the_shape_of_the_pixels() -> None:
    assert profile((), (6, 6), 36, batch=2).pixel_input() == (2, 3, 48, 48)
    assert profile((), (6, 6), 36, batch=2, pixel_shape=(8, 1176)).pixel_input() == (8, 1176)
    with pytest.raises(ValidationError, match="does not hold a batch of 2"):
        profile((), (6, 6), 36, batch=2, pixel_shape=(7, 1176))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.booleans(), st.data())
def test_seeds_are_spread_over_the_picture(
    rows: int, columns: int, down: int, right: int, newline: bool, data: st.DataObject
) -> None:
    """Against farthest-point selection in exact fractions."""
    grid = (max(rows, down), max(columns, right))
    blocks = ((down, right), (grid[0], grid[1] + newline))
    tokens = down * right + grid[0] * (grid[1] + newline)
    count = data.draw(st.integers(1, tokens - 1))
    rescaled = plan(blocks, grid, tokens, Stage(layer=1, keep=count, seeds=count))
    seeds = stage_seeds(rescaled, 0)
    assert seeds is not None
    assert seeds.tolist() == block_seeds(rescaled, count)
    assert stage_pivots(rescaled, 0).tolist() == block_seeds(rescaled, min(8, count))


def test_positions_are_centres_of_cells() -> None:
    """A base view of 24 x 24 over 20 x 48 tiles has cells of 5/6 x 2 fine ones; newlines stand right of their row."""
    row, column = token_positions((20, 48), ((24, 24), (20, 49)))
    unit = Fraction(int(row[-49] - row[-98]))  # one fine row
    assert [Fraction(int(r)) / unit for r in row[[0, 24, 575]]] == [
        Fraction(5, 12),
        Fraction(15, 12),
        Fraction(235, 12),
    ]
    assert [Fraction(int(c)) / unit for c in column[[0, 1, 23]]] == [1, 3, 47]
    fine = column[576 : 576 + 49]
    assert [Fraction(int(c)) / unit for c in fine] == [n + Fraction(1, 2) for n in range(49)]


def test_one_grid_given_as_a_block_changes_nothing() -> None:
    for count in (1, 7, 36):
        plain, block = spatial_seeds((6, 6), count, "euclidean"), spatial_seeds((6, 6), count, "euclidean", ((6, 6),))
        np.testing.assert_array_equal(plain, block)
