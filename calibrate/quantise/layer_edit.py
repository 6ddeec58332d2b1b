"""The edit that turns the layers of a streamed pass into four bits, in order, each seeing what those before it made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn

from calibrate.quantise.layer_inputs import gather_inputs
from calibrate.quantise.rounding import Rounded
from calibrate.quantise.search import LayerTensors, QuantisedLayer, search_layer
from calibrate.reference.observers import Rows
from graphs import dtypes
from graphs.files.packed_weights import PackedMatrix


class Layers(Protocol):
    """Where finished layers are kept."""

    def has(self, layer: int) -> bool:
        """Whether a layer is finished."""

    def keep(self, layer: int, quantised: QuantisedLayer) -> None:
        """A layer is finished."""

    def weights(self, layer: int) -> Mapping[str, np.ndarray]:
        """The numbers of a finished layer, by name within it."""


class QuantisingEdit:
    """Searches each layer on the rows that come to it, keeps it, and puts what was kept into the module.

    `dtype` stores the scales of codes, `norm_dtype` the norms; `key` is a hash of all that decides the result.
    `tell(layer)` is called before each.
    """

    def __init__(
        self, layers: Layers, *, group: int, heads: int, kv_heads: int, dtype: torch.dtype, norm_dtype: torch.dtype,
        key: str, tell: Callable[[int], None],
    ) -> None:  # fmt: skip
        self.key = key
        self._layers, self._group, self._heads, self._kv_heads = layers, group, heads, kv_heads
        self._dtype, self._norm_dtype, self._tell = dtype, norm_dtype, tell

    def __call__(self, layer: int, module: nn.Module, rows: Sequence[Rows]) -> None:
        """Quantise the loaded layer, or take it up from an interrupted run."""
        self._tell(layer)
        if not self._layers.has(layer):
            weights = {name: tensor.float() for name, tensor in module.state_dict().items()}
            statistics = gather_inputs(module, rows, self._group)
            tensors = LayerTensors(weights, self._heads, self._kv_heads)
            self._layers.keep(layer, search_layer(tensors, statistics, self._group, self._dtype, self._norm_dtype))
        with torch.no_grad():
            kept = self._layers.weights(layer)
            for name, parameter in module.state_dict().items():
                parameter.copy_(dtypes.torch_of_numpy(kept[name]))


def packed(rounded: Rounded) -> PackedMatrix:
    """As it is written."""
    return PackedMatrix.of(
        rounded.codes.cpu().numpy(), dtypes.numpy_of_torch(rounded.scales), rounded.zeros.cpu().numpy()
    )
