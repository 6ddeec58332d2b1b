"""What BtpLinear takes and gives: the ONNX schema, and the check of its attributes and shapes."""

from collections.abc import Sequence
from typing import Any, Final

from onnx import TypeProto, defs, helper

from graphs.ops.domain import DOMAIN, PLUGIN, VERSION
from graphs.packing import BITS, check_group, qweight_shape, zeros_shape
from graphs.records.errors import InputError

NAME: Final = "BtpLinear"

DOC: Final = """\
A projection whose weights have four bits: y = x w^T + bias, accumulated in float32.

w [N,K] = (q - z) * s, rounded once to the type of x. q are the unsigned codes, z and s one zero point and one scale for
each `group` of neighbouring codes of a row; z is 8 where there are no zeros. Codes lie two in a byte along K, the
earlier one in the low nibble, zeros likewise along the groups (the last high nibble is unused if their number is odd).
These are the bytes of ONNX Runtime's MatMulNBits. Graphs prepared for TensorRT declare the same bytes as little-endian
int32: qweight [N,K/8], zeros [ceil(N * ceil(K/group/2) / 4)], row after row without a gap (`graphs/packing.py`).
"""

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
    if bits != BITS:
        raise InputError(f"{NAME}: bits is {bits}", f"{BITS}", "quantise the weights to four bits")

    def require(name: str, shape: Sequence[int] | None, wanted: Sequence[int]) -> None:
        if shape is not None and list(shape) != list(wanted):
            got = f"{NAME}: {name} has shape {list(shape)}"
            raise InputError(got, f"{list(wanted)}", f"pack {name} for the same N, K and group as the others")

    if len(x) != 2:
        raise InputError(f"{NAME}: x has shape {list(x)}", "[M,K]", "reshape x")
    try:
        check_group(x[1], group)
    except InputError as error:
        raise InputError(f"{NAME}: {error.got}", error.wanted, error.do) from error
    if len(qweight) != 3 or qweight[0] < 1:
        got = f"{NAME}: qweight has shape {list(qweight)}"
        raise InputError(got, "[N,K/group,group/2]", "pack it: graphs.packing.pack")
    n, k = qweight[0], x[1]
    require("qweight", qweight, qweight_shape(n, k, group))
    require("scales", scales, (n, k // group))
    require("zeros", zeros, zeros_shape(n, k // group))
    require("bias", bias, (n,))
