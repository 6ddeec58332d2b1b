"""The TensorRT plugins: against the headers alone, and in engines that TensorRT for RTX builds for an absent GPU.

TENSORRT_INCLUDE_DIR names folders of NvInferRuntime.h (several with a colon between).
"""

import importlib.util
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from benchmarks.gpu_ort import one_node
from graphs import packing
from graphs.ops import functions, gather_tokens, linear, select_tokens
from tests.engines.native import builds, rtx

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


@pytest.mark.parametrize("index", range(max(1, len(HEADERS))))
def test_the_static_library_registers_itself_when_it_is_loaded(index: int) -> None:
    folder = headers()[index]
    library, host = builds.plugin(folder, name="trt_static"), builds.static_host(folder)
    major = re.search(r"_MAJOR(?:_ENTERPRISE)? (\d+)", (folder / "NvInferVersion.h").read_text())
    assert major is not None
    done = subprocess.run([host, library, f"{major[1]}0300"], capture_output=True, text=True, check=True)
    wanted = [f"Btp{name} '1' into ''" for name in ("GatherTokens", "Linear", "SelectTokens")]
    assert done.stdout.splitlines() == [*wanted, "registered 1"]


@pytest.mark.parametrize("version", ["90300", "120100", "10701"])
def test_the_static_library_touches_nothing_of_another_tensorrt(version: str) -> None:
    """The registry's table of functions changed with 11, and TensorRT for RTX (1.7 here) has that of 11."""
    folder = headers()[0]
    library, host = builds.plugin(folder, name="trt_static"), builds.static_host(folder)
    done = subprocess.run([host, library, version], capture_output=True, text=True, check=True)
    assert done.stdout == "registered 0\n"
    result = f"{int(version) // 10000}.{int(version) // 100 % 100}"
    assert re.search(rf"^libbtp_trt.so: it was built for TensorRT \d+, and this process has {result};", done.stderr)


# --- TensorRT for RTX -------------------------------------------------------------------------------------------------


