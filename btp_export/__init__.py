"""BTP Export: static-shape ONNX subgraphs of vision-language models with balanced token pruning built in.

`btp_export.load(bundle).generate(...)` runs an exported bundle. Importing this package costs nothing: torch,
transformers and onnxruntime are imported when they are used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from btp_export.running.runtime import load as load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":
        from btp_export.running.runtime import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
