"""Products on a CPU by btp_ort with weights as they are stored, on processors with AVX512-VNNI.

ONNX Runtime's MatMulNBits packs four-bit codes anew in every session, and keeps their scales in float32. BtpLinearInt8
reads codes and scales mapped from the file, so a session opens without packing and all share the same pages.

Weights of float16 are cast to float32 while a session opens, and then packed; by ONNX Runtime too, which multiplies in
float32 on a CPU, where the whole graph is float16. A product with few rows, as a new token and the output projection
have them, takes the time in which its weights are read: BtpLinearHalf reads the file's.

    BtpLinear(x [M,K], qweight, scales, zeros, bias), group -> BtpLinearInt8 of the same, scales not cast
    Gemm(x [M,K], w [N,K] float16 or a cast of it), transB -> BtpLinearHalf(x, w), M up to FEW

x is float32 or float16. bfloat16, for which ONNX Runtime has few nodes on a CPU, stays.
"""

from typing import Final

import onnx
from onnx import NodeProto, TensorProto, helper

from engines.runners.on_cpu.rewriting import TAKEN, Rewriting
from graphs.ops.domain import DOMAIN

LINEAR: Final = "BtpLinear"
INT8: Final = "BtpLinearInt8"  # graphs/ops/linear/ort_op.cc
HALF: Final = "BtpLinearHalf"
BLOCK, COLUMNS = 128, 4  # K and N are multiples of them: cpu_int8.h
FEW: Final = 16  # rows


def may_have(serialized: bytes, *, halves: bool, int8: bool) -> bool:
    """Whether a model's bytes may hold what `for_cpu` replaces. Reads no protobuf."""
    return (int8 and LINEAR.encode() in serialized) or (halves and b"Gemm" in serialized)


def for_cpu(model: onnx.ModelProto, *, halves: bool = False, int8: bool = False) -> None:
    """Replace products whose types and sizes fit; others stay."""
    graph = _Graph(model)
    replaced: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        if int8 and graph.is_packed(node):
            replaced[node.output[0]] = [graph.packed(node)]
        elif halves and graph.is_half(node):
            replaced[node.output[0]] = [graph.half(node)]
    if replaced:
        graph.put(replaced)


class _Graph(Rewriting):
    """The products of a model."""

    def is_packed(self, node: NodeProto) -> bool:
        """Four-bit weights and rows of a type, with as many columns and outputs, as the operator takes."""
        if node.op_type != LINEAR or node.domain != DOMAIN or self.types.get(node.input[0]) not in TAKEN:
            return False
        columns, groups, half = self.shapes.get(node.input[1], (0, 0, 0))
        inputs = groups * half * 2
        fits = inputs > 0 and columns > 0 and columns % COLUMNS == 0 and inputs % max(BLOCK, 2 * half) == 0
        return fits and self.types.get(self._as_stored(node.input[2])) in TAKEN

    def packed(self, node: NodeProto) -> NodeProto:
        """The node for four-bit weights."""
        inputs = list(node.input)
        inputs[2] = self._as_stored(inputs[2])
        (group,) = (attribute.i for attribute in node.attribute if attribute.name == "group")
        return helper.make_node(INT8, inputs, list(node.output), name=node.name, domain=DOMAIN, group=group)

    def is_half(self, node: NodeProto) -> bool:
        """Few rows with the rows of a matrix that is stored in float16, without a bias."""
        turned = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type != "Gemm" or node.domain or len(node.input) != 2 or turned != {"transB": 1}:
            return False
        rows, weight = self.shapes.get(node.input[0], ()), self._as_stored(node.input[1])
        narrow = self.types.get(weight) == TensorProto.FLOAT16 and len(self.shapes.get(weight, ())) == 2
        return narrow and len(rows) == 2 and 0 < rows[0] <= FEW and self.types[node.input[0]] in TAKEN

    def half(self, node: NodeProto) -> NodeProto:
        """The node for weights of float16."""
        inputs = [node.input[0], self._as_stored(node.input[1])]
        return helper.make_node(HALF, inputs, list(node.output), name=node.name, domain=DOMAIN)

    def _as_stored(self, name: str) -> str:
        """What is cast from a float16 tensor of the file; the tensor itself where it is not."""
        cast = self.producers.get(name)
        narrow = cast is not None and cast.op_type == "Cast" and self.types.get(cast.input[0]) == TensorProto.FLOAT16
        return str(cast.input[0]) if cast is not None and narrow else name
