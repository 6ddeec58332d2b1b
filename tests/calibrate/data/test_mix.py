"""Drawn pictures and their mix: shares, order, seeds, sizes and what is refused."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate.data import drawn
from calibrate.data.mix import NAMES, SCENES, default_mix, mixed_samples, parse_mix
from calibrate.data.samples import scene_samples
from graphs.records.errors import InputError


@pytest.mark.parametrize("kind", drawn.KINDS)
def test_a_seed_gives_the_same_pixels_and_others_differ(kind: str) -> None:
    first, again, other = (drawn.draw(kind, seed, 3, (300, 336)) for seed in (5, 5, 6))
    assert first.image.size == (336, 300) and first.image.mode == "RGB"
    assert first.image.tobytes() == again.image.tobytes() and first.prompt == again.prompt
    assert first.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("kind", drawn.KINDS)
@pytest.mark.parametrize("size", [(280, 280), (336, 336), (504, 672), (1092, 728)])
def test_ink_is_on_every_part_of_the_picture(kind: str, size: tuple[int, int]) -> None:
    """What is drawn scales with the picture: no quarter of it is empty, at no size."""
    pixels = np.asarray(drawn.draw(kind, 1, 0, size).image.convert("L"), np.float64)
    rows, columns = size[0] // 2, size[1] // 2
    quarters = [pixels[:rows, :columns], pixels[rows:, :columns], pixels[:rows, columns:], pixels[rows:, columns:]]
    assert all(quarter.std() > 3 for quarter in quarters)


def test_the_default_is_every_kind_that_fits_in_turns() -> None:
    result = mixed_samples(24, seed=0, size=(336, 336))
    kinds = [sample.kind for sample in result.samples]
    assert set(kinds[:6]) == set(NAMES) and Counter(kinds) == dict.fromkeys(NAMES, 4)
    assert "signs 0.167" in result.source
    assert result.digest() == mixed_samples(24, seed=0, size=(336, 336)).digest()
    assert result.digest() != mixed_samples(24, seed=1, size=(336, 336)).digest()


def test_a_small_picture_holds_scenes_alone() -> None:
    assert default_mix((96, 96)) == {SCENES: 1.0}
    result, wanted = mixed_samples(9, seed=4, size=(96, 96)), scene_samples(9, seed=4, split="calibration")
    assert result.digest() == wanted.digest() and [sample.kind for sample in result.samples] == [
        sample.kind for sample in wanted.samples
    ]
    with pytest.raises(InputError, match="--mix with pages at 96 x 96 pixels"):
        mixed_samples(4, seed=0, size=(96, 96), shares={"pages": 1.0})


def test_reading_is_all_the_drawn_kinds() -> None:
    shares = parse_mix("scenes=0.5,reading=0.5")
    assert shares == {SCENES: 0.5} | dict.fromkeys(drawn.KINDS, 0.1)
    counted = Counter(sample.kind for sample in mixed_samples(20, seed=0, size=(336, 336), shares=shares).samples)
    assert counted == {SCENES: 10} | dict.fromkeys(drawn.KINDS, 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scenes=0.5", "adds up to 0.5"),
        ("scenes=0.5,signs=0.6", "adds up to 1.1"),
        ("faces=1", "no kind 'faces'"),
        ("scenes", "scenes has no share"),
        ("scenes=half,signs=0.5", "scenes has no share"),
        ("scenes=-1,signs=2", "scenes=-1"),
        ("scenes=nan,signs=1", "scenes=nan"),
        ("", "no kind ''"),
    ],
)
def test_wrong_mixes_are_refused(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_mix(text)


@given(st.integers(1, 60), st.dictionaries(st.sampled_from(NAMES), st.integers(1, 9), min_size=1))
def test_every_kind_gets_its_share(count: int, weights: dict[str, int]) -> None:
    from calibrate.data.mix import _interleaved

    total = sum(weights.values())
    order = Counter(_interleaved(count, {name: weight / total for name, weight in weights.items()}))
    for name, weight in weights.items():
        assert abs(order[name] - count * weight / total) < 1.0 + 1e-9 * count + (len(weights) > 2) * len(weights)
