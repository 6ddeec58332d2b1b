"""Products with float32 weights on a CPU by btp_ort with the weights as they are stored, on processors with AVX-512.

ONNX Runtime packs the weights of a product when a session opens: a copy in each session. BtpLinearFloat reads the pages
of the file, which all sessions share, and is faster where rows are few, so that reading takes the time, and where they
are many and share the work of laying weights out (docs/decisions/products-on-a-cpu.md has the times).

    Gemm(x [M,K], w [N,K]), transB -> BtpLinearFloat(x, w), M up to FEW or from MANY on, N K from LARGE on
"""

from typing import Final

import onnx
from onnx import NodeProto, TensorProto, helper

from engines.runners.on_cpu.rewriting import Rewriting
from graphs.ops.domain import DOMAIN

FLOAT: Final = "BtpLinearFloat"  # graphs/ops/linear/cpu.cc
PLACES, COLUMNS = 16, 32  # K and N are multiples of them
FEW, MANY = 8, 64  # rows; with a number between, what is packed already is as fast or faster
LARGE: Final = 2**20  # weights; fewer stay in the cache, packed, and ONNX Runtime's product is as fast as the processor


def may_have(serialized: bytes) -> bool:
    """Whether a model's bytes may hold what `for_cpu` replaces. Reads no protobuf."""
    return b"Gemm" in serialized


def for_cpu(model: onnx.ModelProto) -> None:
    """Replace products whose sizes fit; others stay."""
    graph = _Graph(model)
    replaced = {node.output[0]: [graph.replacement(node)] for node in model.graph.node if graph.is_replaced(node)}
    if replaced:
        graph.put(replaced)


class _Graph(Rewriting):
    """The products of a model."""

    def is_replaced(self, node: NodeProto) -> bool:
        """Few or many rows of float32 with the rows of a large stored matrix of float32, without a bias."""
        settings = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type != "Gemm" or node.domain or len(node.input) != 2 or settings != {"transB": 1}:
            return False
        rows, weight = self.shapes.get(node.input[0], ()), self.stored.get(node.input[1])
        if weight is None or weight.data_type != TensorProto.FLOAT or len(rows) != 2:
            return False
        outputs, inputs = map(int, weight.dims)
        fits = outputs % COLUMNS == 0 and inputs % PLACES == 0
        return fits and outputs * inputs >= LARGE and (0 < rows[0] <= FEW or rows[0] >= MANY)

    def replacement(self, node: NodeProto) -> NodeProto:
        """The node that reads the weights as they are stored."""
        return helper.make_node(FLOAT, list(node.input), list(node.output), name=node.name, domain=DOMAIN)
