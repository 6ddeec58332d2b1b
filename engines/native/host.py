"""What btp_host does for each token, for Python. Without it numpy does the same (btp_export/running/sampling.py)."""

import ctypes
import functools
from pathlib import Path
from typing import Any, Final

import numpy as np

from engines.native.libraries import locate, open_library

Vector = np.ndarray[Any, np.dtype[Any]]
MOST_LOGITS: Final = 2**22  # sums of their weights are exact in float64
FLOAT32: Final = np.dtype(np.float32)


class HostLibrary:
    """The functions of one library. Raises UnavailableError if it is for another machine or of another version."""

    def __init__(self, path: Path) -> None:
        self._choose = open_library(path).btp_host_choose
        self._choose.restype = ctypes.c_int32
        self._choose.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_float, ctypes.c_double, ctypes.c_double]

    def choose(self, logits: Vector, scale: float, top_p: float, share: float) -> int | None:
        """The token that `share`, from 0 up to but not 1, draws from logits [vocab]; `scale` is log2(e) / temperature.

        None for logits that are not float32 in one piece, and for those of which none can be drawn.
        """
        if logits.dtype != FLOAT32 or not logits.flags.c_contiguous or logits.size > MOST_LOGITS:
            return None
        token: int = self._choose(logits.ctypes.data, logits.size, scale, top_p, share)
        return token if token >= 0 else None


@functools.cache
def host_library() -> HostLibrary | None:
    """The library that is there when it is first asked for, or None.

    Raises UnavailableError if it cannot work here: a wrong library is never passed over in silence.
    """
    path = locate("btp_host")
    return None if path is None else HostLibrary(path)
