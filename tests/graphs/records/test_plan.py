"""The plan: the contract's example, its numbers, and every way a plan can be wrong."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan, Stage, rescale

# The released LLaVA-1.5-7B settings, as in the design's example and the paper's table.
RELEASED = PruningPlan(
    model_type="llava",
    num_layers=32,
    image_tokens=576,
    grid=(24, 24),
    stages=(
        Stage(layer=3, keep=288, attention_quota=86, pool=318, boundary=288, diversity_quota=86, seeds=144),
        Stage(layer=6, keep=144, attention_quota=130, pool=195, boundary=144, diversity_quota=14),
        Stage(layer=14, keep=48, attention_quota=48, pool=58, boundary=48),
        Stage(layer=22, keep=0),
    ),
)


def test_released_settings_average_129_tokens() -> None:
    assert RELEASED.average_tokens == 129.0
    assert RELEASED.compression == pytest.approx(1 - 129 / 576)


def test_tokens_per_layer_follow_the_stages() -> None:
    assert RELEASED.tokens_per_layer() == [576] * 3 + [288] * 3 + [144] * 8 + [48] * 8 + [0] * 10


def test_segments_cover_the_decoder() -> None:
    segments = RELEASED.segments()
    assert [(s.start, s.stop, s.image_tokens, s.stage) for s in segments] == [
        (0, 3, 576, None),
        (3, 6, 288, 0),
        (6, 14, 144, 1),
        (14, 22, 48, 2),
        (22, 32, 0, 3),
    ]


def test_stage_at_layer_zero_leaves_no_empty_segment() -> None:
    plan = PruningPlan(
        model_type="llava",
        num_layers=4,
        image_tokens=9,
        grid=(3, 3),
        stages=(Stage(layer=0, keep=4, diversity_quota=4),),
    )
    assert [(s.start, s.stop, s.stage) for s in plan.segments()] == [(0, 4, 0)]
    assert plan.average_tokens == 4


def test_json_has_the_contracts_keys() -> None:
    document = json.loads(RELEASED.to_json())
    assert document["format"] == "btp-plan/1"
    assert document["stages"][0] == {
        "layer": 3,
        "keep": 288,
        "attention_quota": 86,
        "pool": 318,
        "boundary": 288,
        "diversity_quota": 86,
        "seeds": 144,
    }
    assert document["stages"][-1] == {"layer": 22, "keep": 0}
    assert set(document) == {
        "format",
        "model_type",
        "num_layers",
        "image_tokens",
        "importance",
        "grid",
        "spatial_metric",
        "stages",
        "calibration",
    }


def test_round_trip_is_exact() -> None:
    assert PruningPlan.from_json(RELEASED.to_json()) == RELEASED
    assert PruningPlan.from_json(RELEASED.to_json()).to_json() == RELEASED.to_json()


def test_digest_ignores_the_calibration_record_only() -> None:
    noted = RELEASED.model_copy(update={"calibration": {"images": 64}})
    other = RELEASED.model_copy(update={"importance": "mean-text"})
    assert noted.digest() == RELEASED.digest() != other.digest()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": "btp-plan/3"}, "format"),
        ({"format": None}, "format"),
        ({"surprise": 1}, "surprise"),
        ({"num_layers": 20}, "layer 22 of a decoder with 20 layers"),
        ({"image_tokens": 200}, "keep 288 is not below the 200 tokens"),
        ({"importance": "guess"}, "importance"),
        ({"grid": [24]}, "grid"),
        ({"grid": [24, "x"]}, "grid"),
        ({"stages": [{"layer": 3, "keep": 600}]}, "keep 600 is not below"),
        ({"stages": [{"layer": 6, "keep": 9}, {"layer": 6, "keep": 4}]}, "does not come after layer 6"),
        ({"stages": [{"layer": 3, "keep": 9}, {"layer": 6, "keep": 9}]}, "keep 9 is not below the 9 tokens"),
        ({"stages": [{"layer": -1, "keep": 9}]}, "layer"),
        ({"stages": [{"layer": 3, "keep": 9.5}]}, "keep"),
        ({"stages": [{"layer": 3, "keep": 9, "attention_quota": 9, "pool": 8}]}, "attention_quota 9 > pool 8"),
        ({"stages": [{"layer": 3, "keep": 9, "attention_quota": 10, "pool": 10}]}, "attention_quota 10 > keep 9"),
        ({"stages": [{"layer": 3, "keep": 0, "seeds": 2}]}, "keep 0 drops every token"),
        ({"stages": [{"layer": 3, "keep": 99}, {"layer": 6, "keep": 9, "seeds": 2}]}, "only stage 0"),
        ({"stages": [{"layer": 3, "keep": 99, "extra": 0}]}, "extra"),
        ({"stages": [{"layer": 0, "keep": 9, "attention_quota": 9, "pool": 9}]}, "no layer before it"),
    ],
)
def test_wrong_plans_are_refused_by_name(change: dict[str, Any], complaint: str) -> None:
    document = json.loads(RELEASED.to_json()) | change
    if document["format"] is None:
        del document["format"]
    with pytest.raises(InputError, match=complaint):
        PruningPlan.from_json(json.dumps(document), source="my-plan.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "btp-plan/1"}', "\x00"])
def test_documents_that_are_no_plan(text: str) -> None:
    with pytest.raises(InputError, match=r"my-plan\.json is not a valid pruning plan"):
        PruningPlan.from_json(text, source="my-plan.json")


@st.composite
def plans(draw: st.DrawFn) -> PruningPlan:
    rows, columns = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    layers = draw(st.integers(1, 40))
    at = sorted(draw(st.sets(st.integers(1, layers), max_size=4)) - {layers})
    keeps = sorted(draw(st.sets(st.integers(0, rows * columns - 1), min_size=0, max_size=len(at))), reverse=True)
    stages = []
    for layer, keep in zip(at, keeps, strict=False):
        quota = draw(st.integers(0, keep))
        stages.append(Stage(layer=layer, keep=keep, attention_quota=quota, pool=quota, boundary=quota))
    return PruningPlan(
        model_type="llava", num_layers=layers, image_tokens=rows * columns, grid=(rows, columns), stages=tuple(stages)
    )


COVERING = {"diversity": "coverage", "features": "centred", "weights": "scores", "importance": "norm"}


def test_format_2_is_written_only_where_it_is_needed() -> None:
    """What format 1 can say stays format 1 with the bytes it always had; a stage's new words make it format 2."""
    assert (
        RELEASED.format == "btp-plan/1"
        and not {"diversity", "importance"} & json.loads(RELEASED.to_json())["stages"][0].keys()
    )
    first = Stage(layer=0, keep=63, **COVERING)
    plan = RELEASED.model_copy(update={"stages": (first, Stage(layer=9, keep=0))})
    document = json.loads(plan.to_json())
    assert (plan.format, document["format"], next(iter(document))) == ("btp-plan/2", "btp-plan/2", "format")
    assert document["stages"][0].items() >= COVERING.items() and document["stages"][1] == {"layer": 9, "keep": 0}
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert plan.importance_of(0) == "norm" and plan.importance == "last-token"
    assert PruningPlan.from_json(RELEASED.to_json().replace("plan/1", "plan/2")) == RELEASED
    smaller = rescale(plan, image_tokens=144, grid=(12, 12))
    assert smaller.stages[0] == Stage(layer=0, keep=16, **COVERING)


