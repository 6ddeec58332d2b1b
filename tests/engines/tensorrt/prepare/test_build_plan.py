"""Estimates counted by hand and from the files, what is chosen where the user left it open, and what is refused."""

from dataclasses import replace
from typing import Any

import onnx_ir as ir
import pytest
from safetensors import safe_open

from engines.targets import GIB, Target, find_target
from engines.tensorrt.prepare.build_plan import Wishes, plan_build, require_build_memory
from engines.tensorrt.prepare.estimate import BUILD_BASE, BUILD_FACTOR, ENGINE_BASE, estimate, totals
from engines.tensorrt.prepare.prepared_graphs import Choices, PreparedGraph, prepare, strip_bodies
from graphs.building.graph_builder import BTP_DOMAIN, GraphBuilder
from graphs.building.portable_bodies import embed_bodies
from graphs.records.errors import InputError
from tests.engines.tensorrt.plans import staged_bundle


def test_values_that_are_alive_at_once() -> None:
    """a -> b -> c, and a is read again: a, b and c of 4 KB each are there together; the output is not counted."""
    b = GraphBuilder("g", opset=18)
    x = b.input("x", (1, 1024))
    first = b.unary("Sqrt", x, "a")
    second = b.unary("Sqrt", first, "b")
    third = b.unary("Sqrt", second, "c")
    b.output(b.add(third, first, "sum"), "y")
    graph = PreparedGraph("g", "p", b.build().model, None)
    counted = estimate(graph)
    assert counted.activation_bytes == 3 * 4096
    assert counted.io_bytes == 2 * 4096 and counted.weight_bytes == 0
    assert counted.engine_bytes == ENGINE_BASE and counted.build_peak_bytes == BUILD_BASE


@pytest.mark.parametrize("shape", [None, ir.Shape([2**62])], ids=["no shape", "more bytes than there are"])
def test_a_damaged_graph_is_refused(shape: ir.Shape | None) -> None:
    """A vision graph is read from its file, so its values can have any shape, or none."""
    b = GraphBuilder("vision", opset=18)
    first = b.unary("Sqrt", b.input("x", (1, 8)), "a")
    b.output(b.unary("Sqrt", first, "b"), "y")
    first.shape = shape
    with pytest.raises(InputError, match="the graph vision is no readable ONNX graph"):
        estimate(PreparedGraph("vision", "p", b.build().model, None))


def selection(tokens: int, **rule: Any) -> ir.Model:
    """One BtpSelectTokens on scores [2,V] and a float16 similarity, both made in the graph."""
    b = GraphBuilder("select_0", opset=18)
    scores = b.unary("Sqrt", b.input("x", (2, tokens)), "scores")
    given = b.input("s", (2, tokens, tokens), ir.DataType.FLOAT16)
    counts = {"keep": 8, "attention_quota": 2, "diversity_quota": 2, "pool": 4, "boundary": 0}
    indices = b.op(
        "BtpSelectTokens", [scores, given], "indices", shape=(2, 8), dtype=ir.DataType.INT32, domain=BTP_DOMAIN,
        **counts, **rule,
    )  # fmt: skip
    b.output(indices, "y")
    embed_bodies(b)
    return b.build().model


@pytest.mark.parametrize("tokens", [576, 577])
def test_a_selection_needs_its_plugins_workspace_or_its_bodys(tokens: int) -> None:
    """Coverage keeps the similarity of a row once more, in 2 bytes, its rows filled up to 8 elements."""

    def activations(model: ir.Model) -> int:
        return estimate(PreparedGraph("select_0", "p", model, None)).activation_bytes

    needed: dict[str, int] = {}
    for name, rule in (("farthest", {}), ("coverage", {"diversity_rule": "coverage", "weighted": 1})):
        model = selection(tokens, **rule)
        assert activations(model) == 2 * 4 * tokens + 3 * 4 * 2 * tokens**2  # the scores; see scratch_bytes
        strip_bodies(model)
        needed[name] = activations(model)
    filled = (tokens + 7) // 8 * 8
    assert needed["coverage"] - needed["farthest"] == 2 * 2 * tokens * filled
    assert needed["farthest"] < 2 * 4 * tokens + 2 * 16 * tokens


