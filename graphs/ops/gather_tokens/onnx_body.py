"""BtpGatherTokens as an ONNX function: one table of row numbers, one gather, any rank, every batch row for itself."""

from typing import Final

from onnx import FunctionProto, parser

from graphs.ops.domain import DOMAIN
from graphs.ops.gather_tokens.schema import DOC, NAME
from graphs.records.errors import InputError

FIRST_OPSET: Final = 18

_TEXT: Final = """
  start = Constant<value_int: int = @start>()
  count = Constant<value_int: int = @count>()
  zero = Constant<value_int = 0>()
  one = Constant<value_int = 1>()
  axis0 = Constant<value_ints = [0]>()
  axis2 = Constant<value_ints = [2]>()
  # Row numbers [B,S-count+k]: before the image, the kept ones of the image, after the image.
  batch = Shape<start = 0, end = 1>(tokens)
  size = Shape<start = 1, end = 2>(tokens)
  rows = Squeeze(size)
  stop = Add(start, count)
  before = Range(zero, start, one)
  after = Range(stop, rows, one)
  before_row = Unsqueeze(before, axis0)
  after_row = Unsqueeze(after, axis0)
  one_size = Constant<value_ints = [1]>()
  every_row = Concat<axis = 0>(batch, one_size)
  before_rows = Expand(before_row, every_row)                     # [B,start]
  after_rows = Expand(after_row, every_row)                       # [B,S-stop]
  indices64 = Cast<to = 7>(indices)
  image_rows = Add(indices64, start)
  table = Concat<axis = 1>(before_rows, image_rows, after_rows)
  positions = Unsqueeze(table, axis2)                             # [B,S-count+k,1]
  kept = GatherND<batch_dims = 1>(tokens, positions)
"""


def body(opset: int) -> FunctionProto:
    """The body; TensorRT can import it. An index outside [0,count) reads another row or fails, as the runtime likes."""
    if opset < FIRST_OPSET:
        raise InputError(f"{NAME}: opset {opset}", f"opset {FIRST_OPSET} or later", "convert the model")
    header = f'<opset_import: ["" : {opset}], domain: "{DOMAIN}"> {NAME} <start, count>'
    proto = parser.parse_function(f"{header} (tokens, indices) => (kept) {{{_TEXT}}}")
    proto.doc_string = DOC
    return proto


def function(opset: int) -> FunctionProto:
    """The one body for every node of this operator."""
    return body(opset)
