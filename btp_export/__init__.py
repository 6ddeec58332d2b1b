"""BTP Export: static-shape ONNX subgraphs of vision-language models with balanced token pruning built in.

    import btp_export

    bundle = btp_export.export("demo", plan="btp-paper", out="b")
    assert btp_export.verify(bundle).passed
    print(btp_export.load(bundle).generate("scene.png", "what colour is the circle?")[0].text)

All that users import is here, and docs/api.md describes it. Importing this package costs nothing: torch, transformers
and onnxruntime are imported when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from btp_export.api import Shape as Shape
    from btp_export.api import bench as bench
    from btp_export.api import build as build
    from btp_export.api import calibrate as calibrate
    from btp_export.api import evaluate as evaluate
    from btp_export.api import export as export
    from btp_export.api import load as load
    from btp_export.api import verify as verify
    from graphs.files.bundle import Bundle as Bundle
    from graphs.records.errors import BtpError as BtpError
    from graphs.records.errors import CheckError as CheckError
    from graphs.records.errors import InputError as InputError
    from graphs.records.errors import UnavailableError as UnavailableError
    from graphs.records.plan import PruningPlan as Plan

__all__ = [
    "BtpError",
    "Bundle",
    "CheckError",
    "InputError",
    "Plan",
    "Shape",
    "UnavailableError",
    "__version__",
    "bench",
    "build",
    "calibrate",
    "evaluate",
    "export",
    "load",
    "verify",
]
__version__ = "0.1.0"

# Where each name comes from, and its name there where it is another one; imported when it is asked for.
_HOMES = {
    **dict.fromkeys(
        ("Shape", "bench", "build", "calibrate", "evaluate", "export", "load", "verify"), ("btp_export.api", "")
    ),
    **dict.fromkeys(("BtpError", "CheckError", "InputError", "UnavailableError"), ("graphs.records.errors", "")),
    "Bundle": ("graphs.files.bundle", ""),
    "Plan": ("graphs.records.plan", "PruningPlan"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, original = _HOMES[name]
    return getattr(import_module(module), original or name)


def __dir__() -> list[str]:
    return __all__
