"""Products over the caches written as sums: the same numbers, each cache read once, and so in real engines too."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from engines.tensorrt.build.layer_checks import LayerDetail, moves_only
from engines.tensorrt.build.worker import build_in_child
from engines.tensorrt.prepare.attention import is_sum, is_term
from engines.tensorrt.prepare.estimate import estimate
from engines.tensorrt.prepare.expected import expected
from engines.tensorrt.prepare.prepared_graphs import Choices, PreparedGraph, prepare
from graphs import names
from graphs.files.bundle import Bundle
from tests.conftest import BundleMaker
from tests.engines.tensorrt import building


def decode_graph(bundle: Bundle, opset: int, *, own: bool = False) -> PreparedGraph:
    """The decode graph as prepared; `own`: with the products that the bundle's has."""
    choices = Choices(opset, plugins=False, keep_packed=own)
    return next(graph for graph in prepare(bundle, choices) if graph.name == names.DECODE)


def outputs_of(graph: PreparedGraph, bundle: Bundle, given: dict[str, Any]) -> dict[str, Any]:
    path = bundle.root / "graphs" / f".{graph.name}.attention.onnx"
    path.write_bytes(graph.serialize())
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    finally:
        path.unlink()
    return dict(zip([value.name for value in graph.outputs], session.run(None, given), strict=True))


@pytest.mark.parametrize(
    ("options", "opset"), [({}, 23), ({"batch": 2}, 18), ({"precision": "float16"}, 18), ({"precision": "float16"}, 23)]
)
def test_the_numbers_are_those_of_the_products(options: dict[str, Any], opset: int, tiny_bundle: BundleMaker) -> None:
    """Two query heads share a key head, and each sample has a length of its own."""
    bundle = tiny_bundle(**options)
    summed, own = decode_graph(bundle, opset), decode_graph(bundle, opset, own=True)
    assert (summed.inputs, summed.outputs) == (own.inputs, own.outputs)
    rng = np.random.default_rng(0)
    given = {
        tensor.name: np.arange(5, 5 + tensor.shape[0], dtype=np.int32)
        if tensor.dtype == "int32"
        else rng.standard_normal(tensor.shape).astype(tensor.dtype)
        for tensor in summed.inputs
    }
    got, wanted = outputs_of(summed, bundle, given), outputs_of(own, bundle, given)
    tolerance = 2e-2 if options.get("precision") == "float16" else 1e-5
    for name, values in wanted.items():
        scale = float(np.abs(values).max())
        np.testing.assert_allclose(got[name], values, rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize("opset", [18, 23])
def test_nothing_but_sums_reads_a_cache(opset: int, tiny_bundle: BundleMaker) -> None:
    bundle = tiny_bundle(precision="float16")
    graph = decode_graph(bundle, opset)
    caches = [value for value in graph.model.graph.inputs if names.parse_tensor(str(value.name)).is_cache]
    assert len(caches) == 2 * 6
    for cache in caches:
        [reader] = cache.consumers()
        while is_term(reader):
            [reader] = reader.outputs[0].consumers()
        assert is_sum(reader)
    layers = [node for node in graph.model.graph if is_sum(node)]
    assert len(layers) == 3 * 6, "past scores, the new score and the context of each layer"
    left = [node.name for node in graph.model.graph if node.op_type == "MatMul" and "attention" in str(node.name)]
    assert not [name for name in left if "scores" in str(name) or "context" in str(name)]
    own = decode_graph(bundle, opset, own=True)
    assert estimate(graph).activation_bytes <= 1.1 * estimate(own).activation_bytes, "terms are never in memory"


def test_other_graphs_have_no_sums(tiny_bundle: BundleMaker) -> None:
    graphs = prepare(tiny_bundle(precision="float16"), Choices(18, plugins=False))
    assert [graph.name for graph in graphs if any(is_sum(node) for node in graph.model.graph)] == [names.DECODE]


def test_a_real_engine_reads_each_cache_where_it_lies(tiny_bundle: BundleMaker, tmp_path: Path) -> None:
    """TensorRT for RTX: fewer layers than with products, none that turns a cache, no term in memory."""
    building.need_rtx()
    bundle = tiny_bundle(precision="float16")
    counts = []
    for own in (True, False):
        graph = decode_graph(bundle, 23, own=own)
        wanted = expected(graph, 2**20)
        assert len(wanted.sums) == (0 if own else 18)
        path = bundle.root / "graphs" / f".attention.{own}.onnx"
        path.write_bytes(graph.serialize())
        changes: dict[str, Any] = {"engine": tmp_path / "engine", "precision": "float16", "expected": wanted}
        job = building.job(path, inputs=graph.inputs, outputs=graph.outputs, **changes)
        try:
            built = build_in_child(job, tmp_path, tmp_path / "log", lambda share: None)
        finally:
            path.unlink()
        assert built.findings == ()
        moving = [layer.name for layer in built.layers if moves_only(LayerDetail(layer.name, layer.type))]
        counts.append((len(built.layers), sum("Tran" in name for name in moving)))
    (products, turned), (sums, still) = counts
    assert turned >= 6 and still == 0, counts
    assert sums < products - 6, counts
