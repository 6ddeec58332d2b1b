"""BtpLinear: a projection with four-bit weights. The README here says which file holds what."""

from typing import TYPE_CHECKING, Any

from graphs.ops.linear.cases import Case, cases
from graphs.ops.linear.onnx_body import body, form, function, scratch_bytes
from graphs.ops.linear.schema import NAME, SCHEMA, check

if TYPE_CHECKING:
    from graphs.ops.linear.torch_reference import reference

__all__ = ["NAME", "SCHEMA", "Case", "body", "cases", "check", "form", "function", "reference", "scratch_bytes"]


def __getattr__(name: str) -> Any:
    """`reference` needs torch, which nothing else here does."""
    if name == "reference":
        from graphs.ops.linear.torch_reference import reference

        return reference
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