@pytest.mark.parametrize(
    ("stage", "complaint"),
    [
        ({"layer": 0, "keep": 9, **COVERING, "importance": "vision"}, "importance"),
        ({"layer": 3, "keep": 9, **COVERING}, "scores by norm, which is for layer 0"),
        ({"layer": 0, "keep": 9, **COVERING, "importance": None}, "no layer before it"),
        ({"layer": 0, "keep": 9, **COVERING, "diversity": "farthest"}, "weights are for coverage"),
        ({"layer": 3, "keep": 0, "diversity": "coverage"}, "drops every token by no rule"),
    ],
)
def test_wrong_rules_are_refused_by_name(stage: dict[str, Any], complaint: str) -> None:
    document = json.loads(RELEASED.to_json()) | {"format": "btp-plan/2", "stages": [stage]}
    with pytest.raises(InputError, match=complaint):
        PruningPlan.from_json(json.dumps(document), source="my-plan.json")


def test_format_1_cannot_hold_new_rules() -> None:
    document = json.loads(RELEASED.to_json()) | {"stages": [{"layer": 0, "keep": 9, **COVERING}]}
    with pytest.raises(InputError, match="stage 0 says more than btp-plan/1 can hold"):
        PruningPlan.from_json(json.dumps(document), source="my-plan.json")
    stage = {"layer": 0, "keep": 9, "attention_quota": 9, "pool": 9, "boundary": 9}
    document |= {"stages": [stage], "importance": "norm"}
    with pytest.raises(InputError, match="importance norm says more than btp-plan/1 can hold"):
        PruningPlan.from_json(json.dumps(document), source="my-plan.json")


@given(plans())
def test_any_plan_round_trips_and_counts_add_up(plan: PruningPlan) -> None:
    assert PruningPlan.from_json(plan.to_json()) == plan
    tokens = plan.tokens_per_layer()
    assert len(tokens) == plan.num_layers
    assert tokens == sorted(tokens, reverse=True)
    assert plan.average_tokens == pytest.approx(sum(tokens) / len(tokens))
    segments = plan.segments()
    assert segments[0].start == 0 and segments[-1].stop == plan.num_layers
    assert all(a.stop == b.start for a, b in itertools.pairwise(segments))


# Rescaling


