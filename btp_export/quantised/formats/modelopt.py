"""ModelOpt's W4A16_AWQ in its Hugging Face form (NVIDIA/TensorRT-Model-Optimizer, modelopt/torch/export).

weight           u8 [N/2, K]   low nibble row 2i, high nibble row 2i + 1, two's complement
weight_scale        [N, K/g]
pre_quant_scale     [K]        multiplies the input; absent where it was folded into the norm before
weight = q * s
"""

from collections.abc import Mapping

import numpy as np

from btp_export.quantised.formats import (
    Settings,
    require_group,
    require_matrix,
    require_part,
    require_shape,
    require_value,
)
from btp_export.quantised.formats._codes import spread, stored_group
from graphs.files.checkpoint import TensorRef
from graphs.files.packed_weights import PackedMatrix
from graphs.packing import check_scales

FORM = "ModelOpt"


class ModelOpt:
    """hf_quant_config.json with quant_algo W4A16_AWQ; newer files repeat it in config.json."""

    name = "modelopt"
    parts = ("weight_scale", "weight", "pre_quant_scale")

    def check(self, settings: Settings) -> None:
        """Of the file, or of config.json alone, whose words for caches are others."""
        require_value({"quant_algo": settings.get("quant_algo")}, "quant_algo", ("W4A16_AWQ",), FORM)
        for key in ("kv_cache_quant_algo", "kv_cache_scheme"):
            require_value(settings, key, (None,), FORM)
        require_value(settings, "has_zero_point", (False,), FORM)

    def shape(self, parts: Mapping[str, TensorRef], settings: Settings) -> tuple[int, int, int]:
        """Two rows lie in one of the stored matrix."""
        weight, scale = require_part(parts, "weight"), require_part(parts, "weight_scale")
        pairs, k = require_matrix(weight)
        group = require_group(scale, k, require_matrix(scale)[1])
        require_shape(weight, "U8", (pairs, k))
        require_shape(scale, "float", (2 * pairs, k // group))
        if "pre_quant_scale" in parts:
            require_shape(parts["pre_quant_scale"], "float", (k,))
        return 2 * pairs, k, stored_group(k, group)

    def matrix(self, parts: Mapping[str, TensorRef], settings: Settings) -> PackedMatrix:
        """Signed codes become unsigned ones whose zero is 8."""
        n, k, stored = self.shape(parts, settings)
        scale = np.asarray(parts["weight_scale"].read())
        stored_rows = parts["weight"].read()
        codes = np.empty((n, k), np.uint8)
        codes[0::2], codes[1::2] = stored_rows & 15, stored_rows >> 4
        codes ^= 8  # two's complement of four bits and the value plus 8 differ in the highest bit
        before = np.asarray(parts["pre_quant_scale"].read()) if "pre_quant_scale" in parts else None
        if before is not None:
            check_scales(before, parts["pre_quant_scale"].stored_name)
        return PackedMatrix.of(codes, spread(scale, k // scale.shape[1], stored), None, before)


FORMAT = ModelOpt()
