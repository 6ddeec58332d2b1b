"""Models of a single operator, and the ways to run them."""

import functools
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import FunctionProto, ModelProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

from graphs.ops import DOMAIN, VERSION, gather_tokens, linear, select_tokens

PLUGIN = {"plugin_version": "1", "plugin_namespace": ""}
DEFAULTS = {"diversity_rule": "farthest", "weighted": 0}


def one_node_model(
    name: str,
    body: FunctionProto | None,
    opset: int,
    inputs: dict[str, Any],
    output: tuple[str, int, tuple[int, ...]],
    attributes: dict[str, Any],
    node_inputs: list[str] | None = None,
) -> ModelProto:
    """A model of one node with its portable body; `node_inputs` may hold empty names for inputs that are missing."""
    values = [
        helper.make_tensor_value_info(key, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for key, array in inputs.items()
    ]
    node = helper.make_node(name, node_inputs or list(inputs), [output[0]], domain=DOMAIN, **attributes)
    graph = helper.make_graph([node], "one_node", values, [helper.make_tensor_value_info(*output)])
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(
        graph, opset_imports=opsets, functions=[] if body is None else [body], ir_version=10, producer_name="tests"
    )


def select_model(case: select_tokens.Case, opset: int, form: str, *, padded: bool = False) -> ModelProto:
    """`form` generic, farthest (generic, that rule alone) or exact.

    padded: missing inputs are there as empty names and missing attributes with their defaults, not left out.
    """
    rules = {name: case.attributes[name] for name in DEFAULTS if name in case.attributes}
    if form == "generic":
        body = select_tokens.function(opset)
    elif form == "farthest":
        body = select_tokens.function(opset, only="farthest")
    else:
        given = {"similarity": case.similarity is not None, "seeds": case.seeds is not None}
        body = select_tokens.body(opset, **given, **rules)
    names = [name if name in case.inputs else "" for name in ("scores", "similarity", "seeds")]
    output = ("indices", TensorProto.INT32, (len(case.scores), case.attributes["keep"]))
    attributes = (DEFAULTS if padded else {}) | case.attributes | PLUGIN
    return one_node_model(select_tokens.NAME, body, opset, case.inputs, output, attributes, names if padded else None)


def gather_model(case: gather_tokens.Case, opset: int) -> ModelProto:
    shape = list(case.tokens.shape)
    shape[1] += case.indices.shape[1] - case.attributes["count"]
    output = ("kept", helper.np_dtype_to_tensor_dtype(case.tokens.dtype), tuple(shape))
    body = gather_tokens.function(opset)
    return one_node_model(gather_tokens.NAME, body, opset, case.inputs, output, case.attributes | PLUGIN)


def linear_model(case: linear.Case, opset: int, form: str) -> ModelProto:
    """`form` generic or exact. Missing inputs in between are there as empty names, those at the end are left out."""
    given = {"zeros": case.zeros is not None, "bias": case.bias is not None}
    body = linear.function(opset) if form == "generic" else linear.body(opset, **given)
    names = ["x", "qweight", "scales", *["zeros" if given["zeros"] else ""] * any(given.values())]
    names += ["bias"] * given["bias"]
    if form == "generic":
        names += [""] * (5 - len(names))  # onnx's evaluator counts the inputs
    output = ("y", helper.np_dtype_to_tensor_dtype(case.x.dtype), (len(case.x), len(case.qweight)))
    return one_node_model(linear.NAME, body, opset, case.inputs, output, case.attributes | PLUGIN, names)


def run_onnxruntime(model: ModelProto, inputs: dict[str, Any], *, optimised: bool = True, threads: int = 1) -> Any:
    """First output in ONNX Runtime; also takes and gives types that numpy does not know itself.

    Examples that differ in their numbers alone are one model, which is opened once.
    """
    return run_session(_opened(model.SerializeToString(), optimised, threads), inputs)


def session_of(model: ModelProto, *, optimised: bool = True, threads: int = 1) -> onnxruntime.InferenceSession:
    """A session of its own, which says again what it has to say of the model."""
    return _opened.__wrapped__(model.SerializeToString(), optimised, threads)


@functools.lru_cache(maxsize=128)
def _opened(model: bytes, optimised: bool, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options)


def run_session(session: onnxruntime.InferenceSession, inputs: dict[str, Any]) -> Any:
    brain = {name: array for name, array in inputs.items() if array.dtype.name == "bfloat16"}
    if not brain:
        return session.run(None, inputs)[0]
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), TensorProto.BFLOAT16)
        if name in brain
        else onnxruntime.OrtValue.ortvalue_from_numpy(array)
        for name, array in inputs.items()
    }
    return session.run_with_ort_values(None, values)[0]


def run_evaluator(model: ModelProto, inputs: dict[str, Any]) -> Any:
    """First output in onnx's own reference evaluator."""
    with np.errstate(invalid="ignore"):  # its Attention subtracts infinities
        return _evaluator(model.SerializeToString()).run(None, inputs)[0]


@functools.lru_cache(maxsize=128)
def _evaluator(model: bytes) -> ReferenceEvaluator:
    return ReferenceEvaluator(ModelProto.FromString(model))


def check(model: ModelProto) -> None:
    _check(model.SerializeToString())


@functools.lru_cache(maxsize=512)
def _check(model: bytes) -> None:
    onnx.checker.check_model(ModelProto.FromString(model), full_check=True)
