"""Prepared graphs compute what the bundle's graphs compute: in ONNX Runtime, bit for bit.

ONNX Runtime rearranges constant matrices before it multiplies (prepacking) and then uses other kernels than for inputs,
so comparisons of constants with inputs run without it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors import safe_open

from engines.tensorrt.prepare.prepared_graphs import (
    Choices,
    PreparedGraph,
    exact_bodies,
    prepare,
    suited_opset,
)
from engines.tensorrt.versions import traits
from graphs.building.decoder_graphs import build_decoder_graphs
from graphs.building.graph_builder import BTP_DOMAIN, GraphBuilder
from graphs.building.portable_bodies import embed_bodies
from graphs.files.bundle import Bundle
from graphs.ops import select_tokens
from tests.engines.tensorrt.plans import RULES, STAGES, staged_bundle
from tests.graphs import models

RNG = np.random.default_rng(0)
Feeds = dict[str, Any]


def session(graph: PreparedGraph, folder: Path, *, prepack: bool = False) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    path = folder / f"{graph.name}.tried.onnx"
    path.write_bytes(graph.serialize())
    try:
        return onnxruntime.InferenceSession(str(path), options)
    finally:
        path.unlink()


def random_inputs(graph: PreparedGraph, last: int) -> Feeds:
    return {
        tensor.name: np.full(tensor.shape, last, tensor.dtype)
        if tensor.dtype == "int32"
        else RNG.standard_normal(tensor.shape).astype(tensor.dtype)
        for tensor in graph.inputs
    }


def weights_of(graph: PreparedGraph, files: Path, names: dict[str, str]) -> Feeds:
    """What the weight inputs must hold, read by the safetensors library under the tensors' own names."""
    stored: Feeds = {}
    for file in files.glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            stored |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return {
        weight.name: np.concatenate([stored[names.get(tensor, tensor)] for tensor in tensors]).astype(weight.dtype)
        for weight in graph.weight_inputs
        for tensors in [[source.tensor.removeprefix("vision.") for source in weight.sources]]
    }


def stored_names(bundle: Bundle) -> dict[str, str]:
    return {name: ref.stored_name for name, ref in bundle.checkpoint().tensors.items()}


def assert_equal(one: list[Any], other: list[Any], what: str) -> None:
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=f"{what}, output {number}")


@pytest.mark.parametrize(("opset", "assemble"), [(23, "segments"), (23, "whole"), (18, "segments")])
def test_with_the_bundles_own_settings_the_bytes_are_the_bundles(tiny_bundle: Any, opset: int, assemble: Any) -> None:
    """But for a whole graph, whose generic body TensorRT cannot import, and for decode (test_attention.py)."""
    bundle = staged_bundle(tiny_bundle, opset=opset, assemble=assemble)
    made = {graph.name: graph for graph in prepare(bundle, Choices(opset, assemble, plugins=False))}
    compared = 0
    for record in bundle.graphs():
        if record.name in made and record.name not in ("prefill", "decode"):
            fresh, exported = made[record.name].serialize(), (bundle.root / record.file).read_bytes()
            assert onnx.load_from_string(fresh) == onnx.load_from_string(exported), record.name
            compared += 1
    assert compared == (0 if assemble == "whole" else len(made) - 1)
    assert set(made) == {r.name for r in bundle.graphs()} - ({"vision"} if assemble == "whole" else set())


@pytest.mark.parametrize("opset", [23, 18])
@pytest.mark.parametrize("assemble", ["segments", "whole"])
@pytest.mark.parametrize("pack", [False, True])
def test_shared_weights_compute_the_same_bits(tiny_bundle: Any, opset: int, assemble: Any, pack: bool) -> None:
    bundle = staged_bundle(tiny_bundle)
    baked = prepare(bundle, Choices(opset, assemble, plugins=False))
    shared = prepare(bundle, Choices(opset, assemble, "shared", pack=pack, plugins=False))
    names = stored_names(bundle)
    for constant, asked in zip(baked, shared, strict=True):
        assert (constant.name, constant.inputs, constant.outputs) == (asked.name, asked.inputs, asked.outputs)
        feeds = random_inputs(constant, last=20 if assemble == "segments" else 45)
        weights = weights_of(asked, bundle.weights, names)
        wanted = session(constant, bundle.root / "graphs").run(None, feeds)
        got = session(asked, bundle.root / "graphs").run(None, feeds | weights)
        assert_equal(got, wanted, f"{asked.name} with {len(weights)} weights")
        assert bool(weights) == (constant.name not in ("select_0", "select_1", "select_2", "select_3"))


