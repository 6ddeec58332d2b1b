"""BtpLinear as an ONNX function: what a runtime that knows neither the operator nor MatMulNBits runs instead.

It unpacks the codes to float32 and multiplies: right everywhere, and as slow as it looks. A byte is split by
arithmetic, not by BitShift and BitwiseAnd, because TensorRT imports neither; numbers up to 255 and their sixteenths are
exact in float32, and so is (q - z) s for 16-bit scales.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from onnx import FunctionProto, parser

from graphs.ops.domain import DOMAIN
from graphs.ops.linear.schema import DOC, INTEGERS, NAME
from graphs.records.errors import InputError

FIRST_OPSET: Final = 18

_CODES: Final = """
  axis0 = Constant<value_ints = [0]>()
  axis1 = Constant<value_ints = [1]>()
  axis2 = Constant<value_ints = [2]>()
  axis3 = Constant<value_ints = [3]>()
  sixteenth = Constant<value_float = 0.0625>()
  sixteen = Constant<value_float = 16.0>()
  bytes = Cast<to = 1>(qweight)                                   # [N,G,group/2]
  bytes_shifted = Mul(bytes, sixteenth)
  high = Floor(bytes_shifted)
  high_part = Mul(high, sixteen)
  low = Sub(bytes, high_part)
  low_column = Unsqueeze(low, axis3)
  high_column = Unsqueeze(high, axis3)
  pairs = Concat<axis = 3>(low_column, high_column)               # [N,G,group/2,2]
  as_matrix = Constant<value_ints = [0, -1]>()
  as_codes = Constant<value_ints = [0, 0, -1]>()
  codes = Reshape(pairs, as_codes)                                # [N,G,group]
"""

_ZEROS: Final = """
  zero_bytes = Cast<to = 1>({packed})                             # [N,ceil(G/2)]
  zero_bytes_shifted = Mul(zero_bytes, sixteenth)
  zero_high = Floor(zero_bytes_shifted)
  zero_high_part = Mul(zero_high, sixteen)
  zero_low = Sub(zero_bytes, zero_high_part)
  zero_low_column = Unsqueeze(zero_low, axis2)
  zero_high_column = Unsqueeze(zero_high, axis2)
  zero_pairs = Concat<axis = 2>(zero_low_column, zero_high_column)
  all_zeros = Reshape(zero_pairs, as_matrix)
  groups = Shape<start = 1, end = 2>(scales)
  zeros_2d = Slice(all_zeros, axis0, groups, axis1)               # [N,G]: without the nibble that fills the last byte
  {points} = Unsqueeze(zeros_2d, axis2)
"""

_MIDDLE: Final = "  {points} = Constant<value = float[1,1,1] {{8.0}}>()\n"

_PRODUCT: Final = """
  from_zero = Sub(codes, points)
  scales32 = Cast<to = 1>(scales)
  scale = Unsqueeze(scales32, axis2)
  scaled = Mul(from_zero, scale)
  exact = Reshape(scaled, as_matrix)                              # [N,K]
  w = CastLike(exact, x)                                          # the one rounding
  w32 = Cast<to = 1>(w)
  w_columns = Transpose<perm = [1, 0]>(w32)
  x32 = Cast<to = 1>(x)
  product = MatMul(x32, w_columns)                                # float32 for every type of x
"""

_BIAS: Final = """
  bias32 = Cast<to = 1>({given})
  bias_row = Unsqueeze(bias32, axis0)
  {total} = Add(product, bias_row)
