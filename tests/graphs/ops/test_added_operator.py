"""Adding an operator is adding a folder: one made up here, in a temporary folder, works in all that finds operators."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import shape_inference

from engines.native import plugins
from engines.tensorrt.prepare.prepared_graphs import exact_bodies
from graphs import ops
from tests.engines.native import builds
from tests.graphs.ops import models

FILES = {
    "__init__.py": '''
"""BtpScaleTokens: tokens times a whole number."""
from graphs.ops.scale_tokens.cases import cases
from graphs.ops.scale_tokens.onnx_body import function
from graphs.ops.scale_tokens.schema import NAME, SCHEMA

def __getattr__(name):
    if name == "reference":
        from graphs.ops.scale_tokens.torch_reference import reference
        return reference
    raise AttributeError(name)
''',
    "schema.py": """
from onnx import defs
from graphs.ops import DOMAIN, PLUGIN, VERSION

NAME = "BtpScaleTokens"
_P, _A = defs.OpSchema.FormalParameter, defs.OpSchema.Attribute
SCHEMA = defs.OpSchema(
    NAME, DOMAIN, VERSION, inputs=[_P("tokens", "tensor(float)")], outputs=[_P("scaled", "tensor(float)")],
    attributes=[_A("factor", defs.OpSchema.AttrType.INT, "", required=True)],
)
""",
    "torch_reference.py": """
def reference(tokens, *, factor):
    return tokens * factor
""",
    "onnx_body.py": """
from onnx import parser

def function(opset):
    return parser.parse_function(f'''<opset_import: ["" : {opset}], domain: "btp"> BtpScaleTokens <factor>
(tokens) => (scaled) {{
  factor = Constant<value_int: int = @factor>()
  factor_float = Cast<to = 1>(factor)
  scaled = Mul(tokens, factor_float)
}}''')
""",
    "cases.py": """
from types import SimpleNamespace
import numpy as np

def cases():
    tokens = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    return [SimpleNamespace(name=str(f), inputs={"tokens": tokens}, attributes={"factor": f}) for f in (1, -3)]
""",
    "trt_python.py": """
class ScaleTokens:
    NAME = "BtpScaleTokens"

OPERATOR = ScaleTokens
""",
    "ort_op.cc": """
#include "../common/ort_common.h"

namespace btp {
namespace {

class ScaleTokens : public Operands<1> {
public:
    ScaleTokens(const OrtOp&, const OrtKernelInfo* info) : factor_(int_attribute(info, "BtpScaleTokens", "factor")) {}

    void run(OrtKernelContext* context) const
    {
        const Input tokens = input(context, 0);
        auto* const scaled = static_cast<float*>(output(context, 0, tokens.shape));
        int64_t count = 1;
        for (const int64_t size : tokens.shape) {
            count *= size;
        }
        for (int64_t i = 0; i < count; ++i) {
            scaled[i] = static_cast<const float*>(tokens.data)[i] * static_cast<float>(factor_);
        }
    }

private:
    const int32_t factor_;
};

std::vector<OrtOp> ops_of(bool)
{
    return {ort_op<ScaleTokens>("BtpScaleTokens", nullptr, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)};
}

const OrtRegistration registration(ops_of);

}  // namespace
}  // namespace btp
""",
}


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the operator, on the search path of graphs.ops."""
    root = tmp_path / "operators"
    folder = root / "scale_tokens"
    folder.mkdir(parents=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (root / "common").symlink_to(builds.OPS / "common")  # what native sources of all operators include
    monkeypatch.setattr(ops, "__path__", [*ops.__path__, str(root)])
    yield folder
    for name in [name for name in sys.modules if name.startswith("graphs.ops.scale_tokens")]:
        del sys.modules[name]
    vars(ops).pop("scale_tokens", None)


def one_node(case: Any, body: Any) -> onnx.ModelProto:
    shape = case.inputs["tokens"].shape
    output = ("scaled", onnx.TensorProto.FLOAT, shape)
    return models.one_node_model("BtpScaleTokens", body, 18, case.inputs, output, case.attributes)


def test_it_is_found_with_its_schema_reference_body_and_cases(added: Path) -> None:
    assert ops.names() == ["gather_tokens", "linear", "scale_tokens", "select_tokens"]
    operator = ops.scale_tokens
    assert ops.of_node("BtpScaleTokens") is operator
    body = next(body for body in ops.functions(18) if body.name == "BtpScaleTokens")
    assert len(operator.cases()) == 2
    for case in operator.cases():
        wanted = operator.reference(torch.from_numpy(case.inputs["tokens"]), **case.attributes)
        model = one_node(case, body)
        models.check(model)
        np.testing.assert_array_equal(models.run_onnxruntime(model, case.inputs), wanted)
        np.testing.assert_array_equal(models.run_evaluator(model, case.inputs), wanted)


def test_graphs_for_tensorrt_carry_its_body(added: Path) -> None:
    model = ir.serde.deserialize_model(one_node(ops.scale_tokens.cases()[0], None))
    exact_bodies(model, 18)
    assert {name for _, name, _ in model.functions} == {"BtpScaleTokens"}
    inferred = shape_inference.infer_shapes(ir.serde.serialize_model(model), strict_mode=True)
    assert inferred.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    names = [operator.NAME for operator in plugins.operators()]
    assert names == ["BtpGatherTokens", "BtpLinear", "BtpScaleTokens", "BtpSelectTokens"]


def test_it_is_built_into_the_library_of_onnx_runtime(added: Path, tmp_path: Path) -> None:
    """No file outside its folder names it: the library holds whatever is linked into it."""
    assert added / "ort_op.cc" in builds.ort_sources()
    library = tmp_path / "libbtp_ort.so"
    flags = [*builds.STRICT, "-O1", "-shared", "-fvisibility=hidden"]
    builds.run([builds.compiler(), *flags, added / "ort_op.cc", builds.NATIVE / "ort_library.cc", "-o", library])
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    for case in ops.scale_tokens.cases():
        session = onnxruntime.InferenceSession(one_node(case, None).SerializeToString(), options)
        wanted = ops.scale_tokens.reference(torch.from_numpy(case.inputs["tokens"]), **case.attributes)
        np.testing.assert_array_equal(session.run(None, case.inputs)[0], wanted)


def test_cmake_finds_its_sources(added: Path, tmp_path: Path) -> None:
    builds.compiler()
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    options = [
        "-DBTP_CUDA=OFF",
        "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
        f"-DBTP_OPERATORS={builds.OPS};{added.parent}",
    ]
    command = ["cmake", "-S", str(builds.NATIVE), "-B", str(tmp_path / "build"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    commands = json.loads((tmp_path / "build" / "compile_commands.json").read_text())
    compiled = {Path(command["file"]).resolve() for command in commands}
    assert {path.resolve() for path in (*builds.ort_sources(), builds.NATIVE / "host_library.cc")} == compiled


def test_a_node_of_another_name_is_of_no_operator() -> None:
    assert ops.of_node("BtpScaleTokens") is None
    assert ops.of_node("BtpSelectTokensSimilarity") is ops.select_tokens
