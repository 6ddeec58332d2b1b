"""Custom operators of the ONNX domain `btp`: one folder an operator, holding every form it has.

An operator is a folder with a `schema.py`; adding one is adding a folder (type checkers need its name below). It offers
`NAME`, `SCHEMA`, `reference` (torch, loaded on first use), `function(opset)` and `cases()`.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from graphs.ops.domain import DOMAIN, PLUGIN, VERSION

if TYPE_CHECKING:
    import onnx

    from graphs.ops import gather_tokens, select_tokens

__all__ = ["DOMAIN", "PLUGIN", "VERSION", "functions", "gather_tokens", "names", "register_schemas", "select_tokens"]


def names() -> list[str]:
    """Folder names of the operators, sorted."""
    return sorted(schema.parent.name for schema in Path(__file__).parent.glob("*/schema.py"))


def functions(opset: int) -> list["onnx.FunctionProto"]:
    """The portable bodies of all operators for models of this opset (18 or later), generic in their attributes.

    A runtime that does not know the domain runs a model that carries them, without any plugin.
    """
    bodies: list[onnx.FunctionProto] = [_operator(name).function(opset) for name in names()]
    return bodies


def register_schemas() -> None:
    """Tell onnx the operators' schemas, so that its checker and shape inference know nodes without a body."""
    from onnx import defs

    for name in names():
        operator = _operator(name)
        if not defs.has(operator.NAME, DOMAIN):
            defs.register_schema(operator.SCHEMA)


def _operator(name: str) -> ModuleType:
    return import_module(f"{__name__}.{name}")


def __getattr__(name: str) -> ModuleType:
    """`ops.select_tokens` without an import of its own."""
    if name in names():
        return _operator(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
