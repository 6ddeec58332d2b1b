"""Four-bit products on a CPU by btp_ort, where x may be rounded to int8 and the processor has AVX512-VNNI.

ONNX Runtime's MatMulNBits packs its codes anew in every session, and keeps scales in float32. BtpLinearInt8 reads codes
and scales as they are stored, mapped from the file, so a session opens without packing and all share the same pages.

    BtpLinear(x [M,K] float32, qweight, scales, zeros, bias), group -> BtpLinearInt8 of the same, scales not cast
"""

from typing import Final

import onnx
from onnx import NodeProto, TensorProto, helper

from engines.runners.on_cpu.rewriting import Rewriting
from graphs.ops.domain import DOMAIN

LINEAR: Final = "BtpLinear"
INT8: Final = "BtpLinearInt8"  # graphs/ops/linear/ort_op.cc
BLOCK, COLUMNS = 128, 4  # K and N are multiples of them: cpu_int8.h
STORED: Final = (TensorProto.FLOAT, TensorProto.FLOAT16)  # types of scales


def may_have(serialized: bytes) -> bool:
    """Whether a model's bytes may hold what `for_cpu` replaces. Reads no protobuf."""
    return LINEAR.encode() in serialized


def for_cpu(model: onnx.ModelProto) -> None:
    """Replace products of float32 rows whose sizes fit; others stay."""
    graph = _Graph(model)
    replaced = {node.output[0]: [graph.replacement(node)] for node in model.graph.node if graph.is_replaced(node)}
    if replaced:
        graph.put(replaced)


class _Graph(Rewriting):
    """The four-bit products of a model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        for tensor in model.graph.initializer:
            self.shapes[tensor.name], self.types[tensor.name] = tuple(tensor.dims), tensor.data_type

    def is_replaced(self, node: NodeProto) -> bool:
        """One of float32 rows, with as many columns and outputs as the operator takes at once."""
        if node.op_type != LINEAR or node.domain != DOMAIN or self.types.get(node.input[0]) != TensorProto.FLOAT:
            return False
        columns, groups, half = self.shapes.get(node.input[1], (0, 0, 0))
        inputs = groups * half * 2
        fits = inputs > 0 and columns > 0 and columns % COLUMNS == 0 and inputs % max(BLOCK, 2 * half) == 0
        return fits and self.types.get(self._scales(node)) in STORED

    def replacement(self, node: NodeProto) -> NodeProto:
        """The node of btp_ort."""
        inputs = list(node.input)
        inputs[2] = self._scales(node)
        (group,) = (attribute.i for attribute in node.attribute if attribute.name == "group")
        return helper.make_node(INT8, inputs, list(node.output), name=node.name, domain=DOMAIN, group=group)

    def _scales(self, node: NodeProto) -> str:
        """The scales as they are stored: what is cast from float16 needs no copy in float32."""
        cast = self.producers.get(node.input[2])
        narrow = cast is not None and cast.op_type == "Cast" and self.types.get(cast.input[0]) == TensorProto.FLOAT16
        return str(cast.input[0]) if cast is not None and narrow else str(node.input[2])
