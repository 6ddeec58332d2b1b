"""BtpSelectTokens for the Python form of the TensorRT plugin."""

from collections.abc import Sequence
from typing import ClassVar

from graphs.ops.common.trt_python import Dimension, Launcher, Shape, Tensor
from graphs.ops.select_tokens.schema import COUNTS, COVERAGE, NAME, check
from graphs.ops.select_tokens.schema import OPTIONS as DEFAULTS
from graphs.records.errors import InputError

LARGE = 2**31 - 1  # stands for a number of tokens that is not known yet


class SelectTokens:
    """One selection; `values` of ATTRIBUTES, then of OPTIONS. Raises InputError for values that never fit."""

    NAME: ClassVar[str] = NAME
    ATTRIBUTES: ClassVar[tuple[str, ...]] = tuple(COUNTS)
    OPTIONS: ClassVar[dict[str, int | str]] = {name: default for name, (default, _) in DEFAULTS.items()}
    INPUT_TYPES: ClassVar[tuple[tuple[str, ...], ...]] = (("float32",), ("float32", "float16"), ("int32",))

    def __init__(self, *values: int | str) -> None:
        self.values = values
        self._settings = dict(zip((*self.ATTRIBUTES, *self.OPTIONS), values, strict=True))
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
        return [Dimension(terms=((0, 0),)), Dimension(int(self._settings["keep"]))]

    def _check(self, tokens: int, *, similarity: bool) -> None:
        given = self._settings
        check(
            tokens,
            keep=int(given["keep"]),
            attention_quota=int(given["attention_quota"]),
            diversity_quota=int(given["diversity_quota"]),
            pool=int(given["pool"]),
            boundary=int(given["boundary"]),
            similarity=similarity,
            diversity_rule=str(given["diversity_rule"]),
            weighted=int(given["weighted"]),
        )

    def output_type(self, inputs: Sequence[str]) -> str:
        return "int32"

    def workspace(self, inputs: Sequence[Tensor]) -> int:
        """What survey.cuh keeps: three numbers a token, three a batch row and one more, four bytes each.

        For coverage also the similarity in 16 bits, its rows filled up to whole reads of 8.
        """
        batch, tokens = inputs[0].shape
        covers = len(inputs) > 1 and self._settings["diversity_rule"] == COVERAGE
        levels = batch * tokens * ((tokens + 7) // 8 * 8) if covers else 0
        return 2 * levels + 4 * (3 * batch * tokens + 3 * batch + 1)

    def launch(self, kernels: Launcher, inputs: Sequence[Tensor], output: int, workspace: int, stream: int) -> None:
        kernels.select_tokens(inputs, output, workspace, stream=stream, **self._settings)


OPERATOR = SelectTokens
