"""BtpLinear as ONNX Runtime's own MatMulNBits, which reads the same bytes: fast without any native library.

It takes the place of the node when a session is prepared, not of the function's body: MatMulNBits wants N and K as
attributes, which a body that serves every node cannot know, and its `accuracy_level` is a session's matter.

1: x stays float32 (error 1e-7 of a row's norm), to verify with; 4: x is rounded to int8 in blocks (error some 1e-3), to
run with. On the CPU x of float16 is multiplied with weights that are not rounded to float16 first, so it is closer to
(q - z) s than the reference is; for bfloat16, which has no kernel there, x and scales are cast to float32.
docs/decisions/four-bit-in-onnxruntime.md has the measurements.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from onnx import NodeProto, TensorProto, helper

from graphs.ops.linear.schema import INTEGERS, NAME, check
from graphs.records.errors import InputError

OPERATOR: Final = NAME
MICROSOFT: Final = ("com.microsoft", 1)
ACCURACY_LEVELS: Final = (1, 4)


def nodes(
    node: NodeProto, shapes: Mapping[str, Sequence[int]], types: Mapping[str, int], level: int
) -> list[NodeProto]:
    """What stands for a node: one MatMulNBits, for bfloat16 with casts around it.

    shapes, types: of the graph's inputs and initialisers, by name. Raises InputError for shapes that do not fit or are
    not known.
    """
    if level not in ACCURACY_LEVELS:
        raise InputError(f"accuracy level {level}", "1 (x in float32) or 4 (x in int8)", "choose one of them")
    x, qweight, scales, zeros, bias = (*node.input, "", "")[:5]
    attributes = {a.name: a.i for a in node.attribute if a.name in INTEGERS}
    if len(shapes.get(qweight, ())) != 3:
        got = f"{NAME}: {qweight} has shape {list(shapes.get(qweight, ()))}"
        raise InputError(got, "[N,K/group,group/2], known before the graph runs", "export the graph again")
    n, groups, _ = shapes[qweight]
    k = groups * attributes["group"]
    given = [shapes.get(name) if name else None for name in (zeros, bias)]
    check((1, k), shapes[qweight], shapes.get(scales, ()), *given, **attributes)
    before: list[NodeProto] = []
    y = node.output[0]
    if types.get(scales) == TensorProto.BFLOAT16:
        y = f"{node.output[0]}/float32"
        x, scales, bias = (_cast(before, name, node.output[0]) for name in (x, scales, bias))
    inputs = [x, qweight, scales, zeros, "", bias]
    while not inputs[-1]:
        inputs.pop()
    product = helper.make_node(
        "MatMulNBits",
        inputs,
        [y],
        name=node.name,
        domain=MICROSOFT[0],
        N=n,
        K=k,
        bits=attributes["bits"],
        block_size=attributes["group"],
        accuracy_level=level,
    )
    if not before:
        return [product]
    return [*before, product, helper.make_node("Cast", [y], list(node.output), to=TensorProto.BFLOAT16)]


def _cast(before: list[NodeProto], name: str, prefix: str) -> str:
    """The value in float32, by a node that is added to `before`; "" stays what it is."""
    if not name:
        return name
    cast = f"{prefix}/{name}/float32"
    before.append(helper.make_node("Cast", [name], [cast], to=TensorProto.FLOAT))
    return cast
