"""BtpSelectTokens: which image tokens a pruning stage keeps. The README here says which file holds what."""

from typing import TYPE_CHECKING, Any

from graphs.ops.select_tokens.cases import Case, cases
from graphs.ops.select_tokens.onnx_body import body, form, function, scratch_bytes
from graphs.ops.select_tokens.schema import NAME, SCHEMA, check

if TYPE_CHECKING:
    from graphs.ops.select_tokens.torch_reference import picks_from_nothing, reference

__all__ = [
    "NAME",
    "SCHEMA",
    "Case",
    "body",
    "cases",
    "check",
    "form",
    "function",
    "picks_from_nothing",
    "reference",
    "scratch_bytes",
]


def __getattr__(name: str) -> Any:
    """`reference` and a part of it need torch, which nothing else here does."""
    if name in ("picks_from_nothing", "reference"):
        from graphs.ops.select_tokens import torch_reference

        return getattr(torch_reference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
