"""compressed-tensors' pack-quantized, as llm-compressor writes it (neuralmagic/compressed-tensors, pack_quantized.py).

weight_packed      i32 [N, K/8]     bits 4i.. of word j are input 8j + i, stored q + 8
weight_scale           [N, K/g]
weight_zero_point  i32 [N/8, K/g]   bits 4i.. of word j are output 8j + i, stored z + 8; or i8 [N, K/g], stored z
weight_shape           [2]          N and K
weight_g_idx       i32 [K]          the group of each input, where activations ordered them
weight = (q - z) * s
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from btp_export.quantised.formats import (
    READ,
    Settings,
    refuse,
    require_group,
    require_matrix,
    require_object,
    require_part,
    require_shape,
    require_value,
)
from btp_export.quantised.formats._codes import NIBBLES, nibbles, spread, stored_group
from graphs.files.checkpoint import TensorRef
from graphs.files.packed_weights import PackedMatrix
from graphs.packing import MIDDLE

FORM = "compressed-tensors"


class CompressedTensors:
    """quant_method "compressed-tensors", format "pack-quantized", weights of 4 bits and nothing else."""

    name = FORM
    parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")

    def check(self, settings: Settings) -> None:
        """Every group of layers must have weights of 4 bits; activations, caches and transforms stay as they are."""
        require_value(settings, "quantization_status", ("compressed",), FORM)
        for key in ("kv_cache_scheme", "transform_config"):
            if settings.get(key):
                refuse(f"a {FORM} checkpoint with a {key}", f"no {key}: graphs do not compute it", READ)
        sparsity = require_object(settings.get("sparsity_config") or {}, "sparsity_config")
        if sparsity.get("format", "dense") != "dense":
            refuse(f"a {FORM} checkpoint that is sparse", "dense matrices", READ)
        groups = settings.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            refuse(f"a {FORM} checkpoint without config_groups", "what each layer's codes are", READ)
        for name, group in groups.items():
            where = f"{FORM} ({name})"
            group = require_object(group, f"group {name}")
            packing = group.get("format") or settings.get("format")
            require_value({"format": packing}, "format", ("pack-quantized",), where)
            for key in ("input_activations", "output_activations"):
                require_value(group, key, (None,), where)
            weights = require_object(group.get("weights") or {"num_bits": None}, f"weights of group {name}")
            require_value({"num_bits": weights.get("num_bits", 8)}, "num_bits", (4,), where)
            require_value(weights, "type", ("int",), where)
            require_value(weights, "strategy", ("group", "channel"), where)
            require_value(weights, "dynamic", (False,), where)

    def shape(self, parts: Mapping[str, TensorRef], settings: Settings) -> tuple[int, int, int]:
        """weight_shape has K, which need not fill its last word."""
        packed, scale = require_part(parts, "weight_packed"), require_part(parts, "weight_scale")
        n, k = self._size(require_part(parts, "weight_shape"))
        group = require_group(scale, k, require_matrix(scale)[1])
        require_shape(packed, "I32", (n, -(-k // NIBBLES)))
        require_shape(scale, "float", (n, k // group))
        zero = parts.get("weight_zero_point")
        if zero is None and _in_all_groups(settings, "symmetric", (False,)):
            require_part(parts, "weight_zero_point")
        if zero is not None and zero.dtype == "I8":
            require_shape(zero, "I8", (n, k // group))
        elif zero is not None:
            require_shape(zero, "I32", (-(-n // NIBBLES), k // group))
        index = parts.get("weight_g_idx")
        if index is None and _in_all_groups(settings, "actorder", ("group", "dynamic", True)):
            require_part(parts, "weight_g_idx")
        if index is not None:
            require_shape(index, "I32", (k,))
            _refuse_order(index, group)
        return n, k, stored_group(k, group)

    def matrix(self, parts: Mapping[str, TensorRef], settings: Settings) -> PackedMatrix:
        """Rows as they are; codes and zeros are both 8 above their values, so their difference is the same."""
        n, k, stored = self.shape(parts, settings)
        scale = parts["weight_scale"].read()
        group = k // scale.shape[1]
        codes = nibbles(parts["weight_packed"].read()).reshape(n, -1)[:, :k]
        zero = parts.get("weight_zero_point")
        points = None
        if zero is not None and zero.dtype == "I8":
            points = spread(zero.read().astype(np.int64) + MIDDLE, group, stored)
        elif zero is not None:
            unpacked = nibbles(zero.read()).transpose(0, 2, 1).reshape(-1, k // group)[:n]
            points = spread(unpacked, group, stored)
        return PackedMatrix.of(codes, spread(np.asarray(scale), group, stored), points)

    @staticmethod
    def _size(ref: TensorRef) -> tuple[int, int]:
        if ref.dtype not in ("I64", "I32") or ref.shape != (2,):
            refuse(f"{ref.shard}: {ref.stored_name} is {ref.dtype} {list(ref.shape)}", "I64 [2]", READ)
        n, k = (int(number) for number in ref.read())
        if n < 1 or k < 1:
            refuse(f"{ref.shard}: {ref.stored_name} says {[n, k]}", "N and K", "get the checkpoint again")
        return n, k


def _in_all_groups(settings: Settings, key: str, values: tuple[Any, ...]) -> bool:
    """Whether the weights of every group of layers have one of these values; names and types pick a layer's group."""
    return all(group["weights"].get(key) in values for group in settings["config_groups"].values())


def _refuse_order(index: TensorRef, group: int) -> None:
    """Raise InputError unless the groups follow each other; -1 throughout says that there is no order."""
    groups = np.asarray(index.read())
    if not (groups == -1).all() and not (groups == np.arange(len(groups)) // group).all():
        refuse(
            f"{index.shard}: {index.stored_name} splits the groups (actorder, activation order)",
            "groups of neighbouring inputs",
            'take a checkpoint with actorder "weight" or none, or the 16-bit one and --weights int4',
        )


FORMAT = CompressedTensors()
