"""The lint passes what every version takes, and finds each thing that one refuses."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.targets import find_target, known_targets
from engines.tensorrt.prepare.lint import lint, lint_model, require_clean
from engines.tensorrt.prepare.prepared_graphs import Choices, PreparedGraph, prepare
from engines.tensorrt.summaries import Finding
from engines.tensorrt.versions import Traits, traits
from graphs import ops
from graphs.files.bundle import Bundle
from graphs.records.errors import CheckError
from graphs.records.plan import Stage
from tests.engines.tensorrt.plans import RULES, STAGES, staged_bundle


@pytest.fixture(scope="module")
def prepared_findings(tiny_bundle: Any) -> Callable[..., list[Finding]]:
    """What the lint finds in the graphs prepared for a version; targets of one version and flavour share them."""

    @functools.cache
    def graphs(stages: tuple[Stage, ...], choices: Choices) -> tuple[Bundle, list[PreparedGraph]]:
        bundle = staged_bundle(tiny_bundle, *stages)
        return bundle, list(prepare(bundle, choices))

    @functools.cache
    def findings(stages: tuple[Stage, ...], known: Traits, assemble: Any, plugins: bool) -> list[Finding]:
        bundle, made = graphs(stages, Choices(known.opset, assemble, "shared", plugins=plugins))
        return lint(made, known, folder=bundle.root / "graphs", plugins=plugins)

    return findings


@pytest.mark.parametrize("name", known_targets())
@pytest.mark.parametrize("plugins", [True, False])
@pytest.mark.parametrize("stages", [STAGES, RULES], ids=["inputs", "rules"])
def test_prepared_graphs_suit_every_target(
    prepared_findings: Callable[..., list[Finding]], name: str, plugins: bool, stages: tuple[Stage, ...]
) -> None:
    target = find_target(name)
    known = traits(target.flavour, target.version())
    for assemble in ("segments", "whole"):
        assert prepared_findings(stages, known, assemble, plugins) == []


def small_model(
    node: onnx.NodeProto, shape: list[int | str], *, opset: int = 18, kind: int = TensorProto.FLOAT, **parts: Any
) -> onnx.ModelProto:
    value = helper.make_tensor_value_info("x", kind, shape)
    out = helper.make_tensor_value_info(node.output[0], parts.pop("out", kind), [1])
    graph = helper.make_graph([node], "small", [value], [out], initializer=parts.pop("initializer", []))
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("btp", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=parts.pop("functions", []))


def found(
    model: onnx.ModelProto, version: str = "10.3", *, folder: Path = Path(), plugins: bool = True
) -> list[Finding]:
    return lint_model(model, traits("tensorrt", version), name="small", folder=folder, plugins=plugins)


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def test_an_operator_that_is_not_built_in() -> None:
    finding = only(found(small_model(helper.make_node("Hardmax", ["x"], ["y"], "the_node"), [2, 3])))
    assert (finding.graph, finding.node, finding.got) == ("small", "the_node", "the operator Hardmax")
    attention = small_model(helper.make_node("Attention", ["x", "x", "x"], ["y"], "a"), [1, 2, 3, 4], opset=23)
    assert {f.got for f in found(attention, "10.3")} == {"the operator Attention", "opset 23"}
    assert found(attention, "10.16") == []


def test_a_type_that_the_table_does_not_have() -> None:
    finding = only(found(small_model(helper.make_node("Softmax", ["x"], ["y"], "s"), [2, 3], kind=TensorProto.DOUBLE)))
    assert finding.got == "Softmax of float64 (x)" and "float16" in finding.wanted
    logical = small_model(helper.make_node("Equal", ["x", "x"], ["y"], "e"), [2], kind=TensorProto.BOOL)
    assert only(found(logical)).got == "Equal of bool (x)"


def test_an_attribute_that_is_not_imported() -> None:
    node = helper.make_node("Attention", ["x", "x", "x"], ["y"], "a", softmax_precision=1)
    assert "softmax_precision" in only(found(small_model(node, [1, 2, 3, 4], opset=23), "10.16")).got


def test_sizes_that_tensorrt_limits() -> None:
    finding = only(found(small_model(helper.make_node("ArgMax", ["x"], ["y"], "a"), [5], out=TensorProto.INT64)))
    assert finding.got == "ArgMax of [5]" and finding.wanted == "at least 2 dimensions"
    for count, expected in ((3839, 0), (3840, 1)):
        k = numpy_helper.from_array(np.array([count], np.int64), "k")
        node = helper.make_node("TopK", ["x", "k"], ["y", "i"], "t")
        findings = found(small_model(node, [1, 5000], initializer=[k]))
        assert len(findings) == expected and all("K = 3840" in finding.got for finding in findings)


def test_shapes_must_be_static() -> None:
    finding = only(found(small_model(helper.make_node("Relu", ["x"], ["y"], "r"), ["n", 3])))
    assert finding.node == "x" and "dynamic" in finding.got


def test_names_that_trtexec_cannot_be_told() -> None:
    node = helper.make_node("Abs", ["x"], ["y:0"], "r")
    assert only(found(small_model(node, [1]))).node == "y:0"


def selecting(*, functions: Any = (), **attributes: Any) -> onnx.ModelProto:
    counts = {"keep": 2, "attention_quota": 2, "diversity_quota": 0, "pool": 2, "boundary": 0}
    node = helper.make_node(
        "BtpSelectTokens", ["x"], ["y"], "select", domain="btp", **counts,
        **{"plugin_version": "1", "plugin_namespace": ""} | attributes,
    )  # fmt: skip
    return small_model(node, [1, 4], out=TensorProto.INT32, functions=list(functions))


def test_custom_nodes_need_their_string_attributes() -> None:
    assert found(selecting()) == []
    assert "plugin_version = '1'" in only(found(selecting(plugin_version=1))).got
    assert "plugin_version = '1'" in only(found(selecting(plugin_version="2"))).got
    model = selecting()
    del model.graph.node[0].attribute[:]
    assert [f.node for f in found(model)] == ["select", "select"]


def test_a_plugin_takes_the_types_that_its_folder_names() -> None:
    model = selecting()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    finding = only(found(model))
    assert finding.got == "BtpSelectTokens of float16 (x)" and finding.wanted == "float32"


def test_a_body_beside_a_plugin() -> None:
    """Up to 10.6 the body would win in silence; later the node is marked for the plugin."""
    body = ops.select_tokens.body(18, similarity=False, seeds=False)
    assert "wins over the plugin" in only(found(selecting(functions=[body]), "10.3")).got
    assert found(selecting(functions=[body]), "10.16") == []
    assert only(found(selecting(), plugins=False)).got == "BtpSelectTokens without a body"
    assert found(selecting(functions=[body]), plugins=False) == []


@pytest.mark.parametrize("opset", [18, 23])
def test_the_inside_of_a_body_is_checked(opset: int) -> None:
    """The generic body asks for its inputs with OptionalHasElement, and compares the name of its rule with Unique.

    The rule is compared inside one branch of an If: there too the types are known.
    """
    generic = next(body for body in ops.functions(opset) if body.name == "BtpSelectTokens")
    model = selecting(functions=[generic], diversity_rule="coverage", weighted=1)
    model.opset_import[0].version = opset
    findings = found(model, "10.16", plugins=False)
    assert {f.got for f in findings if "string" not in f.got} == {
        "the operator OptionalHasElement",
        "the operator Unique",
    }
    assert all("btp-export build" in f.do for f in findings if "string" not in f.got)
    kinds = {f.got.partition(" (")[0] for f in findings if "string" in f.got}
    assert kinds == {f"{operator} of string" for operator in ("Reshape", "Concat", "Size")}


def test_only_whole_graphs_that_mix_rules_compare_strings(tiny_bundle: Any) -> None:
    """The bundle's own graph is told apart from what is prepared of it, which TensorRT imports."""
    known = traits("tensorrt", "10.16")
    mixed = staged_bundle(tiny_bundle, *RULES, assemble="whole")
    farthest = staged_bundle(tiny_bundle, assemble="whole")
    segments = staged_bundle(tiny_bundle, *RULES)
    for bundle, got in (
        (mixed, {"OptionalHasElement", "Unique"}),
        (farthest, {"OptionalHasElement"}),
        (segments, set()),
    ):
        findings = [
            finding
            for record in bundle.graphs()
            for finding in lint_model(
                onnx.load(bundle.root / record.file, load_external_data=False),
                known, name=record.name, folder=bundle.root / "graphs", plugins=False,
            )
        ]  # fmt: skip
        operators = {f.got.removeprefix("the operator ") for f in findings if f.got.startswith("the operator ")}
        assert operators == got
    for assemble in ("segments", "whole"):
        graphs = prepare(mixed, Choices(known.opset, assemble, plugins=False))
        assert lint(graphs, known, folder=mixed.root / "graphs", plugins=False) == []


