"""BtpSelectTokens for the Python form of the TensorRT plugin."""

from collections.abc import Sequence
from typing import ClassVar

from graphs.ops.common.trt_python import Dimension, Launcher, Shape, Tensor
from graphs.ops.select_tokens.schema import NAME, check
from graphs.records.errors import InputError

COUNTS = ("keep", "attention_quota", "diversity_quota", "pool", "boundary")
LARGE = 2**31 - 1  # stands for a number of tokens that is not known yet


class SelectTokens:
    """One selection; `values` in the order of ATTRIBUTES. Raises InputError for values that never fit."""

    NAME: ClassVar[str] = NAME
    ATTRIBUTES: ClassVar[tuple[str, ...]] = COUNTS
    INPUT_TYPES: ClassVar[tuple[tuple[str, ...], ...]] = (("float32",), ("float32", "float16"), ("int32",))

    def __init__(self, *values: int) -> None:
        self.values = values
        self._settings = dict(zip(COUNTS, values, strict=True))
        self._check(LARGE, similarity=True)

    def output_shape(self, inputs: Sequence[Shape]) -> list[Dimension]:
        """[B,keep], after the check of every input against the others."""
        if not 1 <= len(inputs) <= 3:
            raise InputError(f"{NAME}: {len(inputs)} inputs", "scores, similarity, seeds", "export the graph again")
        for name, shape, rank in zip(("scores", "similarity", "seeds"), inputs, (2, 3, 1), strict=False):
            if len(shape) != rank:
                raise InputError(f"{NAME}: {name} has {len(shape)} dimensions", f"{rank}", "export the graph again")
        batch, tokens = inputs[0]
        for got, wanted in zip(inputs[1] if len(inputs) > 1 else (), (batch, tokens, tokens), strict=False):
            if None not in (got, wanted) and got != wanted:
                raise InputError(f"{NAME}: a dimension of similarity is {got}", f"{wanted}", "export the graph again")
        self._check(LARGE if tokens is None else tokens, similarity=len(inputs) > 1)
        return [Dimension(terms=((0, 0),)), Dimension(self._settings["keep"])]

    def _check(self, tokens: int, *, similarity: bool) -> None:
        keep, attention_quota, diversity_quota, pool, boundary = self.values
        check(
            tokens,
            keep=keep,
            attention_quota=attention_quota,
            diversity_quota=diversity_quota,
            pool=pool,
            boundary=boundary,
            similarity=similarity,
        )

    def output_type(self, inputs: Sequence[str]) -> str:
        return "int32"

    def workspace(self, inputs: Sequence[Tensor]) -> int:
        """What survey.cuh keeps: three numbers a token, two a batch row and one more, four bytes each."""
        batch, tokens = inputs[0].shape
        return 4 * (3 * batch * tokens + 2 * batch + 1)

    def launch(self, kernels: Launcher, inputs: Sequence[Tensor], output: int, workspace: int, stream: int) -> None:
        kernels.select_tokens(inputs, output, workspace, stream=stream, **self._settings)
