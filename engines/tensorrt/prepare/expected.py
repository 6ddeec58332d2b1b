"""What a prepared graph is to become in an engine: build/layer_checks.py checks the layers for it after the build."""

import onnx_ir as ir

from engines.tensorrt.prepare.accumulate import is_narrowing, is_widening
from engines.tensorrt.prepare.attention import is_sum
from engines.tensorrt.prepare.prepared_graphs import PreparedGraph
from engines.tensorrt.records import BEHIND, SUMMED, Expected
from graphs.building.graph_builder import dtype_of


def expected(graph: PreparedGraph, scratch: int) -> Expected:
    """Who reads each weight input, which products are widened or summed, which attentions can be fused.

    `scratch`: bytes to compute in, as estimated.
    """
    readers: dict[str, list[str]] = {weight.name: [] for weight in graph.weight_inputs}
    attentions, sums, widened = [], [], []
    for node in graph.model.graph:
        for value in node.inputs:
            while value is not None and (producer := value.producer()) is not None and is_widening(producer):
                value = producer.inputs[0]
            if value is not None and value.name in readers:
                readers[str(value.name)].append(str(node.name))
        if node.op_type == "Attention" and dtype_of(node.outputs[0]) != ir.DataType.FLOAT:
            attentions.append(str(node.name))
        if is_sum(node):
            sums.append(str(node.name).removesuffix(SUMMED))
        if is_narrowing(node):
            widened.append(str(node.name).removesuffix(BEHIND))
    return Expected(
        weights={name: tuple(nodes) for name, nodes in readers.items()},
        widened=tuple(widened),
        attentions=tuple(attentions),
        sums=tuple(sums),
        scratch=scratch,
    )