def test_what_becomes_an_input(tiny_bundle: Any) -> None:
    """Every projection of every layer and no norm; packed: four inputs a layer. Prefill and decode name them alike."""
    bundle = staged_bundle(tiny_bundle)
    plain = {g.name: g for g in prepare(bundle, Choices(23, weights="shared", pack=False))}
    packed = {g.name: g for g in prepare(bundle, Choices(23, weights="shared", pack=True))}
    kinds = [f"self_attn.{kind}_proj" for kind in "qkvo"] + [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]
    every = {f"language_model.layers.{layer}.{kind}.weight" for layer in range(6) for kind in kinds}
    assert {weight.name for weight in plain["decode"].weight_inputs} == every | {"lm_head.weight"}
    segments = [graph for name, graph in plain.items() if name.startswith("prefill")]
    assert {weight.name for graph in segments for weight in graph.weight_inputs} == every
    of_layer = [w for w in packed["decode"].weight_inputs if ".layers.3." in w.name]
    assert {w.name.split("layers.3.")[1]: len(w.sources) for w in of_layer} == {
        "self_attn.q_proj_k_proj_v_proj.weight": 3,
        "self_attn.o_proj.weight": 1,
        "mlp.gate_proj_up_proj.weight": 2,
        "mlp.down_proj.weight": 1,
    }
    everywhere = {weight.name: weight for graph in packed.values() for weight in graph.weight_inputs}
    for graph in packed.values():
        assert all(everywhere[weight.name] == weight for weight in graph.weight_inputs)
        left = [value.const_value for value in graph.model.graph.initializers.values()]
        big = [tensor for tensor in left if len(tensor.shape) == 2 and tensor.nbytes > 4096]
        assert not [t for t in big if isinstance(t, ir.ExternalTensor)], graph.name


def test_names_do_not_depend_on_the_plan(tiny_bundle: Any) -> None:
    """So that the unpruned engines find the same buffers."""
    bundle = staged_bundle(tiny_bundle)
    choices = Choices(18, weights="shared")
    pruned, full = prepare(bundle, choices), prepare(bundle.without_pruning(), choices)
    assert [g.name for g in full] == ["vision", "prefill_0", "head", "decode"]
    assert {w for g in pruned for w in g.weight_inputs} == {w for g in full for w in g.weight_inputs}
    assert not any(g.custom_nodes for g in full) and bundle.plan.stages


@pytest.mark.parametrize("precision", ["float16"])
def test_weights_of_another_type_are_converted_by_the_loader(tiny_bundle: Any, precision: Any) -> None:
    """Stored float32, computed in float16: the input has the graph's type, and no Cast of a matrix is left."""
    bundle = staged_bundle(tiny_bundle, precision=precision)
    baked = prepare(bundle, Choices(18, plugins=False))
    shared = prepare(bundle, Choices(18, weights="shared", plugins=False))
    for constant, asked in zip(baked, shared, strict=True):
        if constant.name not in ("prefill_1", "head", "vision"):
            continue
        feeds = random_inputs(constant, last=20)
        weights = weights_of(asked, bundle.weights, stored_names(bundle))
        assert all(value.dtype == np.float16 for value in weights.values())
        wanted = session(constant, bundle.root / "graphs").run(None, feeds)
        assert_equal(session(asked, bundle.root / "graphs").run(None, feeds | weights), wanted, asked.name)
        casts = [node for node in asked.model.graph if node.op_type == "Cast"]
        assert all(node.inputs[0].shape.numpy()[1:] != (64,) or not node.inputs[0].is_initializer() for node in casts)
    stored = {s.dtype for g in shared if g.name == "decode" for w in g.weight_inputs for s in w.sources}
    assert stored == {"float32"}


