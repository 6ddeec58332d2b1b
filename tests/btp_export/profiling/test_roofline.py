"""The roofline's arithmetic, and operations counted from graphs against graphs/pruning/operations.py and torch's own
counter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from btp_export.profiling.roofline import Roofline, product_flops
from engines.tensorrt.prepare.prepared_graphs import Choices, prepare
from graphs.files.bundle import Bundle
from graphs.pruning.operations import cost
from graphs.records.plan import Stage
from tests.plans import tiny_plan

STAGES = (
    Stage(layer=2, keep=18, attention_quota=6, pool=24, boundary=18, diversity_quota=6, seeds=9),
    Stage(layer=3, keep=6, attention_quota=6, pool=6, boundary=6),
    Stage(layer=5, keep=0),
)


def test_the_slower_of_both_limits() -> None:
    device = Roofline(peak=1e12, bandwidth=1e9)
    assert device.floor_ms(10**9, 10**3) == pytest.approx(1.0)
    assert device.floor_ms(10**9, 5 * 10**6) == pytest.approx(5.0)
    assert (device.bound(10**9, 10**3), device.bound(10**9, 5 * 10**6)) == ("compute", "memory")


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Any) -> Bundle:
    bundle: Bundle = tiny_bundle(tiny_plan(*STAGES))
    return bundle


@pytest.mark.parametrize(
    "choices",
    [Choices(opset=23), Choices(opset=18), Choices(opset=18, weights="shared"), Choices(opset=23, plugins=False)],
    ids=str,
)
def test_graphs_have_the_operations_of_the_formulas(bundle: Bundle, tmp_path: Path, choices: Choices) -> None:
    wanted = cost(bundle.spec.decoder, bundle.plan, bundle.profile())
    counted = {}
    for graph in prepare(bundle, choices):
        (tmp_path / f"{graph.name}.onnx").write_bytes(graph.serialize())
        counted[graph.name] = product_flops(tmp_path / f"{graph.name}.onnx")
    assert tuple(counted[f"prefill_{n}"] for n in range(4)) == wanted.segments
    assert tuple(counted[f"select_{n}"] for n in range(3)) == wanted.selection
    assert counted["head"] == wanted.head
    # The graph weighs the new token's own value element by element, which is no matrix product.
    own = 2 * bundle.spec.decoder.num_heads * bundle.spec.decoder.head_dim * 6
    assert counted["decode"] == wanted.decode - own


def test_vision_has_the_operations_of_its_layers(bundle: Bundle) -> None:
    """CLIP's patches, the layers up to the one that is read (the last but one), and the projector."""
    vision = bundle.checkpoint().config["vision_config"]
    width, inner, out = vision["hidden_size"], vision["intermediate_size"], bundle.spec.decoder.hidden_size
    patches, tokens = 36, 37  # and the class token
    layer = 4 * 2 * tokens * width * width + 4 * tokens * tokens * width + 2 * 2 * tokens * width * inner
    wanted = 2 * patches * width * 3 * vision["patch_size"] ** 2 + layer * (vision["num_hidden_layers"] - 1)
    wanted += 2 * patches * (width * out + out * out)
    assert product_flops(bundle.graph_path("vision")) == wanted


def test_attention_of_grouped_heads_in_three_dimensions(tmp_path: Path) -> None:
    """The form with the heads in one axis, held against torch: 4 query heads of 8 on 2 key heads."""
    from onnx import TensorProto, helper

    def info(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], q_num_heads=4, kv_num_heads=2)
    inputs = [info("q", 2, 5, 32), info("k", 2, 9, 16), info("v", 2, 9, 16)]
    graph = helper.make_graph([node], "g", inputs, [info("y", 2, 5, 32)])
    path = tmp_path / "a.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]).SerializeToString())
    q, k = torch.zeros(2 * 4, 5, 8), torch.zeros(2 * 4, 9, 8)
    with FlopCounterMode(display=False) as counter:
        torch.bmm(torch.bmm(q, k.transpose(1, 2)), k)
    assert product_flops(path) == counter.get_total_flops()
