"""BtpSelectTokens: which image tokens a pruning stage keeps. The README here says which file holds what."""

from typing import TYPE_CHECKING, Any

from graphs.ops.select_tokens.cases import Case, cases
from graphs.ops.select_tokens.onnx_body import body, form, function, scratch_bytes
from graphs.ops.select_tokens.schema import NAME, SCHEMA, check

if TYPE_CHECKING:
    from graphs.ops.select_tokens.torch_reference import reference

__all__ = ["NAME", "SCHEMA", "Case", "body", "cases", "check", "form", "function", "reference", "scratch_bytes"]


def __getattr__(name: str) -> Any:
    """`reference` needs torch, which nothing else here does."""
    if name == "reference":
        from graphs.ops.select_tokens.torch_reference import reference

        return reference
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