@pytest.mark.parametrize("decoder", ["llama-bias-tied", "qwen2-gqa", "mistral-gqa"])
@pytest.mark.parametrize("opset", [23, 18])
def test_biases_grouped_keys_and_tied_embeddings(decoder: str, opset: int, tmp_path_factory: Any) -> None:
    """Packed products with biases, against the graphs as built; the tied table is one input of head and decode."""
    from engines.tensorrt.prepare.prepared_graphs import share_weights

    sample = models.sample_model(decoder, tmp_path_factory.getbasetemp() / "prepare-models")
    folder = tmp_path_factory.mktemp("graphs")

    def built() -> list[Any]:
        return build_decoder_graphs(sample.spec, sample.checkpoint, sample.plan(), sample.profile(), opset=opset)

    models.write_graphs(built(), sample.checkpoint, folder)
    names = {name: ref.stored_name for name, ref in sample.checkpoint.tensors.items()}
    for constant, changed in zip(built(), built(), strict=True):
        weights = tuple(share_weights(changed.model, pack=True))
        plain = PreparedGraph(constant.name, "p", constant.model, constant.layers)
        asked = PreparedGraph(changed.name, "p", changed.model, changed.layers, weights)
        feeds = random_inputs(plain, last=10)
        wanted = session(plain, folder).run(None, feeds)
        got = session(asked, folder).run(None, feeds | weights_of(asked, folder / "weights", names))
        assert_equal(got, wanted, f"{decoder} {constant.name}")
        onnx.shape_inference.infer_shapes(ir.serde.serialize_model(asked.model), check_type=True, strict_mode=True)
        if decoder == "llama-bias-tied" and constant.name in ("head", "decode"):
            assert "language_model.embed_tokens.weight" in {weight.name for weight in weights}


@pytest.mark.parametrize("assemble", ["segments", "whole"])
def test_plugins_leave_no_body_behind(tiny_bundle: Any, assemble: Any) -> None:
    bundle = staged_bundle(tiny_bundle)
    graphs = prepare(bundle, Choices(18, assemble, plugins=True))
    assert not any(graph.model.functions for graph in graphs)
    operators = [operator for graph in graphs for operator in graph.custom_nodes.values()]
    assert sorted(operators) == ["BtpGatherTokens"] * 9 + ["BtpSelectTokens"] * 3
    for graph in graphs:
        for node in (node for node in graph.model.graph if node.domain == BTP_DOMAIN):
            assert node.attributes["plugin_version"].as_string() == "1"
            assert node.attributes["plugin_namespace"].as_string() == ""


def test_plugins_find_every_attribute_written(tiny_bundle: Any) -> None:
    """TensorRT's parser warns of each that is not; the bundle's own graphs, and bodies, leave defaults out."""
    options = ("diversity_rule", "weighted")
    for stages, expected in (
        (STAGES, [("farthest", 0)] * 3),
        (RULES, [("farthest", 0), ("coverage", 0), ("coverage", 1)]),
    ):
        bundle = staged_bundle(tiny_bundle, *stages)
        written = selections(prepare(bundle, Choices(18, plugins=True)))
        assert [tuple(node.attributes[name].value for name in options) for node in written] == expected
        for node in written:
            assert set(node.attributes) == set(select_tokens.SCHEMA.attributes)
    plain = selections(prepare(staged_bundle(tiny_bundle), Choices(18, plugins=False)))
    assert len(plain) == 3 and not any(name in node.attributes for node in plain for name in options)


def selections(graphs: list[PreparedGraph]) -> list[ir.Node]:
    return [node for graph in graphs for node in graph.model.graph if node.op_type.startswith("BtpSelectTokens")]


@pytest.mark.parametrize("opset", [23, 18])
def test_a_whole_graph_has_a_body_for_each_form_of_stage(tiny_bundle: Any, opset: int) -> None:
    """No OptionalHasElement, which TensorRT does not import; the same results as the bundle's generic body."""
    bundle = staged_bundle(tiny_bundle, opset=opset, assemble="whole")
    prepared = prepare(bundle, Choices(opset, "whole", plugins=False))[0]
    proto = onnx.load_from_string(prepared.serialize())
    operators = {node.op_type for body in proto.functions for node in body.node}
    assert not operators & {"OptionalHasElement", "If"} and "Loop" in operators
    assert {body.name for body in proto.functions} == {
        "BtpGatherTokens", "BtpSelectTokens", "BtpSelectTokensSimilarity", "BtpSelectTokensSimilaritySeeds",
    }  # fmt: skip
    assert not prepared.custom_nodes
    feeds = random_inputs(prepared, last=45)
    wanted = onnxruntime.InferenceSession(str(bundle.graph_path("prefill"))).run(None, feeds)
    assert_equal(session(prepared, bundle.root / "graphs", prepack=True).run(None, feeds), wanted, "whole")


