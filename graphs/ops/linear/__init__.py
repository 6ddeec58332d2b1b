"""BtpLinear: a projection with four-bit weights. The README here says which file holds what."""

from typing import TYPE_CHECKING, Any, Final

from graphs.ops.linear.cases import Case, cases
from graphs.ops.linear.onnx_body import body, form, function, scratch_bytes
from graphs.ops.linear.schema import NAME, SCHEMA, check

if TYPE_CHECKING:
    from graphs.ops.linear.torch_reference import reference

# Largest error of an element of y, by type, relative to the norm of its row: the rounding of y.
TOLERANCE: Final = {"float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}

__all__ = [
    "NAME",
    "SCHEMA",
    "TOLERANCE",
    "Case",
    "body",
    "cases",
    "check",
    "form",
    "function",
    "reference",
    "scratch_bytes",
]


def __getattr__(name: str) -> Any:
    """`reference` needs torch, which nothing else here does."""
    if name == "reference":
        from graphs.ops.linear.torch_reference import reference

        return reference
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
