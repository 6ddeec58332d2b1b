"""What is found in an engine's layers: in texts of each form that TensorRT gives, and in engines that RTX builds."""

import re
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from engines.tensorrt.build.layer_checks import (
    LayerDetail,
    Tensor,
    described_layers,
    findings,
    logged_layers,
    moves_only,
)
from engines.tensorrt.build.worker import build_in_child
from engines.tensorrt.prepare.expected import expected as of_graph
from engines.tensorrt.prepare.prepared_graphs import Choices, prepare
from engines.tensorrt.records import Expected
from graphs.files.bundle import Bundle
from tests.engines.tensorrt import building

MIB = 2**20
# As TensorRT for RTX 1.7.1 logs them; strides are left out.
LOG = """Layers:
Name: __myl_FcSilu_myl0_0, LayerType: runtime_fusion, Inputs: [ { Name: x, Dimensions: [1,2048], Datatype: Half, \
Format: (Linear) Row major linear format }, { Name: w, Dimensions: [2048,2048], Datatype: Half, Format: (Linear) Row \
major linear format }], Constants: [], Outputs: [ { Name: y, Dimensions: [1,2048], Datatype: Half, Format: (Linear) \
Row major linear format }], TacticName: , StreamId: 0, Metadata: [ONNX Layer: mm][ONNX Layer: mm/float16]\
[ONNX Layer: mm/float32.0]
Name: __myl_Tran_myl0_6, LayerType: kgen, Inputs: [ { Name: past, Dimensions: [1,32,700,128], Datatype: Half, \
Format: (Linear) Row major linear format }], Constants: [], Outputs: [ { Name: t, Dimensions: [1,32,128,700], \
Datatype: Half, Format: (Linear) Row major linear format }], TacticName: a, StreamId: 0, Metadata: [ONNX Layer: turned]

I/O Tensors:
 Name: x, IOMode: Input, DataType: Half, Dimensions: [1,2048], Location: Device
"""
# As the engine inspector of TensorRT 10.3 writes its detailed JSON.
JSON = {
    "Layers": [
        {
            "Name": "Reformatting CopyNode for Input Tensor 1 to gate", "LayerType": "Reformat",
            "Inputs": [{"Name": "w", "Dimensions": [22016, 4096], "Format/Datatype": "Row major linear FP16 format"}],
            "Outputs": [{"Name": "w'", "Dimensions": [22016, 4096], "Format/Datatype": "Two wide FP16 vector"}],
            "Metadata": "",
        },
        {
            "Name": "gate", "LayerType": "gemm", "Metadata": "[ONNX Layer: gate]", "TacticName": "0x1",
            "Inputs": [{"Name": "w'", "Dimensions": [22016, 4096], "Format/Datatype": "Two wide FP16 vector"}],
            "Outputs": [{"Name": "y", "Dimensions": [1, 22016], "Datatype": "Half"}],
        },
        "names alone",
    ],
    "Bindings": ["w"],
}  # fmt: skip


def expected(**changes: Any) -> Expected:
    return Expected(**{"scratch": MIB, **changes})


def test_the_log_is_read() -> None:
    product, turned = logged_layers(LOG)
    assert (product.name, product.kind) == ("__myl_FcSilu_myl0_0", "runtime_fusion")
    assert product.inputs == (Tensor("x", 4096), Tensor("w", 2 * 2048 * 2048)) and product.outputs[0].name == "y"
    assert product.nodes == ("mm", "mm/float16", "mm/float32.0")
    assert turned.moved == 2 * 32 * 700 * 128 and moves_only(turned) and not moves_only(product)


def test_the_inspectors_json_is_read() -> None:
    copied, gate, bare = described_layers(JSON)
    assert copied.inputs == (Tensor("w", 2 * 22016 * 4096),) and moves_only(copied)
    assert gate.nodes == ("gate",) and gate.outputs == (Tensor("y", 44032),)
    assert bare == LayerDetail("names alone", "unknown")
    assert described_layers({"Layers": [{"Name": "a", "LayerType": "PluginV3", "Inputs": []}]})[0].kind == "PluginV3"


def test_what_is_as_expected_is_not_named() -> None:
    product = logged_layers(LOG)[:1]
    wanted = expected(weights={"w": ("mm",)}, widened=("mm",), attentions=("elsewhere",))
    assert findings(product, wanted, MIB) == ()
    assert findings([LayerDetail("a", "unknown")], wanted, None) == ()  # no details: nothing is claimed


def test_a_large_transposition_is_named() -> None:
    (found,) = findings(logged_layers(LOG), expected(), None)
    assert found.startswith("1 layers only move or convert data, 5.5 MiB a run: __myl_Tran_myl0_6 (5.5 MiB)")


def test_a_reformatted_weight_is_named() -> None:
    weights, moved = findings(described_layers(JSON), expected(weights={"w": ("gate",)}), None)
    assert weights.startswith("1 weight inputs do not go straight into their product: w (172.0 MiB) in Reformatting")
    assert "172.0 MiB a run" in moved