def test_a_whole_graph_has_a_body_for_each_rule() -> None:
    """Nodes of one graph with the same inputs and different rules; each gets the body of its own."""
    cases = [c for c in select_tokens.cases() if c.name in ("batch", "coverage-batch", "coverage-weighted-batch")]
    inputs = cases[0].inputs
    b = GraphBuilder("prefill", opset=18)
    values = [b.input(name, array.shape, ir.DataType.from_numpy(array.dtype)) for name, array in inputs.items()]
    for case in cases:
        shape = (len(case.scores), case.attributes["keep"])
        b.output(
            b.op("BtpSelectTokens", values, case.name, shape=shape, dtype=ir.DataType.INT32, domain=BTP_DOMAIN,
                 **case.attributes),
            f"indices_{case.name}",
        )  # fmt: skip
    embed_bodies(b)
    model = b.build().model
    generic = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString()).run(None, inputs)
    exact_bodies(model, 18)
    names = {name for _, name, _ in model.functions}
    assert names == {f"BtpSelectTokensSimilaritySeeds{rule}" for rule in ("", "Coverage", "CoverageWeighted")}
    exact = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString()).run(None, inputs)
    assert_equal(exact, generic, "rules")
    for case, got in zip(cases, exact, strict=True):
        wanted = select_tokens.reference(*map(torch.from_numpy, inputs.values()), **case.attributes)
        assert np.array_equal(got, wanted), case.name


def test_a_fused_bundle_is_brought_to_an_old_version(tiny_bundle: Any) -> None:
    """Primitives in place of fused operators: within rounding of the bundle's own graphs."""
    bundle = staged_bundle(tiny_bundle)

    def opset_for(flavour: Any, version: str, assemble: Any = "segments", plugins: bool = True) -> int:
        return suited_opset(bundle, traits(flavour, version), assemble=assemble, plugins=plugins)

    opset = opset_for("tensorrt", "10.3")
    assert opset == 18 and opset_for("tensorrt", "10.16") == opset_for("rtx", "1.7.1") == 23
    assert opset_for("rtx", "1.7.1", "whole", plugins=False) == 18
    old = prepare(bundle, Choices(opset, plugins=False))
    own = prepare(bundle, Choices(23, plugins=False))
    for graph, fused in zip(old, own, strict=True):
        assert graph.model.graph.opset_imports[""] == 18
        assert not {node.op_type for node in graph.model.graph} & {"Attention", "RMSNormalization", "RotaryEmbedding"}
        if graph.name in ("vision", "prefill_0", "decode"):
            feeds = random_inputs(graph, last=20)
            wanted = session(fused, bundle.root / "graphs").run(None, feeds)
            for got, value in zip(session(graph, bundle.root / "graphs").run(None, feeds), wanted, strict=True):
                np.testing.assert_allclose(got, value, rtol=2e-4, atol=2e-4)


def test_several_profiles(tiny_bundle: Any) -> None:
    bundle = tiny_bundle(profiles=("text=16,new=12", "batch=2,text=20,new=4"))
    graphs = prepare(bundle, Choices(18, weights="shared"))
    assert [(g.profile, g.name) for g in graphs] == [(r.profile, r.name) for r in bundle.manifest.graphs]
    second = bundle.manifest.profiles[1].name
    assert [g.name for g in prepare(bundle, Choices(18), profiles=[second])] == [r.name for r in bundle.graphs(second)]
    by_name: dict[str, Any] = {}
    for weight in (weight for graph in graphs for weight in graph.weight_inputs):
        assert by_name.setdefault(weight.name, weight) == weight


def test_nothing_of_the_bundle_is_touched(tiny_bundle: Any) -> None:
    bundle = staged_bundle(tiny_bundle)
    before = {path: path.read_bytes() for path in bundle.root.rglob("*") if path.is_file()}
    prepare(replace(bundle), Choices(18, "whole", "shared", plugins=False))
    assert before == {path: path.read_bytes() for path in bundle.root.rglob("*") if path.is_file()}
