"""Pictures of kept tokens: what is kept is untouched, what is dropped is washed out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from btp_export.drawing.kept_tokens import draw_kept, draw_stage, fit, kept_mask

RNG = np.random.default_rng(0)
PICTURE = Image.fromarray(RNG.integers(0, 256, (96, 96, 3), dtype=np.uint8))


def _cells(panel: Image.Image, rows: int, columns: int) -> np.ndarray:
    """[rows, columns, side, side, 3]"""
    side = panel.width // columns
    return np.asarray(panel).reshape(rows, side, columns, side, 3).swapaxes(1, 2)


@settings(max_examples=25, deadline=None)
@given(kept=st.sets(st.integers(0, 35), max_size=36), width=st.integers(18, 200))
def test_kept_cells_have_the_pictures_own_pixels_and_the_others_do_not(kept: set[int], width: int) -> None:
    panel = draw_stage(PICTURE, (6, 6), sorted(kept), width=width)
    clear = _cells(draw_stage(PICTURE, (6, 6), range(36), width=width), 6, 6)
    got = _cells(panel, 6, 6)
    for index in range(36):
        row, column = divmod(index, 6)
        if index in kept:
            np.testing.assert_array_equal(got[row, column], clear[row, column])
        else:
            inner = got[row, column][1:-1, 1:-1].astype(float)
            assert np.ptp(inner, axis=-1).max(initial=0) == 0, "dropped cells are grey inside their border"
            assert inner.std() <= 0.3 * clear[row, column][1:-1, 1:-1].astype(float).std() + 1


def test_all_kept_is_the_picture_itself() -> None:
    panel = draw_stage(PICTURE, (6, 6), range(36), width=96)
    np.testing.assert_array_equal(np.asarray(panel), np.asarray(PICTURE))


def test_a_line_runs_around_kept_cells_outside_of_them() -> None:
    panel = np.asarray(draw_stage(PICTURE, (6, 6), [14], width=120)).astype(int)  # row 2, column 2; cells of 20
    outline = panel[39, 40:60]
    assert (outline == outline[0]).all() and outline[0][1] > outline[0][0]
    assert (panel[60, 40:60] == outline[0]).all() and (panel[40:60, 39] == outline[0]).all()


def test_wide_pictures_are_cut_in_the_middle_as_the_processor_does() -> None:
    wide = Image.fromarray(RNG.integers(0, 256, (40, 100, 3), dtype=np.uint8))
    np.testing.assert_array_equal(np.asarray(fit(wide, (24, 24))), np.asarray(wide)[:, 30:70])
    assert fit(wide, (4, 8)).size == (80, 40)


def test_tokens_without_a_place_in_the_grid_are_not_drawn() -> None:
    assert kept_mask((2, 2), [0, 3, 4, 9]).tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize(("grid", "kept"), [((0, 4), [0]), ((4, 4), [-1, 2])])
def test_impossible_grids_and_indices_are_refused(grid: tuple[int, int], kept: list[int]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        draw_stage(PICTURE, grid, kept)


@pytest.mark.parametrize(("width", "rows"), [(1280, 1), (700, 2), (300, 5)])
def test_panels_wrap_to_the_width(width: int, rows: int) -> None:
    kept = [list(range(288)), list(range(144)), list(range(48)), []]
    sheet = draw_kept(PICTURE, (24, 24), kept, layers=[3, 6, 14, 22], width=width)
    assert sheet.width == width
    background = (np.asarray(sheet) == 255).all(axis=(1, 2))
    bands = np.flatnonzero(np.diff(np.concatenate([[True], background]).astype(int)) == -1)
    assert rows <= len(bands) <= 3 * rows, "panels and their captions, in rows"


def test_the_same_input_gives_the_same_pixels() -> None:
    one, two = (draw_kept(PICTURE, (6, 6), [[1, 2, 8]], layers=[1]) for _ in range(2))
    assert one.tobytes() == two.tobytes()


def test_cells_that_tokens_of_several_blocks_look_at() -> None:
    """A base view of 2 x 2 over 4 x 4 cells with newlines: a coarse token shows its quarter, a newline nothing."""
    blocks = ((2, 2), (4, 5))
    assert np.argwhere(kept_mask((4, 4), [1], blocks)).tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]
    fine, newline = 4 + 2 * 5 + 3, 4 + 2 * 5 + 4
    assert np.argwhere(kept_mask((4, 4), [fine, newline], blocks)).tolist() == [[2, 3]]
    assert kept_mask((4, 4), range(24), blocks).all()
    assert not kept_mask((4, 4), [8, 13], blocks)[:, :3].any(), "newlines of the first two rows"
