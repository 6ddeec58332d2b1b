"""BtpLinear for the Python form of the TensorRT plugin."""

from collections.abc import Sequence
from typing import ClassVar, Final

from graphs.ops.common.trt_python import Dimension, Launcher, Shape, Tensor
from graphs.ops.linear.schema import NAME
from graphs.packing import BITS, check_group
from graphs.records.errors import InputError

FLOATS = ("float32", "float16", "bfloat16")
# As in kernel.cu and tiles.cuh.
FEW_ROWS: Final = 8
STEP: Final = 128
TILE_ROWS: Final = 128
MOST_MULTIPROCESSORS: Final = 192


class Linear:
    """One product; `values` are bits and group. Raises InputError for values that never fit."""

    NAME: ClassVar[str] = NAME
    ATTRIBUTES: ClassVar[tuple[str, ...]] = ("bits", "group")
    OPTIONS: ClassVar[dict[str, int | str]] = {}
    INPUT_TYPES: ClassVar[tuple[tuple[str, ...], ...]] = (FLOATS, ("int32",), FLOATS, ("int32", *FLOATS), FLOATS)

    def __init__(self, *values: int | str) -> None:
        self.values = values
        self.bits, self.group = map(int, values)
        if self.bits != BITS:
            raise InputError(f"{NAME}: bits is {self.bits}", f"{BITS}", "export the graph again")
        self._check_columns(self.group)

    def output_shape(self, inputs: Sequence[Shape]) -> list[Dimension]:
        """[M,N], after the check of every input against the others. zeros and bias have one dimension each."""
        if not 3 <= len(inputs) <= 5:
            got = f"{NAME}: {len(inputs)} inputs"
            raise InputError(got, "x, qweight, scales, zeros, bias", "export the graph again")
        for name, shape, rank in zip(
            ("x", "qweight", "scales", "zeros", "bias"), inputs, (2, 2, 2, 1, 1), strict=False
        ):
            if len(shape) != rank:
                raise InputError(f"{NAME}: {name} has {len(shape)} dimensions", f"{rank}", "export the graph again")
        columns, rows = inputs[0][1], inputs[1][0]
        if columns is not None:
            self._check_columns(columns)
            self._require("dimension 1 of qweight", inputs[1][1], columns // 8)
            self._require("dimension 1 of scales", inputs[2][1], columns // self.group)
        self._require("dimension 0 of scales", inputs[2][0], rows)
        return [Dimension(terms=((0, 0),)), Dimension(terms=((1, 0),))]

    def output_type(self, inputs: Sequence[str]) -> str:
        return inputs[0]

    def workspace(self, inputs: Sequence[Tensor]) -> int:
        """Room for the parts of K that a device with many multiprocessors sums apart (kernel.cu, layout_of)."""
        (m, k), n = inputs[0].shape, inputs[1].shape[0]
        if inputs[0].dtype == "float32" or m <= FEW_ROWS:
            return 0
        columns = min((8, 4, 2), key=lambda c: -(-m // (8 * c)) * max(128 * c, 400))
        tiles = -(-m // (8 * columns)) * -(-n // TILE_ROWS)
        steps = -(-k // STEP)
        wanted = min(max(1, 2 * MOST_MULTIPROCESSORS // tiles), -(-steps // 4))
        parts = -(-steps // -(-steps // wanted))
        return 0 if parts == 1 else 4 * parts * m * n

    def launch(self, kernels: Launcher, inputs: Sequence[Tensor], output: int, workspace: int, stream: int) -> None:
        kernels.linear(inputs, output, workspace, stream=stream, bits=self.bits, group=self.group)

    def _check_columns(self, columns: int) -> None:
        try:
            check_group(columns, self.group)
        except InputError as error:
            raise InputError(f"{NAME}: {error.got}", error.wanted, "export the graph again") from error

    @staticmethod
    def _require(what: str, got: int | None, wanted: int | None) -> None:
        if None not in (got, wanted) and got != wanted:
            raise InputError(f"{NAME}: {what} is {got}", f"{wanted}", "export the graph again")


OPERATOR = Linear
