"""AWQ's gemm layout, as AutoAWQ and transformers write it (casper-hansen/AutoAWQ, awq/modules/linear/gemm.py).

qweight i32 [K, N/8]     bits 4b.. of word j are output 8j + (0,2,4,6,1,3,5,7)[b]
qzeros  i32 [K/g, N/8]   in the same order
scales      [K/g, N]
weight = (q - z) * s
"""

from collections.abc import Mapping

import numpy as np

from btp_export.quantised.formats import (
    READ,
    Settings,
    refuse,
    require_group,
    require_matrix,
    require_part,
    require_shape,
    require_value,
)
from btp_export.quantised.formats._codes import NIBBLES, nibbles, spread, stored_group
from graphs.files.checkpoint import TensorRef
from graphs.files.packed_weights import PackedMatrix

# Where outputs 0 to 7 of a word are: the inverse of the order in which AWQ packs them.
PLACES = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])


class Awq:
    """quant_method "awq", version "gemm"."""

    name = "awq"
    parts = ("qweight", "qzeros", "scales")

    def check(self, settings: Settings) -> None:
        """gemm with 4 bits; the other versions order the same codes for one kernel each."""
        for key in ("version", "format", "checkpoint_format"):  # what AutoAWQ, transformers and GPTQModel call it
            require_value({key: str(settings.get(key) or "gemm").lower()}, key, ("gemm",), "AWQ")
        if str(settings.get("backend", "")).lower() == "llm-awq":
            refuse('quantised by AWQ: backend is "llm-awq"', "version gemm: llm-awq packs other words", READ)
        require_value(settings, "bits", (4,), "AWQ")
        require_value(settings, "w_bit", (4,), "AWQ")

    def shape(self, parts: Mapping[str, TensorRef], settings: Settings) -> tuple[int, int, int]:
        """Of qweight and scales."""
        qweight, scales = require_part(parts, "qweight"), require_part(parts, "scales")
        k, words = require_matrix(qweight)
        n = NIBBLES * words
        group = require_group(scales, k, require_matrix(scales)[0])
        require_shape(qweight, "I32", (k, words))
        require_shape(scales, "float", (k // group, n))
        require_shape(require_part(parts, "qzeros"), "I32", (k // group, words))
        return n, k, stored_group(k, group)

    def matrix(self, parts: Mapping[str, TensorRef], settings: Settings) -> PackedMatrix:
        """Transposed, in the order of the outputs."""
        n, k, stored = self.shape(parts, settings)
        scales = parts["scales"].read()
        group = k // len(scales)
        codes = nibbles(parts["qweight"].read())[..., PLACES].reshape(k, n).T
        zeros = nibbles(parts["qzeros"].read())[..., PLACES].reshape(-1, n).T
        steps = spread(np.ascontiguousarray(scales.T), group, stored)
        return PackedMatrix.of(codes, steps, spread(zeros, group, stored))


FORMAT = Awq()
