"""Engines with four-bit weights: constants that TensorRT dequantises itself, and inputs; prepared, run, and built."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from btp_export.exporting import Options, export_bundle
from btp_export.model.open_model import open_model
from engines.runners.onnxruntime import OrtLoader
from engines.targets import find_target
from engines.tensorrt.build.build import build
from engines.tensorrt.build.machine import machine_for
from engines.tensorrt.prepare.build_plan import FOUR_BIT_FAULTS, Wishes, plan_build
from engines.tensorrt.prepare.four_bits import bake_packed
from engines.tensorrt.prepare.prepared_graphs import Choices, prepare
from engines.tensorrt.run.weights import packed as uploaded
from graphs.building.decoder_graphs import build_decoder_graphs
from graphs.files.bundle import Bundle
from graphs.files.packed_weights import packed_linear
from graphs.records.errors import InputError
from graphs.records.plan import Stage
from tests.engines.tensorrt import building
from tests.engines.tensorrt.build.conftest import LAYERS
from tests.engines.tensorrt.plans import prepared
from tests.packed import pack_folder
from tests.plans import plan_of

# Every part of the rules; scores alone, and it chooses among what the first one kept; drops all.
STAGES = (
    Stage(layer=1, keep=18, attention_quota=6, pool=18, boundary=18, diversity_quota=4, seeds=9),
    Stage(layer=2, keep=7, attention_quota=7, pool=9, boundary=7),
    Stage(layer=3, keep=0),
)


@pytest.fixture(scope="module")
def bundle(short_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Symmetric codes in groups of 32, computed in float16."""
    folder = tmp_path_factory.mktemp("packed")
    pack_folder(short_checkpoint, folder / "model", group=32, zeros=False)
    model = open_model(str(folder / "model"))
    options = Options(text_tokens=16, new_tokens=12, precision="float16")
    return export_bundle(model, plan_of(model.spec, *STAGES), folder / "bundle", options)


def run(path: Path, seed: int = 0) -> dict[str, np.ndarray]:
    runner = OrtLoader(threads=1)(path)
    rng = np.random.default_rng(seed)
    inputs = {
        name: np.full(spec.shape, 3, spec.dtype) if spec.dtype == np.int32
        else rng.standard_normal(spec.shape).astype(spec.dtype)
        for name, spec in runner.inputs.items()
    }  # fmt: skip
    return runner.run(inputs)


def test_signed_constants_compute_what_the_codes_do(bundle: Bundle) -> None:
    plan = plan_build(bundle, find_target("rtx-ada"), Wishes(plugins="none"))
    assert plan.choices.weights == "baked", "the default without plugins"
    assert not plan.findings
    folder = prepared(plan)
    for name in ("prefill_1", "decode"):
        model = ir.load(folder / "graphs" / f"{name}.onnx")
        kinds = [node.op_type for node in model.graph]
        assert kinds.count("DequantizeLinear") == 7 * (1 if name == "prefill_1" else LAYERS)
        assert not [node for node in model.graph if node.domain == "btp"]
        got, wanted = run(folder / "graphs" / f"{name}.onnx"), run(bundle.graph_path(name))
        for output, values in wanted.items():
            scale = np.abs(values.astype(np.float32)).max()
            np.testing.assert_allclose(got[output].astype(np.float32), values.astype(np.float32), atol=6e-3 * scale)


