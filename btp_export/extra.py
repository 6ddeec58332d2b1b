"""What is said where the extra `serve` is not installed."""

import contextlib
from collections.abc import Iterator

from graphs.records.errors import UnavailableError

OURS = ("btp_export", "calibrate", "engines", "graphs")


@contextlib.contextmanager
def extra_serve() -> Iterator[None]:
    """Around imports of its libraries. Raises UnavailableError that names the extra if one is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in OURS:
            raise
        raise UnavailableError(
            f"{error.name} is not installed", wanted="the extra serve", do='pip install "btp-export[serve]"'
        ) from error
