"""Graphs on a CPU with btp_ort, and the mark of tests that need the processor's products of bytes."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from engines.native.libraries import multiplies
from tests.engines.native import builds
from tests.engines.runners.sessions import opened

Array = np.ndarray[Any, np.dtype[Any]]

here = pytest.mark.skipif(not multiplies(builds.ort_library()), reason="this processor has no AVX512-VNNI")


def run(model: onnx.ModelProto, folder: Path, given: dict[str, Array], threads: int = 1) -> dict[str, Array]:
    """The outputs of a model, whose nodes are replaced as in every session."""
    return opened(model, folder, threads=threads).run(given)
