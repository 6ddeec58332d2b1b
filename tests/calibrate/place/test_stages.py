"""Stage choice: on the published counts, by hand, and on anything."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.place.balance import Recipe
from calibrate.place.counts import Shape
from calibrate.place.stages import final_layer, layers_for, placements, remaining_change
from graphs.records.errors import InputError

# Published for LLaVA-1.5-7B, mean over the set, by 1-based odd layer; between two odd layers the mean is taken.
PUBLISHED = {1: 0, 3: 0, 5: 0, 7: 151, 9: 325, 11: 359, 13: 141, 15: 136, 17: 155, 19: 38, 21: 45, 23: 11, 25: 1,
             27: 0, 29: 3, 31: 0}  # fmt: skip
COUNTS = np.interp(np.arange(1, 33), list(PUBLISHED), list(PUBLISHED.values()))
LLAVA = Shape("llava", 32, 576, (24, 24))


def test_published_counts_give_stages_like_the_released_ones() -> None:
    final = final_layer(COUNTS, None, 0.0)
    assert final == 22  # as released: right after 1-based layer 22, the last with a twentieth of the highest count
    best, *others = placements(COUNTS, final, LLAVA, 0.776, limit=5)
    assert best.layers == (3, 8, 11, 22)  # released: 3, 6, 14, 22
    assert best.keeps == (288, 144, 48, 0)  # as released
    assert any(abs(np.subtract(other.layers, (3, 6, 14, 22))).sum() <= 4 for other in others)
    early, late = best.layers[0], best.layers[-1]
    assert COUNTS[:early].sum() == 0 and COUNTS[late:].sum() < 0.02 * COUNTS.sum()


def test_the_final_layer_follows_what_was_measured() -> None:
    divergence = np.array([3.0, 2.0, 1.0, 0.3, 0.06, 0.03, 0.001, 0.0])
    counts = np.full(8, 10.0)
    assert final_layer(counts, divergence, 0.05) == 5
    assert final_layer(counts, divergence, 0.5) == 3
    assert final_layer(counts, divergence, 0.0) == 7
    bumpy = np.array([3.0, 0.01, 1.0, 0.3, 0.01, 0.01, 0.01, 0.01])
    assert final_layer(counts, bumpy, 0.05) == 4, "a layer that is within the bound by chance does not count"


def test_remaining_change() -> None:
    np.testing.assert_allclose(remaining_change(np.array([0.0, 2.0, 1.0, 1.0])), [1.0, 1.0, 0.5, 0.25, 0.0])
    np.testing.assert_allclose(remaining_change(np.zeros(2)), [1.0, 0.5, 0.0])


def test_stages_come_after_the_change_not_before_it() -> None:
    shape, counts = Shape("llava", 16, 100, (10, 10)), np.zeros(16)
    counts[4:6] = 80
    (placed,) = placements(counts, 12, shape, 0.4)
    assert placed.layers[0] >= 6


shapes = st.builds(
    lambda layers, side, extra: Shape("llava", layers, side * side + extra, (side, side)),
    st.integers(2, 48), st.integers(2, 40), st.integers(0, 50),
)  # fmt: skip


@settings(deadline=None)
@given(shapes, st.data())
def test_any_reachable_compression_is_reached_and_nearly_met(shape: Shape, data: st.DataObject) -> None:
    most = 1 - 1 / min(shape.num_layers, shape.image_tokens)  # a layer whole, and a token a layer
    compression = data.draw(st.floats(0, most - 1e-9))
    counts = np.array(data.draw(st.lists(st.floats(0, 500), min_size=shape.num_layers, max_size=shape.num_layers)))
    final = data.draw(st.integers(1, shape.num_layers - 1))
    for placed in placements(counts, final, shape, compression, limit=3):
        plan = Recipe().plan(shape, placed.layers, placed.keeps)
        assert plan.compression >= compression - 1e-9
        roomy = len(placed.layers) > 1 and shape.image_tokens >= 100
        if roomy and plan.compression < 0.95:
            # One token more anywhere would break the budget, up to the longest span of layers.
            assert plan.compression - compression <= 1.0 / shape.image_tokens + 1e-9 or placed.keeps[0] == 1


def test_a_compression_that_no_plan_reaches_is_refused() -> None:
    with pytest.raises(InputError, match="less than one of 4 layers"):
        placements(np.ones(4), 2, Shape("llava", 4, 16, (4, 4)), 0.8)


@settings(deadline=None)
@given(shapes, st.data())
def test_given_counts_find_layers(shape: Shape, data: st.DataObject) -> None:
    most = min(4, shape.num_layers - 1, shape.image_tokens - 1)
    counts = st.integers(0, shape.image_tokens - 1)
    keeps = sorted(data.draw(st.lists(counts, min_size=1, max_size=most, unique=True)), reverse=True)
    layers = layers_for(np.ones(shape.num_layers), keeps, max(1, shape.num_layers // 2), shape, 0.78)
    plan = Recipe().plan(shape, layers, keeps)
    assert [stage.keep for stage in plan.stages] == keeps


@pytest.mark.parametrize("keeps", [(), (48, 144), (576, 10), (10, 10), (10, -1)])
def test_counts_that_do_not_fall_are_refused(keeps: tuple[int, ...]) -> None:
    with pytest.raises(InputError):
        layers_for(COUNTS, keeps, 22, LLAVA, 0.78)


def test_released_counts_get_layers_near_the_released_ones() -> None:
    assert layers_for(COUNTS, (288, 144, 48, 0), 22, LLAVA, 0.776) == (3, 8, 11, 22)