def test_weights_are_those_of_the_files(tiny_bundle: Any) -> None:
    """Baked or shared, prefill and head together read every decoder tensor but the embedding table, as it is stored."""
    bundle = staged_bundle(tiny_bundle)
    stored = 0
    for file in bundle.weights.glob("model*.safetensors"):
        with safe_open(file, "np") as opened:
            names = [n for n in opened.keys() if "language_model" in n or "lm_head" in n]  # noqa: SIM118
            stored += sum(opened.get_tensor(name).nbytes for name in names if "embed_tokens" not in name)
    for weights in ("baked", "shared"):
        graphs = prepare(bundle, Choices(23, weights=weights))
        decoder = [graph for graph in graphs if graph.name.startswith(("prefill", "head"))]
        counted = sum(estimate(graph).weight_bytes for graph in decoder)
        assert stored <= counted < stored + 4096  # and a few shapes and positions
    needed = totals(graphs, [estimate(graph) for graph in graphs])
    assert needed.weight_bytes == sum(
        {w.name: 4 * w.shape[0] * w.shape[1] for g in graphs for w in g.weight_inputs}.values()
    )


def test_half_precision_constants_are_counted_in_their_own_type(tiny_bundle: Any) -> None:
    bundle = staged_bundle(tiny_bundle, precision="float16")
    graphs = {weights: prepare(bundle, Choices(18, weights=weights)) for weights in ("baked", "shared")}
    baked, shared = ({g.name: estimate(g).weight_bytes for g in built} for built in graphs.values())
    assert baked["head"] == pytest.approx(shared["head"], rel=0.01)
    full = {g.name: estimate(g).weight_bytes for g in prepare(staged_bundle(tiny_bundle), Choices(18))}
    assert baked["prefill_0"] == pytest.approx(full["prefill_0"] / 2, rel=0.05)


def small(target: Target, memory: int, **changes: Any) -> Target:
    """The target with just that much memory left for engines."""
    reserve = 6 * GIB if target.unified_memory else GIB
    return replace(target, memory_bytes=memory + reserve, **changes)


def sizes(bundle: Any, **choices: Any) -> Any:
    graphs = prepare(bundle, Choices(23, **choices))
    return totals(graphs, [estimate(graph) for graph in graphs])


