"""The TensorRT plugins: against the headers alone, and in engines that TensorRT for RTX builds for an absent GPU.

TENSORRT_INCLUDE_DIR names folders of NvInferRuntime.h (several with a colon between). TensorRT for RTX is the extra
`rtx`; BTP_RTX_PYTHON may name another interpreter that has it.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from graphs.ops import functions
from tests.engines.native import builds

HEADERS = builds.tensorrt_headers()
PLUGIN_ATTRIBUTES = {"plugin_version": "1", "plugin_namespace": ""}
COUNTS = {"keep": 288, "attention_quota": 86, "diversity_quota": 86, "pool": 318, "boundary": 288}


def headers() -> list[Path]:
    if not HEADERS:
        pytest.skip("no TensorRT headers: name a folder of NvInferRuntime.h in TENSORRT_INCLUDE_DIR")
    return HEADERS


@pytest.mark.parametrize("index", range(max(1, len(HEADERS))))
def test_contract_with_headers_alone(index: int) -> None:
    """Creators, fields, shapes, formats, refusals, round trip, and enqueue with the emulated kernels."""
    against = headers()[index]
    for library in {builds.plugin(against), builds.plugin(headers()[0]), builds.plugin(headers()[-1])}:
        done = subprocess.run([builds.contract(against), library, "run"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{against}, {library}: {done.stdout}{done.stderr}"


def test_the_static_library_compiles_and_names_what_it_expects_of_tensorrt() -> None:
    for folder in headers():
        library = builds.plugin(folder, name="trt_static")
        symbols = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
        assert {"getPluginRegistry", "getLogger"} <= set(symbols.stdout.split())


# --- TensorRT for RTX -------------------------------------------------------------------------------------------------


@functools.cache
def rtx() -> tuple[str, Path]:
    """An interpreter with the bindings and its folder of libraries under the names they are looked for; or a skip."""
    python = os.environ.get("BTP_RTX_PYTHON", sys.executable)
    found = "import importlib.util as u; print(u.find_spec('tensorrt_rtx_bindings') and " \
            "u.find_spec('onnxruntime_ep_nv_tensorrt_rtx').submodule_search_locations[0] or '')"  # fmt: skip
    libraries = subprocess.run([python, "-c", found], capture_output=True, text=True, check=False).stdout.strip()
    if not libraries:
        pytest.skip("TensorRT for RTX is not installed: pip install 'btp-export[rtx]', or set BTP_RTX_PYTHON")
    links = builds.KEPT / "rtx"
    links.mkdir(parents=True, exist_ok=True)
    for name, stem in (
        ("libtensorrt_rtx.so.1", "libtensorrt_rtx.so"),
        ("libtensorrt_rtx.so", "libtensorrt_rtx.so"),
        ("libtensorrt_onnxparser_rtx.so.1", "libtensorrt_onnxparser_rtx.so"),
    ):
        (target,) = Path(libraries).glob(f"{stem}.*.*.*")
        link = links / name
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(target)
    return python, links


def build_engine(model: onnx.ModelProto, plugins: str, folder: Path) -> tuple[dict[str, Any], str]:
    """What rtx_build.py found, and what the plugin said on standard error."""
    python, links = rtx()
    path = folder / "model.onnx"
    onnx.save(model, path)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(links), "PYTHONPATH": str(builds.ROOT)}
    command = [python, str(builds.TESTS / "rtx_build.py"), str(path), plugins]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def pipeline(
    similarity: int | None = TensorProto.FLOAT, seeds: int = 144, *, bodies: bool = False, **changes: Any
) -> onnx.ModelProto:
    """Selection and gather as in the released first stage of LLaVA-1.5-7B, hidden size 512."""
    counts = {name: value for name, value in (COUNTS | changes).items() if value is not None}
    inputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 576])]
    if similarity is not None:
        inputs.append(helper.make_tensor_value_info("similarity", similarity, [1, 576, 576]))
    if seeds:
        inputs.append(helper.make_tensor_value_info("seeds", TensorProto.INT32, [seeds]))
    select = helper.make_node(
        "BtpSelectTokens", [i.name for i in inputs], ["indices"], "select", domain="btp", **counts, **PLUGIN_ATTRIBUTES
    )
    gather = helper.make_node(
        "BtpGatherTokens",
        ["hidden", "indices"],
        ["out"],
        "gather",
        domain="btp",
        start=35,
        count=576,
        **PLUGIN_ATTRIBUTES,
    )
    inputs.append(helper.make_tensor_value_info("hidden", TensorProto.FLOAT16, [1, 640, 512]))
    outputs = [
        helper.make_tensor_value_info("indices", TensorProto.INT32, [1, None]),
        helper.make_tensor_value_info("out", TensorProto.FLOAT16, [1, 352, 512]),
    ]
    graph = helper.make_graph([select, gather], "stage", inputs, outputs)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("btp", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions(18) if bodies else [])


def plugin_of(form: str) -> str:
    return "python" if form == "python" else str(builds.plugin(headers()[-1]))


FORMS = ("python", "c++")
VARIANTS = {
    "float32 similarity, seeds": pipeline(),
    "float16 similarity": pipeline(TensorProto.FLOAT16, 0),
    "scores only": pipeline(None, 0, diversity_quota=0),
    "with function bodies": pipeline(bodies=True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_engine_is_built_with_the_plugins(variant: str, form: str, tmp_path: Path) -> None:
    rtx()
    result, _ = build_engine(VARIANTS[variant], plugin_of(form), tmp_path)
    assert result["parsed"] and result["log"] == []
    assert result["layers"] == ["PLUGIN_V3", "PLUGIN_V3"]
    assert result["outputs"] == [[1, 288], [1, 352, 512]]
    assert result["engine_bytes"] > 0


REFUSED = {
    "keep above V": (pipeline(keep=900), "keep is 900"),
    "attribute missing": (pipeline(pool=None), "attribute pool is missing"),
    "attribute of the wrong type": (pipeline(boundary=2.5), "attribute boundary is FLOAT32"),
    "list for a number": (pipeline(keep=[288, 3]), "attribute keep is 2 values"),
    "similarity missing": (pipeline(None, 0), "diversity_quota is 86"),
    "quota above pool": (pipeline(attention_quota=400), "pool"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_graph_is_refused_with_a_message(case: str, form: str, tmp_path: Path) -> None:
    rtx()
    model, message = REFUSED[case]
    result, said = build_engine(model, plugin_of(form), tmp_path)
    assert not result["parsed"] and result["errors"]
    assert f"BtpSelectTokens: {message}" in said or (case == "quota above pool" and "pool" in said)


def test_a_second_form_of_the_plugins_is_refused(tmp_path: Path) -> None:
    python, links = rtx()
    script = (
        "from engines.plugins import register_python, tensorrt_module\n"
        "trt = tensorrt_module(); keep = register_python(trt)\n"
        "try:\n    register_python(trt)\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(links), "PYTHONPATH": str(builds.ROOT)}
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert "CheckError the plugin BtpSelectTokens is registered already" in done.stdout, done.stdout + done.stderr


def test_the_python_plugin_launches_the_kernels() -> None:
    """enqueue() of both operators with the emulated kernels: no TensorRT is needed for that."""
    from engines.kernels import Kernels
    from graphs.ops.common.trt_python import Tensor
    from graphs.ops.select_tokens.trt_python import SelectTokens

    kernels = Kernels(builds.emulated_kernels())
    scores, indices = np.float32([[0.0, 3.0, 1.0, 2.0]]), np.zeros((1, 2), np.int32)
    op = SelectTokens(2, 2, 0, 2, 4)
    inputs = [Tensor(scores.ctypes.data, scores.shape, "float32")]
    assert op.workspace(inputs) == kernels.workspace(
        inputs, **dict(zip(SelectTokens.ATTRIBUTES, op.values, strict=True))
    )
    op.launch(kernels, inputs, indices.ctypes.data, 0, 0)
    assert indices.tolist() == [[1, 3]]


def test_the_bindings_are_not_needed_to_import_the_plugins() -> None:
    assert importlib.util.find_spec("engines.plugins") is not None
    from engines.plugins import OPERATORS

    assert [operator.NAME for operator in OPERATORS] == ["BtpSelectTokens", "BtpGatherTokens"]
