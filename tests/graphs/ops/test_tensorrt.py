"""TensorRT imports the portable bodies and builds engines from them: TensorRT for RTX, no GPU needed."""

import functools
from collections.abc import Iterable
from typing import Any

import onnx_ir as ir
import pytest
from onnx import ModelProto

from engines.tensorrt.prepare.prepared_graphs import exact_bodies
from graphs.ops import gather_tokens, linear, select_tokens
from tests.engines.native import rtx
from tests.graphs.ops import models

OPSETS = (18, 23)

pytestmark = rtx.needed


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


SELECTIONS = [(18, FORMS | SMALLEST), (23, FORMS), (18, COVERAGE), (23, COVERAGE)]
PRODUCTS = {"plain", "zeros-and-bias", "odd-groups", "prefill-float16", "few-rows-bfloat16", "one-of-each"}


def gathers(opset: int) -> dict[str, ModelProto]:
    return {case.name: models.gather_model(case, opset) for case in gather_tokens.cases() if case.name != "float64"}


def linear_for_tensorrt(case: linear.Case) -> ModelProto:
    model = ir.serde.deserialize_model(models.linear_model(case, 18, "exact"))
    exact_bodies(model, 18)
    return ir.serde.serialize_model(model)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What TensorRT made of every model here: operator, opset and case in one name."""
    named = {"generic": models.select_model(selections()["all-picks"], 18, "generic")}
    for opset, names in SELECTIONS:
        named |= {f"select {opset} {name}": models.select_model(selections()[name], opset, "exact") for name in names}
    for opset in OPSETS:
        named |= {f"gather {opset} {name}": model for name, model in gathers(opset).items()}
    named |= {f"linear {case.name}": linear_for_tensorrt(case) for case in linear.cases() if case.name in PRODUCTS}
    return rtx.build(named, tmp_path_factory.mktemp("rtx"))


@functools.cache
def selections() -> dict[str, select_tokens.Case]:
    return {case.name: case for case in select_tokens.cases()}


def output_shapes(built: dict[str, Any], prefix: str, names: Iterable[str]) -> dict[str, list[list[int]]]:
    """Name -> shapes of the engine's outputs. Every engine must be built."""
    results = {name: built[f"{prefix} {name}"] for name in names}
    for name, result in results.items():
        assert result["parsed"] and result["engine_bytes"] > 0, f"{name}: {result['log']}"
    return {name: result["outputs"] for name, result in results.items()}


@pytest.mark.parametrize(("opset", "names"), SELECTIONS)
def test_select_tokens(opset: int, names: set[str], built: dict[str, Any]) -> None:
    assert output_shapes(built, f"select {opset}", names) == {
        name: [[len(selections()[name].scores), selections()[name].attributes["keep"]]] for name in names
    }


@pytest.mark.parametrize("opset", OPSETS)
def test_gather_tokens(opset: int, built: dict[str, Any]) -> None:
    named = gathers(opset)
    assert output_shapes(built, f"gather {opset}", named) == {
        name: [[dim.dim_value for dim in model.graph.output[0].type.tensor_type.shape.dim]]
        for name, model in named.items()
    }


def test_linear(built: dict[str, Any]) -> None:
    """The weights are network inputs here, uint8 ones too; the missing zeros before a bias are left out."""
    chosen = [case for case in linear.cases() if case.name in PRODUCTS]
    assert output_shapes(built, "linear", PRODUCTS) == {
        case.name: [[len(case.x), len(case.qweight)]] for case in chosen
    }


def test_generic_select_body_needs_the_exact_one(built: dict[str, Any]) -> None:
    """If this fails, TensorRT has learned OptionalHasElement and graphs may carry the generic body."""
    assert not built["generic"]["parsed"]