"""
_NO_BIAS: Final = "  {total} = Identity(product)\n"
_RESULT: Final = "  y = CastLike(total, x)\n"

# A missing input may stand behind a Concat's first one, which gives the type: optional-inputs-in-function-bodies.md.
_EITHER_ZEROS: Final = f"""
  has_zeros = OptionalHasElement(zeros)
  points = If(has_zeros)
    <then_branch = with_zeros () => (given_points) {{
       one_zero = Constant<value = uint8[1,1] {{0}}>()
       no_zeros = Slice(one_zero, axis0, axis0, axis1)            # [1,0]
       rows = Shape<start = 0, end = 1>(scales)
       no_columns = Concat<axis = 0>(rows, axis0)
       none = Expand(no_zeros, no_columns)                        # [N,0]
       packed = Concat<axis = 1>(none, zeros)
       {_ZEROS.format(packed="packed", points="given_points")} }},
     else_branch = without_zeros () => (middle) {{ {_MIDDLE.format(points="middle")} }}>
"""
# Gemm may go without its last input. (OptionalHasElement takes no bfloat16.)
_EITHER_BIAS: Final = f"""
  rows_of_w = Shape<start = 0, end = 1>(scales)
  one_column = Concat<axis = 0>(rows_of_w, axis1)
  nothing32 = ConstantOfShape<value = float[1] {{0.0}}>(one_column)
  one32 = Constant<value = float[1,1] {{0.0}}>()
  nothing = CastLike(nothing32, x)                                # [N,1]
  one = CastLike(one32, x)
  given_or_zero = Gemm<transB = 1>(one, nothing, bias)            # [1,N]
  bias_1d = Squeeze(given_or_zero, axis0)
  {_BIAS.format(given="bias_1d", total="total")}
"""


def body(opset: int, *, zeros: bool, bias: bool) -> FunctionProto:
    """The body for nodes with exactly these inputs beside x, qweight and scales; TensorRT can import it.

    A node with a bias and without zeros names the missing input as "".
    """
    inputs = ["x", "qweight", "scales", *["zeros"] * (zeros or bias), *["bias"] * bias]
    points = _ZEROS.format(packed="zeros", points="points") if zeros else _MIDDLE.format(points="points")
    total = _BIAS.format(given="bias", total="total") if bias else _NO_BIAS.format(total="total")
    return _function(opset, inputs, _CODES + points + _PRODUCT + total + _RESULT)


@dataclass(frozen=True)
class Form:
    """What an exact body is made for; `suffix` tells forms apart in names."""

    zeros: bool
    bias: bool

    @property
    def suffix(self) -> str:
        return "Zeros" * self.zeros + "Bias" * self.bias

    def body(self, opset: int) -> FunctionProto:
        return body(opset, zeros=self.zeros, bias=self.bias)


def form(inputs: Sequence[bool], attributes: Mapping[str, Any]) -> Form:
    """The form of nodes with these inputs (is each there?); no attribute changes it."""
    zeros, bias = (*inputs[3:], False, False)[:2]
    return Form(zeros, bias)


def function(opset: int) -> FunctionProto:
    """The one body for nodes with any of the inputs; it asks for zeros with OptionalHasElement, which TensorRT lacks.

    Its Gemm in x's type has no bfloat16 kernel in ONNX Runtime on the CPU: nodes of that type need `body` there.
    """
    inputs = ["x", "qweight", "scales", "zeros", "bias"]
    return _function(opset, inputs, _CODES + _EITHER_ZEROS + _PRODUCT + _EITHER_BIAS + _RESULT)


def _function(opset: int, inputs: list[str], text: str) -> FunctionProto:
    if opset < FIRST_OPSET:
        raise InputError(f"{NAME}: opset {opset}", f"opset {FIRST_OPSET} or later", "convert the model")
    header = f'<opset_import: ["" : {opset}], domain: "{DOMAIN}"> {NAME} <{", ".join(INTEGERS)}>'
    proto = parser.parse_function(f"{header} ({', '.join(inputs)}) => (y) {{\n{text}}}")
    proto.doc_string = DOC
    return proto


def scratch_bytes(shapes: Sequence[Sequence[int]]) -> int:
    """Memory of a body beside its inputs: w in float32, up to three times (unpacked, scaled, transposed)."""
    (_, k), (n, *_) = shapes[:2]
    return 3 * 4 * n * k
