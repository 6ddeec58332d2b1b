"""What BtpLinear takes and gives: the ONNX schema, and the check of its attributes and shapes."""

from collections.abc import Sequence
from typing import Any, Final

from onnx import TypeProto, defs, helper

from graphs.ops.domain import DOMAIN, PLUGIN, VERSION
from graphs.records.errors import InputError

NAME: Final = "BtpLinear"

DOC: Final = """\
A projection whose weights have four bits: y = x w^T + bias, accumulated in float32.

w [N,K] = (q - z) * s, rounded once to the type of x. q are the unsigned codes, z and s one zero point and one scale for
each `group` of neighbouring codes of a row; z is 8 where there are no zeros. Codes lie two in a byte along K, the
earlier one in the low nibble, zeros likewise along the groups (the last high nibble is unused if their number is odd).
These are the bytes of ONNX Runtime's MatMulNBits. Graphs prepared for TensorRT declare the same bytes as little-endian
int32: qweight [N,K/8], zeros [ceil(N * ceil(K/group/2) / 4)], row after row without a gap (`packing.py`).
"""

BITS: Final = 4
GROUPS: Final = (16, 32, 64, 128, 256)
INTEGERS: Final = {"bits": "bits of a code: 4", "group": "codes of a row that share a scale: 16, 32, 64, 128 or 256"}

_TYPES: Final = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_Parameter, _Attribute = defs.OpSchema.FormalParameter, defs.OpSchema.Attribute
_OPTIONAL: Final = defs.OpSchema.FormalParameterOption.Optional


def _infer(context: Any) -> None:
    """y [M,N] of x's type, as far as sizes are known."""
    x, qweight = context.get_input_type(0), context.get_input_type(1)
    if x is None:
        return
    output = TypeProto()
    output.tensor_type.elem_type = x.tensor_type.elem_type
    for source in (x, qweight):
        size = output.tensor_type.shape.dim.add()
        if source is not None and source.tensor_type.HasField("shape") and source.tensor_type.shape.dim:
            size.CopyFrom(source.tensor_type.shape.dim[0])
    context.set_output_type(0, output)


def _schema() -> defs.OpSchema:
    schema = defs.OpSchema(
        NAME,
        DOMAIN,
        VERSION,
        doc=DOC,
        inputs=[
            _Parameter("x", "T", "[M,K] rows"),
            _Parameter("qweight", "tensor(uint8)", "[N,K/group,group*bits/8] packed codes"),
            _Parameter("scales", "T", "[N,K/group]"),
            _Parameter("zeros", "tensor(uint8)", "[N,ceil(K/group*bits/8)] packed zeros", param_option=_OPTIONAL),
            _Parameter("bias", "T", "[N]", param_option=_OPTIONAL),
        ],
        outputs=[_Parameter("y", "T", "[M,N]")],
        type_constraints=[("T", _TYPES, "float types")],
        attributes=[
            *(_Attribute(name, defs.OpSchema.AttrType.INT, doc, required=True) for name, doc in INTEGERS.items()),
            *(_Attribute(name, helper.make_attribute(name, value), doc) for name, (value, doc) in PLUGIN.items()),
        ],
    )
    schema.set_type_and_shape_inference_function(_infer)
    return schema


SCHEMA: Final = _schema()


def qweight_shape(n: int, k: int, group: int) -> tuple[int, int, int]:
    """Bytes of the codes of w [N,K]: [N,K/group,group/2]."""
    return n, k // group, group * BITS // 8


def zeros_shape(n: int, groups: int) -> tuple[int, int]:
    """Bytes of the zeros of `groups` groups a row: [N,ceil(groups/2)]."""
    return n, (groups * BITS + 7) // 8


def check_attributes(*, bits: int, group: int) -> None:
    """Raise InputError for attributes that fit no weight."""
    if bits != BITS:
        raise InputError(f"{NAME}: bits is {bits}", f"{BITS}", "quantise the weights to four bits")
    if group not in GROUPS:
        wanted = "16, 32, 64, 128 or 256 (a scale for a whole row is written out in groups)"
        raise InputError(f"{NAME}: group is {group}", wanted, "quantise the weights in groups of one of these sizes")


def check_group(k: int, *, bits: int, group: int) -> None:
    """Raise InputError unless rows of K = `k` weights can be stored with these attributes."""
    check_attributes(bits=bits, group=group)
    if k < 1 or k % group:
        got = f"{NAME}: group is {group} and K is {k}"
        raise InputError(got, "a group that divides K", "quantise the weights in smaller groups")


def check(
    x: Sequence[int],
    qweight: Sequence[int],
    scales: Sequence[int],
    zeros: Sequence[int] | None = None,
    bias: Sequence[int] | None = None,
    *,
    bits: int,
    group: int,
) -> None:
    """Raise InputError unless these are the shapes of one product; the message names the first that does not fit."""
    check_attributes(bits=bits, group=group)

    def require(name: str, shape: Sequence[int] | None, wanted: Sequence[int]) -> None:
        if shape is not None and list(shape) != list(wanted):
            got = f"{NAME}: {name} has shape {list(shape)}"
            raise InputError(got, f"{list(wanted)}", f"pack {name} for the same N, K and group as the others")

    if len(x) != 2:
        raise InputError(f"{NAME}: x has shape {list(x)}", "[M,K]", "reshape x")
    check_group(x[1], bits=bits, group=group)
    if len(qweight) != 3 or qweight[0] < 1:
        raise InputError(f"{NAME}: qweight has shape {list(qweight)}", "[N,K/group,group/2]", "pack it: packing.pack")
    n, k = qweight[0], x[1]
    require("qweight", qweight, qweight_shape(n, k, group))
    require("scales", scales, (n, k // group))
    require("zeros", zeros, zeros_shape(n, k // group))
    require("bias", bias, (n,))
