"""BtpGatherTokens for the Python form of the TensorRT plugin."""

from collections.abc import Sequence
from typing import ClassVar

from graphs.ops.common.trt_python import Dimension, Launcher, Shape, Tensor
from graphs.records.errors import InputError

NAME = "BtpGatherTokens"
FLOATS = ("float32", "float16", "bfloat16")


class GatherTokens:
    """One gather; `values` are start and count. Raises InputError for values that never fit."""

    NAME: ClassVar[str] = NAME
    ATTRIBUTES: ClassVar[tuple[str, ...]] = ("start", "count")
    OPTIONS: ClassVar[dict[str, int | str]] = {}
    INPUT_TYPES: ClassVar[tuple[tuple[str, ...], ...]] = (FLOATS, ("int32",))

    def __init__(self, *values: int | str) -> None:
        self.values = values
        self.start, self.count = map(int, values)
        for name, value in zip(self.ATTRIBUTES, (self.start, self.count), strict=True):
            if value < 0:
                raise InputError(f"{NAME}: {name} is {value}", "0 or more", "export the graph again")

    def output_shape(self, inputs: Sequence[Shape]) -> list[Dimension]:
        """[B,S-count+k,...], after the check of both inputs."""
        if len(inputs) != 2:
            raise InputError(f"{NAME}: {len(inputs)} inputs", "tokens and indices", "export the graph again")
        tokens, indices = inputs
        if len(tokens) < 2 or len(indices) != 2:
            got = f"{NAME}: tokens and indices have {len(tokens)} and {len(indices)} dimensions"
            raise InputError(got, "2 or more, and 2", "export the graph again")
        if tokens[1] is not None and self.start + self.count > tokens[1]:
            got = f"{NAME}: start + count is {self.start + self.count}"
            raise InputError(got, f"at most {tokens[1]}, the number of rows", "export the graph again")
        if None not in (tokens[0], indices[0]) and tokens[0] != indices[0]:
            raise InputError(f"{NAME}: dimension 0 of indices is {indices[0]}", f"{tokens[0]}", "export it again")
        rows = Dimension(-self.count, ((0, 1), (1, 1)))
        return [Dimension(terms=((0, 0),)), rows, *(Dimension(terms=((0, axis),)) for axis in range(2, len(tokens)))]

    def output_type(self, inputs: Sequence[str]) -> str:
        return inputs[0]

    def workspace(self, inputs: Sequence[Tensor]) -> int:
        return 0

    def launch(self, kernels: Launcher, inputs: Sequence[Tensor], output: int, workspace: int, stream: int) -> None:
        kernels.gather_tokens(inputs, output, stream=stream, start=self.start, count=self.count)


OPERATOR = GatherTokens