def test_rescaling_keeps_layers_and_shares() -> None:
    """The released plan from 576 to 2304 tokens is four times the counts, and back the same plan."""
    large = rescale(RELEASED, image_tokens=2304, grid=(48, 48))
    first, small = large.stages[0], RELEASED.stages[0]
    assert [stage.layer for stage in large.stages] == [stage.layer for stage in RELEASED.stages]
    assert first.model_dump() == {
        name: value if name == "layer" else 4 * value for name, value in small.model_dump().items()
    }
    assert large.compression == pytest.approx(RELEASED.compression)
    assert large.calibration["rescaled_from"] == {"image_tokens": 576, "grid": [24, 24], "blocks": []}
    back = rescale(large, image_tokens=576, grid=(24, 24))
    assert back.digest() == RELEASED.digest()
    assert rescale(RELEASED, image_tokens=576, grid=(24, 24)) is RELEASED


@given(plans(), st.integers(1, 400))
def test_any_plan_rescales_to_a_valid_one(plan: PruningPlan, tokens: int) -> None:
    keeping = [stage.keep for stage in plan.stages if stage.keep]
    if tokens <= len(keeping):
        with pytest.raises(InputError, match=f"for {tokens} image tokens"):
            rescale(plan, image_tokens=tokens, grid=(1, tokens))
        return
    rescaled = rescale(plan, image_tokens=tokens, grid=(1, tokens))
    assert PruningPlan.from_json(rescaled.to_json()) == rescaled
    assert [stage.layer for stage in rescaled.stages] == [stage.layer for stage in plan.stages]
    before = tokens
    for number, (new, old) in enumerate(zip(rescaled.stages, plan.stages, strict=True)):
        assert (new.keep == 0) == (old.keep == 0)
        exact = old.keep * tokens / plan.image_tokens
        # Counts must fall, and leave room to fall: 22 and 21 of 36 are both 5 of 8 when rounded.
        highest, lowest = new.keep == before - 1 < exact, new.keep == len(keeping) - number > exact
        assert abs(new.keep - exact) <= 0.5 or highest or lowest
        before = new.keep
        assert (new.attention_quota == new.keep) or old.attention_quota < old.keep, "no fill where there was none"


def test_places_that_were_full_stay_full() -> None:
    """attention + diversity + seeds = keep before and after, whatever the rounding."""
    stage = Stage(layer=1, keep=100, attention_quota=33, pool=90, boundary=100, diversity_quota=42, seeds=25)
    plan = RELEASED.model_copy(update={"stages": (stage,)})
    for tokens in range(40, 700, 7):
        rescaled = rescale(plan, image_tokens=tokens, grid=(1, tokens)).stages[0]
        assert rescaled.attention_quota + rescaled.diversity_quota + rescaled.seeds == rescaled.keep
        assert rescaled.pool >= rescaled.attention_quota


def test_all_plans_of_a_shape_are_one_without_stages() -> None:
    stage = Stage(layer=1, keep=4, attention_quota=4, pool=4)
    shape = {"model_type": "llava", "num_layers": 4, "image_tokens": 16, "grid": (4, 4)}
    bare = PruningPlan.model_validate(shape)
    others = [
        PruningPlan.model_validate(shape | {"stages": (stage,), **settings})
        for settings in ({}, {"importance": "mean-text"}, {"spatial_metric": "manhattan"}, {"calibration": {"a": 1}})
    ]
    assert {plan.without_stages().digest() for plan in (bare, *others)} == {bare.digest()}
    assert all(plan.without_stages() == bare for plan in (bare, *others))
    assert len({plan.digest() for plan in others}) == 3, (
        "the settings count where there are stages; the record does not"
    )


def test_without_stages_the_tokens_lie_as_before() -> None:
    plan = PruningPlan(
        model_type="llava_next", num_layers=2, image_tokens=24, grid=(4, 4), blocks=((2, 2), (4, 5)),
        stages=(Stage(layer=1, keep=0),),
    )  # fmt: skip
    bare = plan.without_stages()
    assert (bare.grid, bare.blocks, bare.image_tokens, bare.stages) == (plan.grid, plan.blocks, 24, ())
    assert bare.compression == 0.0


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"keep": 10.5}, "stages.0.keep: .*; it is 10.5"),
        ({"keep": "many"}, 'stages.0.keep: .*; it is "many"'),
        ({"keep": 10**6}, "plan: stage 0: keep 1000000 is not below"),
    ],
)
def test_what_is_wrong_in_a_file_is_shown(edit: dict[str, Any], said: str, tmp_path: Path) -> None:
    """With its value, and without the words of the library that found it."""
    document = json.loads(RELEASED.to_json())
    document["stages"][0] |= edit
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match=said) as raised:
        PruningPlan.load(tmp_path / "plan.json")
    assert "Value error" not in raised.value.got


def test_a_byte_order_mark_is_named(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("\ufeff" + RELEASED.to_json())
    with pytest.raises(InputError, match="byte order mark"):
        PruningPlan.load(tmp_path / "plan.json")
