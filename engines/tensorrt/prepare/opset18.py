"""A captured vision graph in primitives: for TensorRT versions that do not know the fused operators of opset 23.

The decoder graphs are built anew for an operator set; the vision graph was captured by torch and cannot be here, so
its few fused nodes are replaced, each by what graphs/ builds for the same thing in primitives.
"""

from collections.abc import Callable, Sequence

import onnx
import onnx_ir as ir

from graphs import dtypes
from graphs.building.attention import minus_infinity, softmax
from graphs.building.graph_builder import IR_VERSIONS, PORTABLE_OPSET, GraphBuilder, dims, dtype_of
from graphs.building.layers import activation
from graphs.records.errors import InputError

FLOAT = ir.DataType.FLOAT
Inputs = Sequence[ir.Value | None]


def lower_to_primitives(model: ir.Model) -> ir.Model:
    """A copy of a vision graph in opset 18; the model itself if it is in that opset already.

    Raises InputError for a node that has no form in primitives here.
    """
    if model.graph.opset_imports[""] <= PORTABLE_OPSET:
        return model
    lowered = ir.serde.deserialize_model(ir.serde.serialize_model(model))
    for node in list(lowered.graph):
        if node.op_type in EXPANSIONS:
            _expand(lowered.graph, node, EXPANSIONS[node.op_type])
    lowered.graph.opset_imports[""] = PORTABLE_OPSET
    lowered.ir_version = IR_VERSIONS[PORTABLE_OPSET]
    _require_opset(lowered)
    return lowered


def _expand(graph: ir.Graph, node: ir.Node, build: Callable[[GraphBuilder, ir.Node, Inputs], ir.Value]) -> None:
    """Replace the node by what `build` makes of its inputs; new names begin with the node's."""
    (output,) = node.outputs
    b = GraphBuilder(node.op_type, opset=PORTABLE_OPSET, precision=dtypes.BY_ONNX[dtype_of(output)].precision)
    outer = [value for value in node.inputs if value is not None]
    inner = iter([b.input(f"input_{n}", dims(value), dtype_of(value)) for n, value in enumerate(outer)])
    b.output(build(b, node, [value if value is None else next(inner) for value in node.inputs]), "result")
    part = b.build().model.graph
    for entry, given in zip(part.inputs, outer, strict=True):
        entry.replace_all_uses_with(given)
    (result,) = part.outputs
    nodes, constants = list(part), list(part.initializers.values())
    part.outputs.clear()
    part.initializers.clear()
    part.remove(nodes)
    for value in (*constants, *(value for inserted in nodes for value in inserted.outputs)):
        value.name = f"{output.name}.{value.name}"
    for value in constants:
        graph.register_initializer(value)
    for inserted in nodes:
        inserted.name = f"{output.name}.{inserted.name}"
    name, is_output = output.name, output.is_graph_output()
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [output], [result])
    if is_output:
        result.name = name


def _attention(b: GraphBuilder, node: ir.Node, inputs: Inputs) -> ir.Value:
    """query [B,H,S,D], key and value [B,H,N,D], mask [..,S,N] or none -> [B,H,S,D]; softmax in float32."""
    query, key, value, *rest = inputs
    mask = rest[0] if rest else None
    # What captured towers have: all heads alike, perhaps a mask. Decoders are built in opset 18, not lowered to it.
    plain = not any(given is not None for given in rest[1:]) and len(node.outputs) == 1
    plain = plain and not node.attributes.get_int("is_causal", 0) and not node.attributes.get_float("softcap", 0.0)
    if query is None or key is None or value is None or not plain or len(dims(query)) != 4 or _groups(query, key) != 1:
        raise _no_form(node)
    scale = node.attributes.get_float("scale", dims(query)[3] ** -0.5)
    scores = b.matmul(b.scaled(query, scale, "query"), b.transpose(key, (0, 1, 3, 2), "key"), "scores")
    if mask is not None and dtype_of(mask) == ir.DataType.BOOL:
        scores = b.where(mask, scores, minus_infinity(b, dtype_of(scores)), "scores_masked")
    elif mask is not None:
        scores = b.add(scores, mask, "scores_masked")
    return b.matmul(softmax(b, scores, "weights"), value, "context")


def _groups(query: ir.Value, key: ir.Value) -> int:
    return dims(query)[1] // dims(key)[1]


def _gelu(b: GraphBuilder, node: ir.Node, inputs: Inputs) -> ir.Value:
    (x,) = inputs
    assert x is not None
    approximate = node.attributes.get_string("approximate", "none")
    return activation(b, "gelu" if approximate == "none" else "gelu_pytorch_tanh", x)


def _rms_norm(b: GraphBuilder, node: ir.Node, inputs: Inputs) -> ir.Value:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, the division in float32."""
    x, scale = inputs
    assert x is not None and scale is not None
    if node.attributes.get_int("axis", -1) not in (-1, len(dims(x)) - 1):
        raise _no_form(node)
    wide = b.cast(x, FLOAT, "wide")
    mean = b.reduce("ReduceMean", b.mul(wide, wide, "square"), -1, "mean")
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    root = b.unary("Sqrt", b.add(mean, b.scalar("epsilon", epsilon, FLOAT), "shifted"), "root")
    return b.mul(b.cast(b.binary("Div", wide, root, "normal"), dtype_of(x), "narrow"), scale, "scaled")


EXPANSIONS = {"Attention": _attention, "Gelu": _gelu, "RMSNormalization": _rms_norm}


def _require_opset(model: ir.Model) -> None:
    """Raise InputError unless every node is one of opset 18."""
    for node in model.graph:
        try:
            schema = onnx.defs.get_schema(node.op_type, PORTABLE_OPSET, node.domain)
        except onnx.defs.SchemaError as error:
            raise _no_form(node) from error
        if any(name not in schema.attributes for name in node.attributes):
            raise _no_form(node)


def _no_form(node: ir.Node) -> InputError:
    return InputError(
        f"the vision graph's node {node.name} ({node.op_type}) has no form in opset {PORTABLE_OPSET}",
        wanted="a vision graph that this TensorRT version can import",
        do=f"export the bundle with --opset {PORTABLE_OPSET}",
    )
