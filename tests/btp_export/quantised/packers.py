"""Each format's packing with loops of its own, from what the formats' writers say; nothing of the project is used.

A layer is drawn as codes, zeros and scales; `pack_*` gives the tensors of the format, `numbers` what its formula says.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Layer:
    """codes [N,K] and zeros [N,G] from 0 to 15, scales [N,G]; `groups` [K] names the group of each input."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    groups: np.ndarray
    input_scale: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return *self.codes.shape, self.scales.shape[1]

    def numbers(self) -> np.ndarray:
        """(q - z) s of every weight, float64 [N,K]."""
        n, k, _ = self.shape
        matrix = np.empty((n, k))
        for row in range(n):
            for column in range(k):
                group = self.groups[column]
                step = float(self.scales[row, group])
                matrix[row, column] = (int(self.codes[row, column]) - int(self.zeros[row, group])) * step
        return matrix if self.input_scale is None else matrix * self.input_scale.astype(np.float64)


def draw_layer(
    random: np.random.Generator, n: int, k: int, group: int, *, symmetric: bool = False, dtype: Any = np.float16
) -> Layer:
    groups = k // group
    zeros = np.full((n, groups), 8) if symmetric else random.integers(1, 16, (n, groups))
    scales = random.uniform(0.01, 0.04, (n, groups)).astype(dtype)
    return Layer(random.integers(0, 16, (n, k)), zeros, scales, np.arange(k) // group)


def signed_word(word: int) -> int:
    """32 bits as the int32 that numpy stores."""
    return word - 2**32 if word >= 2**31 else word


def pack_awq(layer: Layer) -> dict[str, np.ndarray]:
    n, k, groups = layer.shape
    qweight, qzeros = np.zeros((k, n // 8), np.int32), np.zeros((groups, n // 8), np.int32)
    for word in range(n // 8):
        for row in range(k):
            qweight[row, word] = _awq_word(layer.codes[:, row], word)
        for row in range(groups):
            qzeros[row, word] = _awq_word(layer.zeros[:, row], word)
    return {"qweight": qweight, "qzeros": qzeros, "scales": np.ascontiguousarray(layer.scales.T)}


def _awq_word(column: np.ndarray, word: int) -> int:
    return signed_word(sum(int(column[8 * word + AWQ_ORDER[place]]) << 4 * place for place in range(8)))


def pack_gptq(layer: Layer, *, version: int = 1, g_idx: bool = True) -> dict[str, np.ndarray]:
    n, k, groups = layer.shape
    qweight, qzeros = np.zeros((k // 8, n), np.int32), np.zeros((groups, n // 8), np.int32)
    for word in range(k // 8):
        for column in range(n):
            qweight[word, column] = _plain_word(layer.codes[column, 8 * word : 8 * word + 8])
    for row in range(groups):
        for word in range(n // 8):
            qzeros[row, word] = _plain_word(layer.zeros[8 * word : 8 * word + 8, row] - (version == 1))
    tensors = {"qweight": qweight, "qzeros": qzeros, "scales": np.ascontiguousarray(layer.scales.T)}
    return tensors | ({"g_idx": layer.groups.astype(np.int32)} if g_idx else {})


def _plain_word(codes: np.ndarray) -> int:
    return signed_word(sum((int(code) & 15) << 4 * place for place, code in enumerate(codes)))


def pack_compressed(layer: Layer, *, zeros: str = "packed") -> dict[str, np.ndarray]:
    """`zeros`: "packed" as now, "bytes" as older versions wrote them, "none" where they are all 8."""
    n, k, groups = layer.shape
    packed = np.zeros((n, -(-k // 8)), np.int32)
    points = np.zeros((-(-n // 8), groups), np.int32)
    for row in range(n):
        for word in range(packed.shape[1]):
            packed[row, word] = _plain_word(layer.codes[row, 8 * word : 8 * word + 8])
    for word in range(points.shape[0]):
        for column in range(groups):
            points[word, column] = _plain_word(layer.zeros[8 * word : 8 * word + 8, column])
    tensors = {"weight_packed": packed, "weight_scale": layer.scales, "weight_shape": np.array([n, k], np.int64)}
    if zeros == "packed":
        tensors["weight_zero_point"] = points
    if zeros == "bytes":
        tensors["weight_zero_point"] = (layer.zeros - 8).astype(np.int8)
    return tensors


def pack_modelopt(layer: Layer) -> dict[str, np.ndarray]:
    n, k, _ = layer.shape
    weight = np.zeros((n // 2, k), np.uint8)
    for row in range(n // 2):
        for column in range(k):
            low, high = (int(layer.codes[2 * row + place, column]) - 8 for place in range(2))
            weight[row, column] = (low & 15) | (high & 15) << 4
    tensors = {"weight": weight, "weight_scale": layer.scales}
    return tensors | ({} if layer.input_scale is None else {"pre_quant_scale": layer.input_scale})