def pipeline(
    similarity: int | None = TensorProto.FLOAT, seeds: int = 144, *, bodies: bool = False, **changes: Any
) -> onnx.ModelProto:
    """Selection and gather as in the released first stage of LLaVA-1.5-7B, hidden size 512."""
    attributes = {name: value for name, value in (COUNTS | changes).items() if value is not None}
    inputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 576])]
    if similarity is not None:
        inputs.append(helper.make_tensor_value_info("similarity", similarity, [1, 576, 576]))
    if seeds:
        inputs.append(helper.make_tensor_value_info("seeds", TensorProto.INT32, [seeds]))
    select = helper.make_node(
        "BtpSelectTokens",
        [i.name for i in inputs],
        ["indices"],
        "select",
        domain="btp",
        **attributes,
        **PLUGIN_ATTRIBUTES,
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


VARIANTS = {
    "float32 similarity, seeds": pipeline(),
    "float16 similarity": pipeline(TensorProto.FLOAT16, 0),
    "scores only": pipeline(None, 0, diversity_quota=0),
    "coverage, weighted": pipeline(diversity_rule="coverage", weighted=1),
    "with function bodies": pipeline(bodies=True),
}
REFUSED = {
    "keep above V": (pipeline(keep=900), "keep is 900"),
    "attribute missing": (pipeline(pool=None), "attribute pool is missing"),
    "attribute of the wrong type": (pipeline(boundary=2.5), "attribute boundary is FLOAT32"),
    "list for a number": (pipeline(keep=[288, 3]), "attribute keep is 2 values"),
    "similarity missing": (pipeline(None, 0), "diversity_quota is 86"),
    "a rule that is none": (pipeline(diversity_rule="nearest"), 'diversity_rule is "nearest"'),
    "a rule of the wrong type": (pipeline(diversity_rule=1), "attribute diversity_rule is INT32"),
    "quota above pool": (pipeline(attention_quota=400), "(pool is 318|attention_quota is 400)"),
}
WRONG_PRODUCTS = {
    "bits": (dict(bits=8, group=32), "bits is 8"),
    "group": (dict(bits=4, group=128), "(group is 128 and K is 64|.*is 64, wanted a multiple of group 128)"),
}


def linear_for_tensorrt(case: linear.Case) -> onnx.ModelProto:
    """The node as graphs for TensorRT have it: packed inputs as int32 words, missing inputs left out."""
    given = dict(case.inputs) | {"qweight": packing.words(case.qweight)}
    given |= {} if case.zeros is None else {"zeros": packing.zero_words(case.zeros)}
    model = one_node("BtpLinear", given, case.attributes, case.x.dtype, 2)
    names = [name for name in model.graph.node[0].input if name]
    del model.graph.node[0].input[:]
    model.graph.node[0].input.extend(names)
    return model


def models() -> dict[str, onnx.ModelProto]:
    """All that is built or refused here, by name."""
    made = VARIANTS | {name: model for name, (model, _) in REFUSED.items()}
    for number, case in enumerate(select_tokens.cases()):
        dtype = np.dtype(np.int32)
        made[f"select {number} {case.name}"] = one_node("BtpSelectTokens", case.inputs, case.attributes, dtype, 2)
    for gather in gather_tokens.cases():
        dtype, rank = gather.tokens.dtype, gather.tokens.ndim
        made[f"gather {gather.name}"] = one_node("BtpGatherTokens", gather.inputs, gather.attributes, dtype, rank)
    products = {case.name: case for case in linear.cases()}
    made |= {f"linear {name}": linear_for_tensorrt(case) for name, case in products.items()}
    plain = products["plain"]
    for name, (attributes, _) in WRONG_PRODUCTS.items():
        made[name] = linear_for_tensorrt(replace(plain, attributes=attributes))
    return made


@pytest.fixture(scope="module", params=["python", "c++"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What TensorRT for RTX made of each model with one form of the plugins, all in one process."""
    plugins = "python" if request.param == "python" else str(builds.plugin(headers()[-1]))
    return rtx.build(models(), tmp_path_factory.mktemp("rtx"), plugins)


@rtx.needed
def test_an_engine_is_built_with_the_plugins(built: dict[str, Any]) -> None:
    for variant in VARIANTS:
        result = built[variant]
        # TensorRT's parser warns of attributes that a node may leave out, and goes on without them.
        left_out = [
            name for name in ("diversity_rule", "weighted") if f"Attribute {name} not found" in str(result["log"])
        ]
        assert left_out == ([] if variant == "coverage, weighted" else ["diversity_rule", "weighted"]), variant
        assert result["parsed"] and len(result["log"]) == len(left_out), variant
        assert result["layers"] == ["PLUGIN_V3", "PLUGIN_V3"], variant
        assert result["outputs"] == [[1, 288], [1, 352, 512]], variant
        assert result["engine_bytes"] > 0, variant


@rtx.needed
def test_every_case_of_the_operators_becomes_an_engine(built: dict[str, Any]) -> None:
    shapes = {
        f"select {number} {case.name}": [len(case.scores), case.attributes["keep"]]
        for number, case in enumerate(select_tokens.cases())
    }
    for gather in gather_tokens.cases():
        tokens = gather.tokens
        rows = tokens.shape[1] - gather.attributes["count"] + gather.indices.shape[1]
        shapes[f"gather {gather.name}"] = [tokens.shape[0], rows, *tokens.shape[2:]]
    assert {name: built[name]["parsed"] and built[name]["outputs"] for name in shapes} == {
        name: [shape] for name, shape in shapes.items()
    }
    assert all(built[name]["layers"] == ["PLUGIN_V3"] and built[name]["engine_bytes"] > 0 for name in shapes)


@rtx.needed
def test_every_product_with_packed_weights_as_inputs_becomes_an_engine(built: dict[str, Any]) -> None:
    for case in linear.cases():
        result = built[f"linear {case.name}"]
        assert result["parsed"] and result["outputs"] == [[len(case.x), len(case.qweight)]], case.name
        assert result["layers"] == ["PLUGIN_V3"] and result["engine_bytes"] > 0, case.name


@rtx.needed
@pytest.mark.parametrize("name", WRONG_PRODUCTS)
def test_a_wrong_product_is_refused_with_a_message(name: str, built: dict[str, Any]) -> None:
    assert not built[name]["parsed"]
    assert re.search(f"BtpLinear: {WRONG_PRODUCTS[name][1]}", built[name]["said"])


@rtx.needed
@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_graph_is_refused_with_a_message(case: str, built: dict[str, Any]) -> None:
    assert not built[case]["parsed"] and built[case]["log"]
    assert re.search(f"BtpSelectTokens: {REFUSED[case][1]}", built[case]["said"]), built[case]["said"]


@rtx.needed
def test_a_second_form_of_the_plugins_is_refused() -> None:
    script = (
        "from engines.native.plugins import register_python\n"
        "from engines.tensorrt import installed\n"
        "trt = installed.load('rtx').module; keep = register_python(trt)\n"
        "try:\n    register_python(trt)\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    assert re.search(r"CheckError the plugin Btp\w+ is registered already", rtx.run("-c", script).stdout)


@rtx.needed
def test_the_python_plugins_are_made_again_from_what_they_serialize() -> None:
    script = (
        "import numpy as np\n"
        "from engines.native.plugins import register_python\n"
        "from engines.tensorrt import installed\n"
        "trt = installed.load('rtx').module\n"
        "for creator in register_python(trt):\n"
        "    names = [field.name for field in creator.field_names]\n"
        "    values = [1 if name == 'weighted' else 2 + n // 3 for n, name in enumerate(names)]\n"
        "    values = [4, 64] if creator.name == 'BtpLinear' else values\n"
        "    fields = [trt.PluginField(name, b'coverage', trt.PluginFieldType.CHAR) if name == 'diversity_rule'"
        " else trt.PluginField(name, np.int32([value]), trt.PluginFieldType.INT32)"
        " for name, value in zip(names, values)]\n"
        "    made = creator.create_plugin('x', trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)\n"
        "    again = creator.create_plugin('x', made.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)\n"
        "    extra = [field.name for field in made.get_fields_to_serialize()][len(names):]\n"
        "    print(creator.name, dict(zip(names, again.op.values)), again.op.values == made.op.values, extra)\n"
    )
    assert sorted(rtx.run("-c", script).stdout.splitlines(), reverse=True) == [
        "BtpSelectTokens {'keep': 2, 'attention_quota': 2, 'diversity_quota': 2, 'pool': 3, 'boundary': 3,"
        " 'diversity_rule': 'coverage', 'weighted': 1} True ['inputs']",
        "BtpLinear {'bits': 4, 'group': 64} True ['inputs']",
        "BtpGatherTokens {'start': 2, 'count': 2} True ['inputs']",
    ]


def test_the_python_plugin_launches_the_kernels() -> None:
    """enqueue() of both operators with the emulated kernels: no TensorRT is needed for that."""
    from engines.native.kernels import Kernels
    from graphs.ops.common.trt_python import Tensor
    from graphs.ops.select_tokens.trt_python import SelectTokens

    kernels = Kernels(builds.emulated_kernels())
    scores, indices = np.float32([[0.0, 3.0, 1.0, 2.0]]), np.zeros((1, 2), np.int32)
    similarity = np.float32([[[1, 0, 0.5, 0], [0, 1, 0, 0.6], [0.5, 0, 1, 0], [0, 0.6, 0, 1]]])
    given = [
        Tensor(scores.ctypes.data, scores.shape, "float32"),
        Tensor(similarity.ctypes.data, similarity.shape, "float32"),
    ]
    names = (*SelectTokens.ATTRIBUTES, *SelectTokens.OPTIONS)
    for values, count, wanted in (
        ((2, 2, 0, 2, 4, "farthest", 0), 1, [[1, 3]]),
        ((2, 0, 1, 2, 4, "coverage", 0), 2, [[0, 1]]),  # 1 gains 1.6, as 3 does; then 0 gains 1.5, as 2 does
        ((2, 0, 1, 2, 4, "coverage", 1), 2, [[1, 2]]),  # the score of 0 is 0
    ):
        op, inputs = SelectTokens(*values), given[:count]
        size = op.workspace(inputs)
        assert size == kernels.workspace("select_tokens", inputs, **dict(zip(names, op.values, strict=True)))
        workspace = np.zeros(size + 16, np.uint8)
        op.launch(kernels, inputs, indices.ctypes.data, (workspace.ctypes.data + 15) // 16 * 16, 0)
        assert indices.tolist() == wanted


def test_the_bindings_are_not_needed_to_import_the_plugins() -> None:
    assert importlib.util.find_spec("engines.native.plugins") is not None
    from engines.native.plugins import operators

    assert [operator.NAME for operator in operators()] == ["BtpGatherTokens", "BtpLinear", "BtpSelectTokens"]