def test_shared_weights_are_chosen_and_said_where_both_copies_cannot_fit(tiny_bundle: Any) -> None:
    bundle = staged_bundle(tiny_bundle)
    baked, shared = sizes(bundle), sizes(bundle, weights="shared")
    assert shared.run_bytes < baked.run_bytes
    between = small(find_target("h100"), (baked.run_bytes + shared.run_bytes) // 2)
    planned = plan_build(bundle, between, Wishes())
    assert planned.choices.weights == "shared" and planned.notes[0].startswith("engine weights shared: baked ones need")
    assert planned.summary().engine_weights == "shared"
    roomy = plan_build(bundle, small(find_target("h100"), baked.run_bytes), Wishes())
    assert roomy.choices.weights == "baked" and "shared" not in "".join(roomy.notes)


def test_what_cannot_fit_is_refused_with_what_would(tiny_bundle: Any) -> None:
    bundle = staged_bundle(tiny_bundle)
    baked, shared = sizes(bundle), sizes(bundle, weights="shared")
    between = small(find_target("h100"), (baked.run_bytes + shared.run_bytes) // 2)
    with pytest.raises(InputError, match="the engines need") as error:
        plan_build(bundle, between, Wishes(engine_weights="baked"))
    assert error.value.do == "--engine-weights shared" and between.title in error.value.wanted
    with pytest.raises(InputError) as error:
        plan_build(bundle, small(between, shared.run_bytes // 2), Wishes())
    assert "smaller bucket than text=16,new=12,batch=1" in error.value.do


def test_a_board_also_has_to_build_them(tiny_bundle: Any) -> None:
    """One whole graph with constants takes more to build than segments; on a card the host's memory builds."""
    bundle = staged_bundle(tiny_bundle)
    whole, segments = sizes(bundle, assemble="whole"), sizes(bundle)
    graphs = prepare(bundle, Choices(23))
    decode = next(estimate(g) for g in graphs if g.name == "decode")
    assert segments.build_peak_bytes == decode.build_peak_bytes  # segments cannot help decode, which has every layer
    assert whole.build_peak_bytes > segments.build_peak_bytes > BUILD_BASE
    between = (whole.build_peak_bytes + segments.build_peak_bytes) // 2
    board = small(find_target("jetson-orin-jp7"), between)
    with pytest.raises(InputError) as error:
        plan_build(bundle, board, Wishes(assemble="whole", engine_weights="baked"))
    assert error.value.do == "--assemble segments"
    card = small(find_target("h100"), between)
    planned = plan_build(bundle, card, Wishes(assemble="whole", engine_weights="baked"))
    with pytest.raises(InputError, match="building the largest engine") as error:
        require_build_memory(planned, between)
    assert error.value.do == "--assemble segments"
    require_build_memory(planned, whole.build_peak_bytes)


def test_the_build_counts_constants_only(tiny_bundle: Any) -> None:
    graph = next(g for g in prepare(staged_bundle(tiny_bundle), Choices(23)) if g.name == "prefill_0")
    counted = estimate(graph)
    assert counted.build_peak_bytes == BUILD_BASE + BUILD_FACTOR * counted.weight_bytes
    values = graph.model.graph.initializers.values()
    external = [v.const_value for v in values if isinstance(v.const_value, ir.ExternalTensor)]
    assert counted.weight_bytes >= sum(tensor.nbytes for tensor in external)


def test_the_users_memory_stands_in_for_the_targets(tiny_bundle: Any) -> None:
    bundle = staged_bundle(tiny_bundle)
    planned = plan_build(bundle, find_target("jetson-orin-jp6"), Wishes(memory_bytes=16 * GIB))
    assert planned.usable_bytes == 10 * GIB
    with pytest.raises(InputError, match="--memory"):
        plan_build(bundle, find_target("jetson-orin-jp6"), Wishes(memory_bytes=4 * GIB))


def test_defaults_and_notes(tiny_bundle: Any) -> None:
    bundle = staged_bundle(tiny_bundle)
    orin = plan_build(bundle, find_target("jetson-orin-jp6"), Wishes())
    assert (orin.choices.opset, orin.choices.weights, orin.plugins) == (18, "shared", "library")
    assert any("opset 18 in place of 23" in note for note in orin.notes)
    assert any("not yet measured" in note for note in orin.notes)
    thor = plan_build(bundle, find_target("jetson-thor"), Wishes(tensorrt="11.4.1"))
    assert any("11.4.1 is taken to be like 11.1" in note for note in thor.notes)
    ada = plan_build(bundle, find_target("rtx-ada"), Wishes())
    assert ada.plugins == "none" and not any(g.custom_nodes for g in ada.graphs)
    forced = plan_build(bundle, find_target("rtx-ada"), Wishes(plugins="python"))
    assert any("unsupported" in note for note in forced.notes) and any(g.custom_nodes for g in forced.graphs)


def test_the_document_has_every_graph(tiny_bundle: Any) -> None:
    bundle = staged_bundle(tiny_bundle)
    document = plan_build(bundle, find_target("jetson-orin-jp6"), Wishes(unpruned=True)).summary()
    assert [graph.name for graph in document.graphs] == [record.name for record in bundle.graphs()]
    assert [graph.name for graph in document.unpruned.graphs] == ["vision", "prefill_0", "head", "decode"]
    assert document.total.run_bytes < document.total.usable_bytes and document.findings == ()
    assert document.estimates_from and document.compute_capability == "8.7"
