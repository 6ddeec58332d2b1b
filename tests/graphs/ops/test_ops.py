"""What all operators share: the contract's names, the registry, and imports that cost nothing."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, defs, shape_inference

from graphs import ops
from graphs.ops import gather_tokens, linear, select_tokens
from tests.graphs.ops import models

CONTRACT = {
    "BtpSelectTokens": {"keep", "attention_quota", "diversity_quota", "pool", "boundary"},
    "BtpGatherTokens": {"start", "count"},
    "BtpLinear": {"bits", "group"},
}
OPTIONS = {
    "BtpSelectTokens": {"diversity_rule": b"farthest", "weighted": 0},
    "BtpGatherTokens": {},
    "BtpLinear": {},
}


def test_domain_and_version() -> None:
    assert (ops.DOMAIN, ops.VERSION) == ("btp", 1)
    assert ops.names() == ["gather_tokens", "linear", "select_tokens"]
    assert [ops.node_name(name) for name in ops.names()] == [ops.operator(name).NAME for name in ops.names()]


@pytest.mark.parametrize("opset", [18, 23])
def test_functions_are_those_of_the_contract(opset: int) -> None:
    functions = ops.functions(opset)
    assert all(isinstance(function, onnx.FunctionProto) for function in functions)
    assert {function.name: set(function.attribute) for function in functions} == CONTRACT
    for function in functions:
        defaults = {a.name: onnx.helper.get_attribute_value(a) for a in function.attribute_proto}
        assert defaults == OPTIONS[function.name]
    assert all(function.domain == "btp" for function in functions)
    assert all([(o.domain, o.version) for o in function.opset_import] == [("", opset)] for function in functions)


def test_functions_are_the_same_bytes_every_time() -> None:
    first, second = (
        [function.SerializeToString(deterministic=True) for function in ops.functions(18)] for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("operator", [gather_tokens, linear, select_tokens])
def test_schema_is_that_of_the_contract(operator: object) -> None:
    schema = operator.SCHEMA
    assert (schema.domain, schema.since_version) == ("btp", 1)
    options = OPTIONS[schema.name]
    assert set(schema.attributes) == CONTRACT[schema.name] | set(options) | {"plugin_version", "plugin_namespace"}
    for name, default in options.items():
        assert not schema.attributes[name].required
        assert onnx.helper.get_attribute_value(schema.attributes[name].default_value) == default
    for name in CONTRACT[schema.name]:
        assert schema.attributes[name].type == defs.OpSchema.AttrType.INT
        assert schema.attributes[name].required
    assert schema.attributes["plugin_version"].default_value.s == b"1"
    assert schema.attributes["plugin_namespace"].default_value.s == b""
    assert schema.attributes["plugin_version"].type == defs.OpSchema.AttrType.STRING


# In a process of its own: registered schemas would stay for all other tests.
INFERENCE = """
import sys
from onnx import TensorProto, checker, shape_inference
from graphs import ops
from graphs.ops import gather_tokens, linear, select_tokens
from tests.graphs.ops import models
ops.register_schemas()
ops.register_schemas()
def case(op, name):
    return next(case for case in op.cases() if case.name == name)
for model in (
    models.select_model(case(select_tokens, "batch"), 18, "exact"),
    models.gather_model(case(gather_tokens, "batch"), 18),
    models.linear_model(case(linear, "zeros-and-bias"), 18, "exact"),
    models.linear_model(case(linear, "bias"), 18, "exact"),
):
    wanted = model.graph.output[0].SerializeToString()
    del model.functions[:]
    model.graph.output[0].type.Clear()
    inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    assert inferred.graph.output[0].SerializeToString() == wanted, inferred.graph.output[0]
    checker.check_model(inferred, full_check=True)
    del inferred.graph.node[0].attribute[0]
    try:
        checker.check_model(inferred)
    except checker.ValidationError:
        continue
    raise AssertionError("a missing attribute was accepted")
"""


def test_registered_schemas_check_and_infer_nodes_without_a_body() -> None:
    subprocess.run([sys.executable, "-c", INFERENCE], check=True, timeout=120)


IMPORTS = (
    "import graphs.ops",
    "import graphs.ops.select_tokens, graphs.ops.gather_tokens, graphs.ops.linear, graphs.packing",
    "from graphs import ops; ops.functions(18); ops.select_tokens.cases()",
)
# One after the other, so that what is loaded is known to be of the line. The references need torch, which takes seconds
# to load; here the stand-in shows that each is there at its first use.
FIRST_USE = f"""
import sys, types
for line in {IMPORTS!r}:
    exec(line)
    heavy = {{"torch", "transformers", "onnxruntime", "tensorrt"}} & set(sys.modules)
    assert not heavy, (line, heavy)
class StandIn(types.ModuleType):
    __getattr__ = lambda self, name: object
sys.modules["torch"] = StandIn("torch")
from graphs import ops
for name in ops.names():
    assert ops.operator(name).reference.__module__ == f"graphs.ops.{{name}}.torch_reference"
"""


def test_imports_load_no_framework_and_references_come_on_first_use() -> None:
    subprocess.run([sys.executable, "-c", FIRST_USE], check=True, timeout=120)


def test_unknown_names_are_attribute_errors() -> None:
    for module in (ops, select_tokens, gather_tokens, linear):
        assert not hasattr(module, "no_such_operator")


def test_both_operators_in_one_model() -> None:
    select = next(case for case in select_tokens.cases() if case.name == "batch")
    tokens = np.random.default_rng(0).standard_normal((4, 40, 8)).astype(np.float32)
    model = models.select_model(select, 18, "generic")
    output = ("kept", TensorProto.FLOAT, (4, 24, 8))
    attributes = {"start": 6, "count": 30} | models.PLUGIN
    gather = models.one_node_model("BtpGatherTokens", None, 18, {}, output, attributes, ["tokens", "indices"])
    model.graph.node.append(gather.graph.node[0])
    model.graph.input.append(onnx.helper.make_tensor_value_info("tokens", TensorProto.FLOAT, tokens.shape))
    model.graph.output.append(gather.graph.output[0])
    del model.functions[:]
    model.functions.extend(ops.functions(18))
    models.check(model)
    shape_inference.infer_shapes(model, strict_mode=True)
    indices = models.run_onnxruntime(model, {**select.inputs, "tokens": tokens})
    assert indices.shape == (4, 14)
