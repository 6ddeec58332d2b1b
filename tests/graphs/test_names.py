"""Names of graphs and tensors: what is made can be taken apart, and the graphs that are built have these names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphs import names
from graphs.records.plan import PruningPlan, Stage

NUMBERS = st.integers(0, 200)
LAYERS_AT_A_STAGE = (0, 2, 5)


@given(NUMBERS)
def test_what_is_made_can_be_taken_apart(number: int) -> None:
    assert names.parse_graph(names.prefill(number)) == names.GraphName("prefill", number)
    assert names.parse_graph(names.select(number)) == names.GraphName("select", number)
    for role in ("key", "value", "past_key", "past_value", "length", "indices", "last"):
        name = getattr(names, role)(number)
        assert name == f"{role}_{number}"  # graphs/interfaces.md
        assert names.parse_tensor(name) == names.TensorName(role, number)
        assert names.parse_tensor(name).name == name
    assert names.cache_rows(number) == (names.key(number), names.value(number))


@pytest.mark.parametrize(
    ("name", "kind"), [("vision", "vision"), ("head", "head"), ("decode", "decode"), ("prefill", "whole")]
)
def test_graphs_without_a_number(name: str, kind: names.GraphKind) -> None:
    assert names.parse_graph(name) == names.GraphName(kind)


@pytest.mark.parametrize(
    "name", ["", "prefill_", "prefill_x", "prefill_01", "prefill_-1", "select", "vision_0", "decode_1", "a.prefill_0"]
)
def test_what_no_graph_is_called_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no graph is called"):
        names.parse_graph(name)


@pytest.mark.parametrize("name", ["hidden", "hidden_out", "last_out", "key", "key_", "image_features", "key_out_3x"])
def test_a_tensor_without_a_number_is_its_own_role(name: str) -> None:
    parsed = names.parse_tensor(name)
    assert (parsed.role, parsed.number, parsed.is_cache, parsed.name) == (name, None, False, name)


def test_only_keys_and_values_are_caches() -> None:
    caches = [names.key(3), names.value(3), names.past_key(3), names.past_value(3)]
    assert all(names.parse_tensor(name).is_cache for name in caches)
    assert not any(names.parse_tensor(name).is_cache for name in ("length_3", "indices_3", "last_3", "key", "query"))


@pytest.mark.parametrize("first", LAYERS_AT_A_STAGE)
def test_prefill_graphs_run_in_the_order_of_the_plan(first: int) -> None:
    """By hand: a stage stands before the segment that begins at its layer; one at layer 0 stands before all."""
    stages = (Stage(layer=first, keep=4, pool=4, attention_quota=0), Stage(layer=6, keep=0))
    plan = PruningPlan(model_type="llava", num_layers=8, image_tokens=16, grid=(4, 4), stages=stages)
    wanted = ["vision", "prefill_0", "select_0", "prefill_1", "select_1", "prefill_2", "head"]
    if first == 0:
        wanted = ["vision", "select_0", "prefill_0", "select_1", "prefill_1", "head"]
    assert names.prefill_graphs(plan) == wanted
    assert names.prefill_graphs(plan, whole=True) == ["prefill"]


def test_where_a_graph_can_be_cut() -> None:
    assert names.is_cut(f"{names.layer_scope(12)}.output") and names.is_cut("embedded")
    assert not any(
        names.is_cut(name) for name in ("layer_1.attention.output", "layer_x.output", "embedded.0", "output")
    )