def test_a_body_that_keeps_too_many_tokens_for_topk() -> None:
    body = ops.select_tokens.body(18, similarity=False, seeds=False)
    for keep, expected in ((3839, 0), (3840, 1)):
        node = helper.make_node(
            "BtpSelectTokens", ["x"], ["y"], "s", domain="btp", keep=keep, attention_quota=keep, diversity_quota=0,
            pool=keep, boundary=0,
        )  # fmt: skip
        model = small_model(node, [1, 5000], out=TensorProto.INT32, functions=[body])
        findings = found(model, plugins=False)
        assert len(findings) == expected and all("3840 tokens" in finding.got for finding in findings)


def test_a_body_named_like_a_built_in_operator() -> None:
    body = helper.make_function(
        "btp", "Relu", ["a"], ["b"], [helper.make_node("Identity", ["a"], ["b"])], [helper.make_opsetid("", 18)]
    )
    model = small_model(helper.make_node("Relu", ["x"], ["y"], "r", domain="btp"), [1], functions=[body])
    assert "named like a built-in" in only(found(model, plugins=False)).got


def test_an_unknown_domain() -> None:
    model = small_model(helper.make_node("Attention", ["x"], ["y"], "a", domain="com.microsoft"), [1])
    assert only(found(model)).got == "com.microsoft.Attention"


