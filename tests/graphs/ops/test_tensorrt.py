"""TensorRT imports the portable bodies and builds engines from them: TensorRT for RTX, no GPU needed."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from onnx import ModelProto

from graphs.ops import gather_tokens, select_tokens
from tests.graphs.ops import models

MODULES = ("tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx")
MISSING = [module for module in MODULES if find_spec(module) is None]
OPSETS = (18, 23)

INSTALL = "pip install tensorrt_rtx_cu13_bindings onnxruntime-ep-nv-tensorrt-rtx-cu13"

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"TensorRT for RTX is not here (no module {', '.join(MISSING)}): {INSTALL}"
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables with which the bindings find the library, under the names it is looked up by."""
    spec = find_spec(MODULES[1])
    assert spec is not None
    assert spec.origin is not None
    links = tmp_path_factory.mktemp("tensorrt_rtx")
    for library in Path(spec.origin).parent.glob("libtensorrt_*rtx.so.*"):
        stem = library.name.split(".so")[0]
        for name in (f"{stem}.so", f"{stem}.so.1"):
            (links / name).symlink_to(library)
    return {**os.environ, "LD_LIBRARY_PATH": str(links)}


def build(folder: Path, named: dict[str, ModelProto], environment: dict[str, str]) -> dict[str, list[object]]:
    """Name -> shapes of the engine's outputs, or what went wrong."""
    for name, model in named.items():
        (folder / name).write_bytes(model.SerializeToString())
    script = Path(__file__).with_name("rtx_build.py")
    done = subprocess.run(
        [sys.executable, script, *named], cwd=folder, env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, list[object]] = json.loads(done.stdout.splitlines()[-1])
    return results


# The forms of the body and the sizes at which one of its tensors or loops is as small as it gets.
FORMS = {"released-1", "released-1-float16", "released-2", "released-3", "batch"}
SMALLEST = {"no-seed-in-seeds", "nothing-but-empty-seeds", "one-token", "keep-all-from-nothing", "cut-in-attention"}


@pytest.mark.parametrize(("opset", "names"), [(18, FORMS | SMALLEST), (23, FORMS)])
def test_select_tokens(opset: int, names: set[str], tmp_path: Path, environment: dict[str, str]) -> None:
    chosen = [case for case in select_tokens.cases() if case.name in names]
    assert len(chosen) == len(names)
    built = build(tmp_path, {c.name: models.select_model(c, opset, "exact") for c in chosen}, environment)
    assert built == {case.name: [[len(case.scores), case.attributes["keep"]]] for case in chosen}


@pytest.mark.parametrize("opset", OPSETS)
def test_gather_tokens(opset: int, tmp_path: Path, environment: dict[str, str]) -> None:
    named = {case.name: models.gather_model(case, opset) for case in gather_tokens.cases() if case.name != "float64"}
    built = build(tmp_path, named, environment)
    assert built == {
        name: [[dim.dim_value for dim in model.graph.output[0].type.tensor_type.shape.dim]]
        for name, model in named.items()
    }


def test_generic_select_body_needs_the_exact_one(tmp_path: Path, environment: dict[str, str]) -> None:
    """If this fails, TensorRT has learned OptionalHasElement and graphs may carry the generic body."""
    case = next(case for case in select_tokens.cases() if case.name == "all-picks")
    built = build(tmp_path, {"generic": models.select_model(case, 18, "generic")}, environment)
    assert built["generic"][0] == "not parsed"
