"""Which pictures a report draws: of a calibrated plan the one of each kind that it moves the most."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from btp_export.report.kind_pictures import first_of_each_kind, worst_of_each_kind
from calibrate.data import drawn, scenes
from calibrate.data.mix import mixed_samples
from calibrate.place.candidates import Candidate
from graphs.records.plan import PruningPlan
from tests.btp_export.report.conftest import make_data

SIZE = (96, 96)
TURN = len(scenes.QUESTION_KINDS)  # samples until a kind is asked about again
MOVED = {"colour": 0.01, "count": 0.4, "where": 0.2}


def _plan(**changed: Any) -> PruningPlan:
    """A plan whose record says which samples of 18 scenes it moves the most."""
    samples = mixed_samples(18, seed=3, size=SIZE)
    numbers = {kind: TURN + scenes.QUESTION_KINDS.index(kind) for kind in MOVED}
    record = {
        "samples": 18,
        "seed": 3,
        "source": {"mix": {"scenes": 1.0}, "sha256": samples.digest()},
        "answers": {
            "by_kind": MOVED,
            "worst_by_kind": {kind: {"sample": numbers[kind], "divergence": 2 * MOVED[kind]} for kind in MOVED},
        },
    }
    return make_data().plan.model_copy(update={"calibration": record | changed})


def test_a_calibrated_plan_shows_what_it_moves_the_most() -> None:
    chosen = worst_of_each_kind(_plan(), SIZE)
    assert [one.sample.kind for one in chosen] == ["count", "where", "colour"], "the most moved kind first"
    assert [one.divergence for one in chosen] == [0.8, 0.4, 0.02]
    wanted = mixed_samples(18, seed=3, size=SIZE).samples
    for one in chosen:
        number = TURN + scenes.QUESTION_KINDS.index(one.sample.kind)
        assert one.sample.prompt == wanted[number].prompt
        assert np.array_equal(np.asarray(one.sample.image), np.asarray(wanted[number].image))


@pytest.mark.parametrize(
    "changed",
    [{"seed": 4}, {"source": {"pictures": "pictures of a folder", "sha256": "0"}}, {"answers": {"by_kind": MOVED}}],
    ids=["other pictures", "a user's own", "an older record"],
)
def test_pictures_that_are_not_the_calibrations_are_not_said_to_be(changed: dict[str, Any]) -> None:
    assert worst_of_each_kind(_plan(**changed), SIZE) == []


@pytest.mark.parametrize(("size", "kinds"), [(96, scenes.QUESTION_KINDS), (336, ("scenes", *drawn.KINDS))])
def test_any_other_plan_shows_the_first_picture_of_every_kind(size: int, kinds: tuple[str, ...]) -> None:
    chosen = first_of_each_kind((size, size))
    assert [one.sample.kind for one in chosen] == list(kinds)
    assert all(one.divergence is None for one in chosen)


def test_the_worst_sample_of_a_kind_is_the_one_that_is_moved_the_most() -> None:
    candidate = Candidate(make_data().plan, divergence=np.array([0.1, 0.5, 0.3, 0.5, 0.2]))
    kinds = ["b", "a", "b", "a", "c", "never run"]
    assert candidate.worst_by_kind(kinds) == {"a": 1, "b": 2, "c": 4}
