"""Products of float16 operands summed up in float32: what TensorRT is asked for by casts around them.

A strongly typed network fixes the types of a product's operands and result, not the type in which it adds up. float16
sums of thousands of terms (11,008 in a 7B's down projection) lose what verification would miss. Casts to float32
before and to float16 behind the product ask for float32; TensorRT takes the casts into the product's own kernel, so
that the weights stay float16 in memory (seen in the layer information of TensorRT for RTX 1.7.1, for weights that are
constants and for weights that are inputs, at 1 and at 40 rows; reported of TensorRT: pytorch/TensorRT#3110,
NVIDIA/TensorRT#4674). build/layer_checks.py says where it does not.

Only projections are changed, not the products inside attention, whose fused kernels are recognised by their form.
"""

from collections.abc import Collection

import onnx_ir as ir

from engines.tensorrt.records import BEFORE, BEHIND
from graphs.building.graph_builder import dtype_of


def accumulate_in_float32(model: ir.Model, weights: Collection[str]) -> None:
    """Put casts around every float16 product with stored weights or with one of the inputs `weights`."""
    graph = model.graph
    for node in list(graph):
        if not node.domain and node.op_type in ("Gemm", "MatMul") and _is_projection(node, weights):
            _widen(graph, node)


def is_widening(node: ir.Node) -> bool:
    """Whether the node is a cast that was put before a product here."""
    return node.op_type == "Cast" and BEFORE in str(node.name)


def is_narrowing(node: ir.Node) -> bool:
    """Whether the node is the cast that was put behind a product here."""
    return node.op_type == "Cast" and str(node.name).endswith(BEHIND)


def _is_projection(node: ir.Node, weights: Collection[str]) -> bool:
    """float16, and the second factor is a weight: stored, an input of `weights`, or one of these transposed or cast."""
    weight = node.inputs[1]
    while weight is not None and (producer := weight.producer()) is not None:
        if producer.op_type not in ("Cast", "Transpose", "Reshape"):
            return False
        weight = producer.inputs[0]
    stored = weight is not None and (weight.is_initializer() or weight.name in weights)
    return stored and dtype_of(node.outputs[0]) == ir.DataType.FLOAT16


def _widen(graph: ir.Graph, node: ir.Node) -> None:
    before = []
    for number, value in enumerate(node.inputs):
        if value is not None:
            cast = _cast(value, ir.DataType.FLOAT, f"{node.name}{BEFORE}.{number}")
            node.replace_input_with(number, cast.outputs[0])
            before.append(cast)
    graph.insert_before(node, before)
    result = node.outputs[0]
    wide = ir.Value(name=f"{node.name}{BEFORE}", shape=result.shape, type=ir.TensorType(ir.DataType.FLOAT))
    behind = _cast(wide, ir.DataType.FLOAT16, f"{node.name}{BEHIND}")
    attributes = list(node.attributes.values())
    product = ir.Node(node.domain, node.op_type, node.inputs, attributes, outputs=[wide], name=node.name)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [product, behind], [result], [behind.outputs[0]])


def _cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    output = ir.Value(name=name, shape=value.shape, type=ir.TensorType(to))
    return ir.Node("", "Cast", [value], [ir.AttrInt64("to", to.value)], outputs=[output], name=name)
