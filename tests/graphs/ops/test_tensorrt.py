"""TensorRT imports the portable bodies and builds engines from them: TensorRT for RTX, no GPU needed."""

from pathlib import Path

import onnx_ir as ir
import pytest
from onnx import ModelProto

from engines.tensorrt.prepare.prepared_graphs import exact_bodies
from graphs.ops import gather_tokens, linear, select_tokens
from tests.engines.native import rtx
from tests.graphs.ops import models

OPSETS = (18, 23)

pytestmark = rtx.needed


def output_shapes(named: dict[str, ModelProto], folder: Path) -> dict[str, list[list[int]]]:
    """Name -> shapes of the engine's outputs. Every engine must be built."""
    built, _ = rtx.build(named, folder)
    for name, result in built.items():
        assert result["parsed"] and result["engine_bytes"] > 0, f"{name}: {result['log']}"
    return {name: result["outputs"] for name, result in built.items()}


# The forms of the body and the sizes at which one of its tensors or loops is as small as it gets.
FORMS = {"released-1", "released-1-float16", "released-2", "released-3", "batch"}
SMALLEST = {
    *("no-seed-in-seeds", "nothing-but-empty-seeds", "one-token", "keep-all-from-nothing", "cut-in-attention"),
    "seeds-fill",
}
COVERAGE = {
    *("coverage-released-1", "coverage-released-1-float16", "coverage-weighted-released-2-float16", "coverage-batch"),
    *("coverage-weighted-batch", "coverage-576-127", "coverage-nothing-but-empty-seeds", "coverage-one-token"),
    *("coverage-keep-all-from-nothing", "coverage-scores-only", "coverage-weighted-keep-all"),
}


@pytest.mark.parametrize(("opset", "names"), [(18, FORMS | SMALLEST), (23, FORMS), (18, COVERAGE), (23, COVERAGE)])
def test_select_tokens(opset: int, names: set[str], tmp_path: Path) -> None:
    chosen = [case for case in select_tokens.cases() if case.name in names]
    assert len(chosen) == len(names)
    built = output_shapes({c.name: models.select_model(c, opset, "exact") for c in chosen}, tmp_path)
    assert built == {case.name: [[len(case.scores), case.attributes["keep"]]] for case in chosen}


@pytest.mark.parametrize("opset", OPSETS)
def test_gather_tokens(opset: int, tmp_path: Path) -> None:
    named = {case.name: models.gather_model(case, opset) for case in gather_tokens.cases() if case.name != "float64"}
    assert output_shapes(named, tmp_path) == {
        name: [[dim.dim_value for dim in model.graph.output[0].type.tensor_type.shape.dim]]
        for name, model in named.items()
    }


def test_linear(tmp_path: Path) -> None:
    """The weights are network inputs here, uint8 ones too; the missing zeros before a bias are left out."""
    names = {"plain", "zeros-and-bias", "odd-groups", "prefill-float16", "few-rows-bfloat16", "one-of-each"}
    chosen = [case for case in linear.cases() if case.name in names]
    for_tensorrt = {case.name: ir.serde.deserialize_model(models.linear_model(case, 18, "exact")) for case in chosen}
    for model in for_tensorrt.values():
        exact_bodies(model, 18)
    built = output_shapes({name: ir.serde.serialize_model(model) for name, model in for_tensorrt.items()}, tmp_path)
    assert built == {case.name: [[len(case.x), len(case.qweight)]] for case in chosen}


def test_generic_select_body_needs_the_exact_one(tmp_path: Path) -> None:
    """If this fails, TensorRT has learned OptionalHasElement and graphs may carry the generic body."""
    case = next(case for case in select_tokens.cases() if case.name == "all-picks")
    built, _ = rtx.build({"generic": models.select_model(case, 18, "generic")}, tmp_path)
    assert not built["generic"]["parsed"]
