"""Casts that ask for sums in float32: around every projection of a float16 graph and nothing else; the same results."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from engines.targets import find_target
from engines.tensorrt.prepare.accumulate import is_narrowing, is_widening
from engines.tensorrt.prepare.build_plan import Wishes, plan_build
from engines.tensorrt.prepare.prepared_graphs import Choices, PreparedGraph, prepare
from engines.tensorrt.records import BEHIND
from graphs.files.bundle import Bundle


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Any) -> Bundle:
    made: Bundle = tiny_bundle(precision="float16")
    return made


def graphs(bundle: Bundle, **choices: Any) -> dict[str, PreparedGraph]:
    settings: dict[str, Any] = {"opset": 23, "plugins": False, "accumulate": "float32"}
    return {graph.name: graph for graph in prepare(bundle, Choices(**settings | choices))}


@contextlib.contextmanager
def written(bundle: Bundle, graph: PreparedGraph) -> Iterator[Path]:
    """The graph as a file, where its weights are."""
    path = bundle.root / "graphs" / f".{graph.name}.accumulate.onnx"
    path.write_bytes(graph.serialize())
    try:
        yield path
    finally:
        path.unlink()


@pytest.mark.parametrize(("weights", "opset"), [("baked", 23), ("shared", 23), ("shared", 18)])
def test_projections_are_widened_and_nothing_else(weights: Any, opset: int, bundle: Bundle) -> None:
    plain = graphs(bundle, weights=weights, opset=opset, accumulate="native")
    for name, graph in graphs(bundle, weights=weights, opset=opset).items():
        nodes = list(graph.model.graph)
        kept = [node.op_type for node in nodes if not is_widening(node) and not is_narrowing(node)]
        assert kept == [node.op_type for node in plain[name].model.graph], name
        assert (graph.inputs, graph.outputs) == (plain[name].inputs, plain[name].outputs)
        widened = [node for node in nodes if any(is_narrowing(user) for user in node.outputs[0].consumers())]
        assert len(widened) == sum(is_narrowing(node) for node in nodes)
        each = 7 if weights == "baked" else 4  # q, k and v, and gate and up, are one product where they are packed
        wanted = {"prefill_0": 6 * each, "decode": 6 * each + 1, "head": 1}
        assert len(widened) == wanted.get(name, len(widened)), "the projections of six layers, and the vocabulary's"
        for node in widened:
            assert all(value is None or value.dtype == ir.DataType.FLOAT for value in node.inputs)
            assert not any(word in str(node.name) for word in ("scores", "context")), "a product inside attention"
            assert node.outputs[0].consumers()[0].name == f"{node.name}{BEHIND}"
        estimates = [plan.estimates for plan in (planned(bundle, "float32"), planned(bundle, "native"))]
        assert estimates[0] == estimates[1], "casts in a kernel take no memory"


def planned(bundle: Bundle, accumulate: Any) -> Any:
    return plan_build(bundle, find_target("jetson-orin-jp7"), Wishes(accumulate=accumulate))


def test_the_results_stay_the_same(bundle: Bundle) -> None:
    """In ONNX Runtime, which adds float16 up in float32 by itself: a segment with and without casts."""
    found = []
    for accumulate in ("native", "float32"):
        graph = graphs(bundle, weights="shared", accumulate=accumulate)["prefill_0"]
        with written(bundle, graph) as path:
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        rng = np.random.default_rng(0)
        given = {
            value.name: (0.1 * rng.standard_normal(value.shape)).astype(np.float16)
            if "float16" in value.type
            else np.full(value.shape, 50, np.int32)
            for value in session.get_inputs()
        }
        found.append(session.run(None, given))
    for native, widened in zip(*found, strict=True):
        assert native.dtype == widened.dtype == np.float16 and np.isfinite(native).all()
        np.testing.assert_allclose(widened.astype(np.float32), native.astype(np.float32), rtol=0, atol=4e-3)


@pytest.mark.parametrize(
    ("precision", "wish", "wanted"),
    [
        ("float16", "auto", "float32"),
        ("float16", "float32", "float32"),
        ("float16", "native", "native"),
        ("float32", "auto", "native"),
    ],
)
def test_float16_bundles_add_up_in_float32(precision: str, wish: Any, wanted: str, tiny_bundle: Any) -> None:
    plan = planned(tiny_bundle(precision=precision), wish)
    assert plan.choices.accumulate == plan.summary().accumulate == wanted
    assert any("add up in float32" in note for note in plan.notes) == (wanted == "float32")
