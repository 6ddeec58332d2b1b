"""kernel.h of BtpSelectTokens for Python (engines.native.kernels): the structure and the pointers of one call."""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Final

from graphs.ops.common.trt_python import Tensor
from graphs.ops.select_tokens.schema import COUNTS, COVERAGE, FARTHEST

INPUTS: Final = 3
WORKSPACE: Final = True
RULES: Final = {FARTHEST: 0, COVERAGE: 1}  # BTP_FARTHEST, BTP_COVERAGE
SIMILARITY: Final = {"float32": 1, "float16": 2}  # BTP_FLOAT32, BTP_FLOAT16


class Settings(ctypes.Structure):
    """BtpSelect."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in ("batch", "tokens", *COUNTS, "seeds", "similarity", "diversity_rule", "weighted")
    ]


def settings(inputs: Sequence[Tensor], attributes: Mapping[str, int | str]) -> Settings:
    """The call on scores [B,V], similarity [B,V,V] and seeds [m] (the last two may be missing)."""
    similarity = SIMILARITY[inputs[1].dtype] if len(inputs) > 1 else 0
    seeds = inputs[2].shape[0] if len(inputs) > 2 else 0
    rule = RULES[str(attributes.get("diversity_rule", FARTHEST))]
    counts = (attributes[name] for name in COUNTS)
    return Settings(*inputs[0].shape, *counts, seeds, similarity, rule, attributes.get("weighted", 0))


def pointers(inputs: Sequence[Tensor]) -> list[int | None]:
    """INPUTS addresses; null for what is missing or empty."""
    given: list[int | None] = [tensor.address if 0 not in tensor.shape else None for tensor in inputs]
    return given + [None] * (INPUTS - len(given))
