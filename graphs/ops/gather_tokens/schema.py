"""What BtpGatherTokens takes and gives: the ONNX schema, and the check of its attributes and sizes."""

from typing import Any, Final

from onnx import TypeProto, defs, helper

from graphs.ops.domain import DOMAIN, PLUGIN, VERSION
from graphs.records.errors import InputError

NAME: Final = "BtpGatherTokens"

DOC: Final = """\
Keeps, of the `count` rows from `start` on (the image tokens), only those that `indices` names: the output is rows
[0,start), then rows start+indices, then rows [start+count,S). Every index must be in [0,count); the portable body does
not check that, the runtime's own gather does or does not.
"""

_TYPES: Final = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]
_Parameter, _Attribute = defs.OpSchema.FormalParameter, defs.OpSchema.Attribute


def _infer(context: Any) -> None:
    """[B,S-count+k,...] with the type of tokens, as far as sizes are known."""
    tokens, indices = context.get_input_type(0), context.get_input_type(1)
    if tokens is None:
        return
    output = TypeProto()
    output.CopyFrom(tokens)
    if tokens.tensor_type.HasField("shape") and len(tokens.tensor_type.shape.dim) > 1:
        rows = output.tensor_type.shape.dim[1]
        kept = indices.tensor_type.shape.dim if indices is not None else []
        if rows.HasField("dim_value") and len(kept) == 2 and kept[1].HasField("dim_value"):
            rows.dim_value += kept[1].dim_value - context.get_attribute("count").i
        else:
            rows.Clear()
    context.set_output_type(0, output)


def _schema() -> defs.OpSchema:
    integer = defs.OpSchema.AttrType.INT
    schema = defs.OpSchema(
        NAME,
        DOMAIN,
        VERSION,
        doc=DOC,
        inputs=[
            _Parameter("tokens", "T", "[B,S,...] with any further dimensions"),
            _Parameter("indices", "tensor(int32)", "[B,k] of the kept rows, counted from start"),
        ],
        outputs=[_Parameter("kept", "T", "[B,S-count+k,...]")],
        type_constraints=[("T", _TYPES, "any float type")],
        attributes=[
            _Attribute("start", integer, "first image row", required=True),
            _Attribute("count", integer, "number of image rows", required=True),
            *(_Attribute(name, helper.make_attribute(name, value), doc) for name, (value, doc) in PLUGIN.items()),
        ],
    )
    schema.set_type_and_shape_inference_function(_infer)
    return schema


SCHEMA: Final = _schema()


def check(rows: int, kept: int, *, start: int, count: int) -> None:
    """Raise InputError if S = `rows` have no rows [start,start+count) to take k = `kept` from."""

    def require(holds: bool, got: str, wanted: str, do: str) -> None:
        if not holds:
            raise InputError(f"{NAME}: {got}", wanted, do)

    require(0 <= start <= rows, f"start is {start}", f"0 to {rows}, the number of rows", "change start")
    left = rows - start
    require(0 <= count <= left, f"count is {count}", f"0 to {left}, the rows from start on", "change count")
    require(kept == 0 or count > 0, f"{kept} indices into no rows", "no indices, because count is 0", "change count")
