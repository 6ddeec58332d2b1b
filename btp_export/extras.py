"""What to install where a library is missing: the runner is small, everything else is an extra of the package.

One mechanism for every command and every function: what needs a library imports it where it is used, and what that
raises becomes an UnavailableError that names the extra.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Final

from graphs.records.errors import InputError, UnavailableError
from graphs.records.refusing import LIBRARIES

EXPORT: Final = "export"  # everything
DEVICE: Final = "device"  # what building engines on a device needs
CPU: Final = "cpu"  # ONNX Runtime

SERVE: Final = "serve"

# Libraries that an extra of their own brings, whatever else the command needs.
OWN: Final = {
    "datasets": "data",
    "lmms_eval": "lmms-eval",
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "prometheus_client", "ray"), SERVE),
}
FOR: Final = {
    EXPORT: "opens checkpoints, calibrates, exports, verifies and evaluates",
    DEVICE: "prepares graphs and builds engines",
    CPU: "runs the graphs on this machine's processor; with --target NAME the engines of a device run without it",
    "data": "reads data sets of Hugging Face",
    SERVE: "answers over HTTP and spreads work over several machines",
    "lmms-eval": "runs standard benchmarks",
}


def install(extra: str) -> str:
    """What to type for an extra."""
    return f"pip install 'btp-export[{extra}]'"


def require_docstrings() -> None:
    """Raise InputError where Python leaves docstrings out: transformers reads them while it loads a model's code."""
    if sys.flags.optimize >= 2:
        raise InputError(
            "Python runs without docstrings, which transformers reads",
            wanted="PYTHONOPTIMIZE unset, 0 or 1, and no -OO",
            do="unset PYTHONOPTIMIZE",
        )


@contextlib.contextmanager
def naming(extra: str) -> Iterator[None]:
    """Raise UnavailableError in place of the error for a library that is not installed and that `extra` brings."""
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in LIBRARIES | OWN.keys():
            raise
        wanted = OWN.get(library, extra)
        raise UnavailableError(
            f"{library} is not installed", wanted=f"btp-export[{wanted}], which {FOR[wanted]}", do=install(wanted)
        ) from error
