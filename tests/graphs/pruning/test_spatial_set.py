import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs.pruning.spatial_set import PIVOTS, random_scores, spatial_seeds, stage_pivots, stage_seeds
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan, Stage
from tests.graphs.ops import oracle


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.data(), st.sampled_from(["euclidean", "manhattan"]))
def test_seeds_follow_the_rule(rows, columns, data, metric):
    count = data.draw(st.integers(0, rows * columns))
    seeds = spatial_seeds((rows, columns), count, metric)
    assert seeds.dtype == np.int32
    assert seeds.tolist() == oracle.grid_seeds((rows, columns), count, metric)
    assert len(set(seeds.tolist())) == count


def test_known_set_on_a_small_grid():
    # corner, opposite corner, the two others (lower index first), then the centre's first best
    assert spatial_seeds((3, 3), 5, "euclidean").tolist() == [0, 8, 2, 6, 4]


def test_metrics_differ_where_they_should():
    assert spatial_seeds((24, 24), 144, "euclidean").tolist() != spatial_seeds((24, 24), 144, "manhattan").tolist()


@pytest.mark.parametrize("count", [-1, 13])
def test_refuses_more_seeds_than_tokens(count):
    with pytest.raises(InputError, match="3 x 4"):
        spatial_seeds((3, 4), count, "euclidean")


def plan(*stages, importance="last-token"):
    return PruningPlan(
        model_type="llava", num_layers=8, image_tokens=16, grid=(4, 4), stages=stages, importance=importance
    )


def test_stage_seeds_and_pivots():
    p = plan(Stage(layer=0, keep=12, seeds=5), Stage(layer=3, keep=4))
    assert stage_seeds(p, 0).tolist() == spatial_seeds((4, 4), 5, "euclidean").tolist()
    assert stage_seeds(p, 1) is None
    assert len(stage_pivots(p, 0)) == PIVOTS
    assert len(stage_pivots(plan(Stage(layer=0, keep=3)), 0)) == 3
    with pytest.raises(InputError, match="stage 1"):
        stage_pivots(p, 1)


def test_random_scores_are_a_fixed_permutation():
    scores = random_scores(16, 0)
    assert scores.dtype == np.float32
    assert sorted(scores.tolist()) == list(range(16))
    assert scores.tolist() != random_scores(16, 1).tolist()
    # the stream of PCG64(0) is part of numpy's promise: these ranks must never change
    draws = np.random.PCG64(0).random_raw(16)
    assert scores.tolist() == [int((draws < draw).sum()) for draw in draws]