def test_a_weight_that_another_layer_reads_is_named() -> None:
    layer = LayerDetail("__myl_MulSum_myl0_1", "kgen", (Tensor("w", MIB),), (), ("other",))
    (found,) = findings([layer], expected(weights={"w": ("gate",)}), None)
    assert "w (1.0 MiB) in __myl_MulSum_myl0_1" in found


def test_casts_outside_of_the_product_are_named() -> None:
    cast = LayerDetail("__myl_Cast_myl0_0", "kgen", (Tensor("w", 10),), (Tensor("wide", 20),), ("mm/float32.1",))
    product = LayerDetail("mm", "gemm", (Tensor("wide", 20),), (), ("mm",))
    (found,) = findings([cast, product], expected(widened=("mm",)), None)
    assert "1 products are kernels of their own: mm; --accumulate native" in found


def test_attention_and_scratch_are_named() -> None:
    fused = LayerDetail("_gemm_mha_v2_myl0_4", "kgen", nodes=("layer_0.attention",))
    apart = LayerDetail("__myl_MaxSubExp_myl0_5", "kgen", nodes=("layer_1.attention",))
    wanted = expected(attentions=("layer_0.attention", "layer_1.attention"))
    attention, scratch = findings([fused, apart], wanted, 200 * MIB)
    assert attention == "1 of 2 attentions are no fused kernel: layer_1.attention"
    assert scratch == "it computes in 200.0 MiB, 1.0 MiB were estimated"
    assert findings([fused], wanted, 60 * MIB) == ()


def test_terms_of_a_sum_in_memory_are_found() -> None:
    """The node of the sum may be named by the layer behind it too, which reads what it gives."""
    sums = expected(sums=("a", "b"))
    behind = LayerDetail("softmax", "kgen", nodes=("a/sum", "b/sum", "softmax"))
    one_kernel = [LayerDetail(f"sum_{name}", "kgen", nodes=(f"{name}/sum.terms", f"{name}/sum")) for name in "ab"]
    assert findings([*one_kernel, behind], sums, None) == ()
    apart = [one_kernel[0], LayerDetail("terms", "kgen", nodes=("b/sum.terms",)), LayerDetail("total", "kgen"), behind]
    assert findings(apart, sums, None) == ("1 sums over caches have what they add up in memory: b",)
    assert findings([LayerDetail("unknown", "kgen")], sums, None) == ()


# -- engines of TensorRT for RTX -------------------------------------------------------------------------------------


def build(path: Path, **changes: Any) -> Any:
    job = building.job(path, precision="float16", **changes)
    return build_in_child(job, path.parent, path.parent / "log", lambda share: None)


@pytest.mark.parametrize("weights", ["baked", "shared"])
def test_products_that_add_up_in_float32_are_one_kernel(weights: Any, tiny_bundle: Any, tmp_path: Path) -> None:
    """The casts of a decoder segment cost no layer: there are as many as without, and nothing is found."""
    building.need_rtx()
    bundle: Bundle = tiny_bundle(precision="float16")
    layers = []
    for accumulate in ("native", "float32"):
        choices = Choices(23, weights=weights, plugins=False, accumulate=accumulate)  # type: ignore[arg-type]
        graph = next(graph for graph in prepare(bundle, choices) if graph.name == "prefill_0")
        wanted = of_graph(graph, MIB)
        assert len(wanted.widened) == (0 if accumulate == "native" else 4 * 6 if weights == "shared" else 7 * 6)
        assert len(wanted.attentions) == 6 and all(wanted.weights.values())
        path = bundle.root / "graphs" / f".{weights}.{accumulate}.onnx"
        path.write_bytes(graph.serialize())
        inputs = (*graph.inputs, *(building.plain(weight) for weight in graph.weight_inputs))
        try:
            built = build(path, engine=tmp_path / "engine", inputs=inputs, outputs=graph.outputs, expected=wanted)
        finally:
            path.unlink()
            (path.parent / "log").unlink(missing_ok=True)
        assert built.findings == ()
        layers.append(sorted(layer.type for layer in built.layers))
    assert layers[0] == layers[1]


def test_a_large_copy_is_found_in_an_engine(tmp_path: Path) -> None:
    """A cache that is turned: TensorRT for RTX makes a kernel of it that only moves data."""
    building.need_rtx()
    given, wanted = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape)
        for name, shape in (("x", [32, 700, 128]), ("y", [32, 128, 700]))
    )
    node = helper.make_node("Transpose", ["x"], ["y"], "turn", perm=[0, 2, 1])
    graph = helper.make_graph([node], "copy", [given], [wanted])
    path = tmp_path / "copy.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    (found,) = build(path, expected=expected()).findings
    assert re.fullmatch(r"1 layers only move or convert data, 5\.5 MiB a run: \S+ \(5\.5 MiB\)", found)
