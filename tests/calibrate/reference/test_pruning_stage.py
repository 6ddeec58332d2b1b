"""How near a selection was, and what a stage record says."""

import numpy as np
import pytest
import torch

from calibrate.reference.pruning_stage import apply_stage, score_margin
from graphs.records.plan import PruningPlan, Stage

SCORES = np.array([0.1, 0.4, 0.2, 0.3, 0.05], np.float32)


def stage(**settings: int) -> Stage:
    return Stage(layer=1, **settings)


def test_the_margin_is_the_gap_at_the_narrowest_cut() -> None:
    # Quota 2 of the best 2: between the second (0.3) and the third (0.2).
    assert score_margin(SCORES, stage(keep=3, attention_quota=2, pool=2, boundary=5)) == pytest.approx(0.1 / 0.4)
    # Pool of 4 candidates (1, 3, 2, 0), cut at 0.1 | 0.05; quota 1 of those below 2: (1, 0), cut at 0.4 | 0.1.
    assert score_margin(SCORES, stage(keep=3, attention_quota=1, pool=4, boundary=2)) == pytest.approx(0.05 / 0.4)
    # Quota 3 takes both below 2 (1, 0) and the first of the others (3, 2), cut at 0.3 | 0.2.
    assert score_margin(SCORES, stage(keep=3, attention_quota=3, pool=4, boundary=2)) == pytest.approx(0.05 / 0.4)
    assert score_margin(SCORES, stage(keep=3, attention_quota=3, pool=5, boundary=2)) == pytest.approx(0.1 / 0.4)


def test_without_a_cut_there_is_no_margin() -> None:
    assert score_margin(SCORES, stage(keep=0)) == np.inf
    assert score_margin(SCORES, stage(keep=2, boundary=2, diversity_quota=2)) == np.inf
    pivots = np.array([np.inf, 1.0, np.inf, 0.5], np.float32)
    assert score_margin(pivots, stage(keep=3, attention_quota=3, pool=3, boundary=3)) == pytest.approx(0.5)


def test_a_stage_takes_rows_by_its_indices_and_counts_in_the_whole_picture() -> None:
    """The second stage of a plan: 4 survivors in rows 2 to 5, of which 2 stay."""
    plan = PruningPlan(
        model_type="llava", num_layers=4, image_tokens=9, grid=(3, 3),
        stages=(
            Stage(layer=1, keep=4, boundary=4), Stage(layer=2, keep=2, attention_quota=2, pool=2, boundary=2),
        ),
    )  # fmt: skip
    rows = torch.arange(8.0).reshape(1, 8, 1)
    hidden = rows.repeat(1, 1, 4)
    key = torch.zeros(1, 1, 8, 4)
    key[0, 0, 3], key[0, 0, 5] = 1.0, 2.0
    record, (gathered,) = apply_stage(
        plan, 1, rows=(hidden,), query=torch.ones(1, 1, 8, 4), key=key, last=7, image_start=2,
        before=torch.tensor([0, 3, 4, 8]),
    )  # fmt: skip
    assert record.indices.tolist() == [1, 3] and record.absolute.tolist() == [3, 8]
    assert gathered[0, :, 0].tolist() == [0, 1, 3, 5, 6, 7]
    assert record.last == 5
    products = np.array([0, 0, 0, 1, 0, 2, 0, 0]) * 4 / 2.0  # 4 numbers of size 1, over the root of D = 4
    weights = np.exp(products) / np.exp(products).sum()
    np.testing.assert_allclose(record.scores, weights[2:6], rtol=1e-5)
