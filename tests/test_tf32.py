"""TF32: never for a float32 bundle, and the same rule in every runtime and every way of building."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto

from btp_export.running.opening import open_graphs
from calibrate.reference.streamed_model import StreamedReference
from engines.runners.onnxruntime import OrtLoader
from engines.targets import find_target
from engines.tensorrt.prepare.build_plan import Wishes, plan_build
from graphs.dtypes import Precision
from graphs.tf32 import allows_tf32, torch_without_tf32
from tests.conftest import unpruned
from tests.engines.tensorrt import building
from tests.engines.tensorrt.plans import prepared, staged_bundle

PRECISIONS: list[tuple[Precision, bool]] = [("float32", False), ("float16", True), ("bfloat16", True)]
PRODUCTS = {"MatMul", "Gemm", "Conv", "Attention", "Einsum"}


@pytest.mark.parametrize(("precision", "allowed"), PRECISIONS)
def test_the_rule(precision: Precision, allowed: bool) -> None:
    assert allows_tf32(precision) is allowed


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_in_half_precision_only_selections_have_float32_products(tiny_bundle: Any, precision: str, opset: int) -> None:
    """What the rule of half-precision bundles rests on."""
    bundle = staged_bundle(tiny_bundle, precision=precision, opset=opset)
    collected = {graph.name: float32_products(bundle.graph_path(graph.name)) for graph in bundle.graphs()}
    assert {name: count for name, count in collected.items() if count} == {"select_0": 2, "select_1": 2, "select_2": 1}


def float32_products(path: Path) -> int:
    """Nodes that multiply matrices of float32."""
    graph = onnx.load(path, load_external_data=False).graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.output, *graph.value_info]}
    types |= {weight.name: weight.data_type for weight in graph.initializer}
    return sum(node.op_type in PRODUCTS and types[node.input[0]] == TensorProto.FLOAT for node in graph.node)


@pytest.mark.parametrize(("precision", "allowed"), PRECISIONS)
def test_onnx_runtime_is_told(
    tiny_bundle: Any, precision: Precision, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engines.runners import onnxruntime as module

    monkeypatch.setattr(module, "_require_cuda", lambda: None)  # there is no GPU here: only the options are made
    bundle = tiny_bundle(precision=precision)
    loader, _ = open_graphs(bundle, bundle.profile(None).name, device="cuda")
    assert isinstance(loader, OrtLoader)
    (provider, options), _ = loader._providers()
    assert provider == "CUDAExecutionProvider" and options["use_tf32"] == int(allowed)


@pytest.mark.parametrize(("precision", "allowed"), PRECISIONS)
def test_the_builder_is_told(tmp_path: Path, precision: Precision, allowed: bool) -> None:
    building.need_rtx()
    from engines.tensorrt import installed
    from engines.tensorrt.build import builder
    from engines.tensorrt.messages import Messages

    rtx = installed.load("rtx")
    job = building.job(building.product(tmp_path), precision=precision)
    built, network = builder._create(rtx, Messages(rtx.module, echo=True), job.graph)
    config = builder.configuration(rtx, job, None, builder._monitor(rtx.module, lambda share: None))
    assert config(built, network).get_flag(rtx.module.BuilderFlag.TF32) is allowed


@pytest.mark.parametrize(("precision", "allowed"), PRECISIONS)
def test_the_scripts_of_a_kit_say_the_same(
    tiny_bundle: Any, tmp_path: Path, precision: Precision, allowed: bool
) -> None:
    bundle = staged_bundle(tiny_bundle, precision=precision)
    plan = plan_build(bundle, find_target("h100"), Wishes())
    text = prepared(plan, recorder=None).joinpath("build.sh").read_text()
    assert text.count("--noTF32") == (0 if allowed else len(bundle.graphs()))


def test_the_reference_run_is_exact_whatever_the_process_has_set(tiny_bundle: Any) -> None:
    bundle = tiny_bundle()
    seen: list[list[str]] = []
    reference = StreamedReference(bundle.checkpoint())
    start: Callable[..., Any] = reference._start_all
    reference._start_all = lambda *given: (seen.append(settings()), start(*given))[1]  # type: ignore[method-assign]
    before = settings()
    assert before[1:] == ["tf32", "tf32"], "torch's own default for cuDNN"
    reference.run([], [unpruned(bundle.spec)])
    assert seen == [["ieee"] * 3] and settings() == before


def test_torch_is_put_back_after_an_error() -> None:
    before = settings()
    with pytest.raises(ZeroDivisionError), torch_without_tf32():
        assert settings() == ["ieee"] * 3
        raise ZeroDivisionError
    assert settings() == before


def settings() -> list[str]:
    backends = torch.backends
    return [part.fp32_precision for part in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)]