def test_shared_words_are_the_stored_bytes(bundle: Bundle) -> None:
    (decode,) = (graph for graph in prepare(bundle, Choices(18, weights="shared")) if graph.name == "decode")
    nodes = {node.name: node for node in decode.model.graph if node.op_type == "BtpLinear"}
    assert len(nodes) == 7 * LAYERS
    weights = {weight.name: weight for weight in decode.weight_inputs}
    linear = packed_linear(bundle.checkpoint(), "language_model.layers.2.mlp.down_proj")
    assert linear is not None
    codes, scales = weights[linear.qweight.name], weights[linear.scales.name]
    assert (codes.dtype, codes.shape, codes.packing) == ("int32", (64, 96 // 8), "words")
    assert (scales.dtype, scales.shape) == ("float16", (64, 3)), "in the type that the graph computes in"
    assert uploaded(bundle.root, codes).astype("<i4").tobytes() == linear.qweight.read().tobytes()
    np.testing.assert_array_equal(uploaded(bundle.root, scales), linear.scales.read().astype(np.float16))
    inputs = {str(value.name) for value in decode.model.graph.inputs}
    assert {str(v.name) for node in nodes.values() for v in node.inputs[1:3] if v is not None} <= inputs


def test_estimates_count_packed_bytes(bundle: Bundle) -> None:
    """A projection takes half a byte a weight and a scale for each group, in the engine or beside it."""
    linears = [packed_linear(bundle.checkpoint(), name.removesuffix(".qweight"))
               for name in bundle.checkpoint().tensors if name.endswith(".qweight")]  # fmt: skip
    stored = sum(one.n * one.k // 2 + 2 * one.n * one.k // one.group for one in linears if one is not None)
    target = find_target("jetson-orin-jp7")
    baked, shared = (plan_build(bundle, target, Wishes(engine_weights=weights)) for weights in ("baked", "shared"))
    (of_decode,) = (e for graph, e in zip(baked.graphs, baked.estimates, strict=True) if graph.name == "decode")
    head = 2 * bundle.spec.decoder.vocab_size * 64
    assert stored + head <= of_decode.weight_bytes < 1.05 * (stored + head) + 5000
    assert stored <= shared.totals.weight_bytes < 1.05 * stored + 2 * head
    assert of_decode.activation_bytes < 500_000, "constants are not unpacked"
    assert [finding.do for finding in baked.findings] == ["--engine-weights shared"]
    assert FOUR_BIT_FAULTS[("tensorrt", (10, 16), "8.7")] in baked.findings[0].got
    assert not shared.findings


def test_what_tensorrt_does_not_take_is_refused(short_checkpoint: Path, tmp_path: Path, bundle: Bundle) -> None:
    with pytest.raises(InputError, match="opset 18"):
        prepare(bundle, Choices(18))
    pack_folder(short_checkpoint, tmp_path / "model", zeros=True)
    model = open_model(str(tmp_path / "model"))
    profile = model.family.profile(model.spec, batch=1, text_tokens=8, new_tokens=4, image_size=None)
    (decode,) = build_decoder_graphs(model.spec, model.checkpoint, plan_of(model.spec, *STAGES), profile)[-1:]
    with pytest.raises(InputError, match="zero points") as refused:
        bake_packed(decode.model, 23)
    assert refused.value.do == "--engine-weights shared"


@pytest.mark.parametrize(("weights", "plugins"), [("baked", "none"), ("shared", "none"), ("shared", "python")])
def test_engines_are_built(weights: Any, plugins: Any, bundle: Bundle) -> None:
    building.need_rtx()
    target, wishes = find_target("rtx-ada"), Wishes(engine_weights=weights, plugins=plugins)
    builder = machine_for(target, wishes)
    assert builder.library is not None
    plan = plan_build(bundle, target, replace(builder.wishes, engine_weights=weights))
    result = build(plan, builder.library, wish="none", force=True)
    sizes = {graph.name: graph.engine.size for graph in result.record.graphs if graph.engine is not None}
    assert len(sizes) == len(plan.graphs)
    decode = result.record.graph("decode", bundle.profile().name)
    packs = [weight for weight in decode.weight_inputs if weight.name.endswith(".qweight")]
    assert len(packs) == (7 * LAYERS if weights == "shared" else 0)
    wanted = ("int32", 2) if plugins == "python" else ("uint8", 3)
    assert all((weight.dtype, len(weight.shape)) == wanted for weight in packs)
