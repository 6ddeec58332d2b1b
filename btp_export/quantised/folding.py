"""Scales of a linear layer's input, moved into what makes that input where nothing is lost by it.

    q, k, v     <- input_layernorm.weight            gate, up <- post_attention_layernorm.weight
    o           <- rows of v (each is read by all query heads of its group)
    down        <- rows of up

A norm keeps the product in float32, where that of two 16-bit numbers is exact. The rows of v and up are their codes'
scales, which keep their type: they take the product only if it can be written exactly. What cannot be moved stays
`input_scale`, by which the graph multiplies.
"""

from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any

import numpy as np

from graphs.files.packed_weights import PackedMatrix

BEHIND_NORMS = {
    "input_layernorm.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm.weight": ("mlp.gate_proj", "mlp.up_proj"),
}
BEHIND_ROWS = {"self_attn.v_proj": "self_attn.o_proj", "mlp.up_proj": "mlp.down_proj"}


def fold_input_scales(
    layer: str, matrices: MutableMapping[str, PackedMatrix], plain: MutableMapping[str, np.ndarray], head_dim: int
) -> None:
    """Move what can be moved among one layer's matrices and its other tensors, by canonical name; `head_dim` is D."""
    for before, behind in BEHIND_ROWS.items():
        _into_rows(f"{layer}.{before}", f"{layer}.{behind}", matrices, plain, head_dim)
    for norm, behind_norm in BEHIND_NORMS.items():
        _into_norm(f"{layer}.{norm}", [f"{layer}.{module}" for module in behind_norm], matrices, plain)


def _into_norm(
    norm: str, behind: list[str], matrices: MutableMapping[str, PackedMatrix], plain: MutableMapping[str, np.ndarray]
) -> None:
    """All that read the norm must ask for the same scale."""
    scales = [matrices[module].input_scale if module in matrices else None for module in behind]
    first = scales[0]
    alike = first is not None and all(scale is not None and np.array_equal(scale, first) for scale in scales)
    if first is None or not alike or norm not in plain:
        return
    product = _exact(plain[norm], first, np.dtype(np.float32))
    if product is None:
        return
    plain[norm] = product
    for module in behind:
        matrices[module] = replace(matrices[module], input_scale=None)


def _into_rows(
    before: str,
    behind: str,
    matrices: MutableMapping[str, PackedMatrix],
    plain: MutableMapping[str, np.ndarray],
    head_dim: int,
) -> None:
    """Rows of `before` are the inputs of `behind`, each for all query heads of a group."""
    if before not in matrices or behind not in matrices:
        return
    source, scale = matrices[before], matrices[behind].input_scale
    rows = None if scale is None else _rows(scale, len(source.scales), head_dim)
    product = None if rows is None else _exact(source.scales, rows[:, None], source.scales.dtype)
    if rows is None or product is None:
        return
    bias = f"{before}.bias"
    if bias in plain:
        shifted = _exact(plain[bias], rows, np.dtype(np.float32))
        if shifted is None:
            return
        plain[bias] = shifted
    matrices[before] = replace(source, scales=product)
    matrices[behind] = replace(matrices[behind], input_scale=None)


def _rows(scale: np.ndarray, rows: int, head_dim: int) -> np.ndarray | None:
    """The scale [K] as one of `rows` rows; None if the heads that read one row want different ones."""
    if len(scale) == rows:
        return scale
    heads = scale.reshape(rows // head_dim, -1, head_dim)
    return heads[:, 0].reshape(-1) if (heads == heads[:, :1]).all() else None


def _exact(one: np.ndarray, other: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray | None:
    """The product in `dtype`, None where that would round it."""
    wide = one.astype(np.float64) * other.astype(np.float64)
    narrow = wide.astype(dtype)
    return narrow if np.array_equal(narrow.astype(np.float64), wide) else None