@pytest.mark.parametrize(
    ("location", "offset", "length", "message"),
    [
        ("weights/w.bin", 0, 16, ""),
        ("weights/w.bin", 8, 16, ""),
        ("weights/w.bin", 12, 16, "has 24 bytes, the tensor lies at 12"),
        ("weights/w.bin", 0, 12, "with 12"),
        ("weights/missing.bin", 0, 16, "is missing"),
        ("../w.bin", 0, 16, "external data in"),
        ("/tmp/w.bin", 0, 16, "external data in"),
        ("a/../../w.bin", 0, 16, "external data in"),
        ("", 0, 16, "external data in"),
    ],
)
def test_external_data(tmp_path: Path, location: str, offset: int, length: int, message: str) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "w.bin").write_bytes(bytes(24))
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    model = small_model(helper.make_node("Add", ["x", "w"], ["y"], "a"), [4], initializer=[tensor])
    findings = found(model, folder=tmp_path)
    assert [message in finding.got for finding in findings] == ([True] if message else [])


def test_weight_inputs_point_into_their_files(tiny_bundle: Any) -> None:
    bundle = staged_bundle(tiny_bundle)
    graph = next(g for g in prepare(bundle, Choices(18, weights="shared")) if g.name == "head")
    weight = graph.weight_inputs[0]
    beyond = weight.sources[0].model_copy(update={"offset": 10**9})
    moved = replace(graph, weight_inputs=(weight.model_copy(update={"sources": (beyond,)}),))
    finding = only(lint([moved], traits("tensorrt", "10.3"), folder=bundle.root / "graphs", plugins=True))
    assert finding.node == "lm_head.weight" and "model.safetensors has" in finding.got


def test_a_refusal_names_the_first_and_counts_the_rest() -> None:
    known = traits("tensorrt", "10.3")
    require_clean([], known)
    findings = found(small_model(helper.make_node("Attention", ["x", "x", "x"], ["y"], "a"), [1, 2, 3, 4], opset=23))
    with pytest.raises(CheckError, match=r"TensorRT 10\.3 will not take small: .* \(1 more findings"):
        require_clean(findings, known)


def test_findings_name_the_profile_where_there_are_several() -> None:
    model = small_model(helper.make_node("Hardmax", ["x"], ["y"], "h"), [2, 3])
    graphs = [PreparedGraph("head", name, ir.serde.deserialize_model(model), None) for name in ("a", "b")]
    findings = lint(graphs, traits("tensorrt", "10.3"), folder=Path(), plugins=True)
    assert [finding.graph for finding in findings] == ["head (a)", "head (b)"]
