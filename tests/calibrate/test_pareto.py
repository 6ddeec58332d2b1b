"""Several budgets at once."""

import numpy as np
import pytest

from calibrate.calibrate import Study, calibrate
from calibrate.pareto import Point, front, is_dominated, requests
from calibrate.place.balance import Recipe
from calibrate.place.candidates import Budget, Request
from graphs.records.errors import InputError
from tests.calibrate.models import checkpoint, make_input, make_llava
from tests.calibrate.place.test_search import COST, LAYERS, SHAPE, SIDE


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    from dataclasses import replace

    from calibrate.calibrate import measure_statistics, threshold_of
    from calibrate.reference.streamed_model import StreamedReference

    folder = tmp_path_factory.mktemp("llava")
    model = make_llava(folder, layers=LAYERS, side=SIDE)
    inputs = [make_input(model, seed=seed)[0] for seed in range(5)]
    reference = StreamedReference(checkpoint(folder))
    statistics = measure_statistics(reference, inputs, SHAPE)
    built = Study(reference, inputs, SHAPE, statistics, threshold_of(statistics, SHAPE, tau=None, model_tau=0.93))
    return replace(built, cost=COST)


def test_each_point_is_what_calibrating_for_its_budget_gives(study: Study) -> None:
    points = front(study, Request(), [0.75, 0.3, 0.5])
    assert [point.requested for point in points] == [0.3, 0.5, 0.75]
    for point in points:
        alone = calibrate(study, Request(Budget(compression=point.requested)))
        assert point.plan.stages == alone.stages
        chosen = alone.calibration["candidates"][alone.calibration["chosen"]]
        assert point.divergence == pytest.approx(chosen["divergence"], abs=1e-6)
        assert point.share == pytest.approx(COST.share(alone))
        assert point.plan.calibration["requested_compression"] == point.requested
    shares = [point.share for point in points]
    assert shares == sorted(shares, reverse=True)


def test_a_plan_that_another_makes_needless_is_marked() -> None:
    plan = Recipe().plan(SHAPE, (1, 5), (10, 0))
    points = [Point(n, plan, kl, 1.0, share) for n, (kl, share) in enumerate([(0.1, 0.8), (0.3, 0.5), (0.2, 0.4)])]
    assert [is_dominated(point, points) for point in points] == [False, True, False]


def test_default_budgets_are_those_within_reach() -> None:
    asked = requests(Request(), SHAPE, COST)  # six layers: at most 0.833
    assert [request.budget.compression for request in asked] == [0.5, 0.6, 0.7, 0.78]
    inside = Request(recipe=Recipe(spatial=False))  # stages of this recipe lie inside the decoder
    for budgets, words in (([0.5, 0.5], "different compressions"), ([], "different"), ([0.9], r"at most 0\.833")):
        with pytest.raises(InputError, match=words):
            requests(inside, SHAPE, COST, budgets)
    assert len(requests(Request(), SHAPE, COST, [0.9])) == 1, "before layer 0 it can be met"
    assert np.all([request.recipe == Recipe() for request in asked])
