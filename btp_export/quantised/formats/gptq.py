"""GPTQ, as AutoGPTQ and GPTQModel write it (ModelCloud/GPTQModel, gptqmodel/nn_modules/qlinear).

qweight i32 [K/8, N]     bits 4b.. of word i are input 8i + b
qzeros  i32 [K/g, N/8]   bits 4b.. of word j are output 8j + b; format 1 stores z - 1, format 2 z
scales      [K/g, N]
g_idx   i32 [K]          the group of each input, where they do not simply follow each other
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
    require_object,
    require_part,
    require_shape,
    require_value,
)
from btp_export.quantised.formats._codes import NIBBLES, nibbles, stored_group
from graphs.files.checkpoint import TensorRef
from graphs.files.packed_weights import PackedMatrix
from graphs.packing import GROUPS, LARGEST

VERSION_KEYS = ("checkpoint_format", "format")  # what different writers call it


class Gptq:
    """quant_method "gptq", version "gptq" or "gptq_v2"."""

    name = "gptq"
    parts = ("qweight", "qzeros", "scales", "g_idx")

    def check(self, settings: Settings) -> None:
        """4 bits in either format; those packed for Marlin are other words."""
        require_value(settings, "bits", (4,), "GPTQ")
        named = {key: str(settings[key]).lower() for key in VERSION_KEYS if settings.get(key) is not None}
        for key in named:
            require_value(named, key, ("gptq", "gptq_v2"), "GPTQ")
        if len(set(named.values())) > 1:
            refuse(f"quantised by GPTQ: {' and '.join(VERSION_KEYS)} are {named}", "one version", READ)
        require_value(settings, "is_marlin_format", (False,), "GPTQ")
        require_value(settings, "rotation", (None,), "GPTQ")  # of activations too, which the graphs do not compute
        for key, change in require_object(settings.get("dynamic") or {}, "GPTQ's dynamic").items():
            require_value(require_object(change, f"GPTQ's dynamic {key}"), "bits", (4,), f"GPTQ ({key})")

    def shape(self, parts: Mapping[str, TensorRef], settings: Settings) -> tuple[int, int, int]:
        """Of all; g_idx tells codes of other bits, whose words are more."""
        qweight, scales = require_part(parts, "qweight"), require_part(parts, "scales")
        words, n = require_matrix(qweight)
        k = NIBBLES * words
        index = require_part(parts, "g_idx") if settings.get("desc_act") else parts.get("g_idx")
        if index is not None and len(index.shape) == 1 and index.shape[0] and index.shape[0] != k:
            bits = 32 * words / index.shape[0]
            refuse(f"{qweight.shard}: {qweight.stored_name} has {bits:g} bits a weight", "4 bits", READ)
        group = require_group(scales, k, require_matrix(scales)[0])
        require_shape(qweight, "I32", (words, n))
        require_shape(scales, "float", (k // group, n))
        require_shape(require_part(parts, "qzeros"), "I32", (k // group, -(-n // NIBBLES)))
        if index is not None:
            require_shape(index, "I32", (k,))
            return n, k, _whole(index, group)
        return n, k, stored_group(k, group)

    def matrix(self, parts: Mapping[str, TensorRef], settings: Settings) -> PackedMatrix:
        """Transposed; each block of inputs gets the scale and the zero of the group that its inputs name."""
        n, k, stored = self.shape(parts, settings)
        scales = parts["scales"].read()
        codes = nibbles(parts["qweight"].read()).transpose(0, 2, 1).reshape(k, n).T
        zeros = nibbles(parts["qzeros"].read()).reshape(len(scales), -1)[:, :n].astype(np.int64)
        if _version(settings) == "gptq":
            zeros += 1
            if zeros.max(initial=0) > LARGEST:
                ref = parts["qzeros"]
                refuse(f"{ref.shard}: {ref.stored_name} holds zeros above 15", "0 to 15", READ)
        index = parts.get("g_idx")
        first = np.arange(0, k, stored)
        blocks = first // (k // len(scales)) if index is None else index.read()[first]
        return PackedMatrix.of(codes, np.ascontiguousarray(scales.T[:, blocks]), zeros.T[:, blocks])


def _version(settings: Settings) -> str:
    return next((str(settings[key]).lower() for key in VERSION_KEYS if settings.get(key) is not None), "gptq")


def _whole(index: TensorRef, group: int) -> int:
    """The largest group that can be stored in which all inputs are of one group of the format.

    Raises InputError where activation order has mixed them: their codes would have to be moved, and with them the
    outputs of the layer before.
    """
    groups = np.asarray(index.read())
    if groups.min(initial=0) < 0 or groups.max(initial=0) >= len(groups) // group:
        refuse(f"{index.shard}: {index.stored_name} names a group that is not there", "groups of its scales", READ)
    for size in reversed(GROUPS):
        if len(groups) % size == 0 and size <= group and (groups.reshape(-1, size) == groups[::size, None]).all():
            return size
    refuse(
        f"{index.shard}: {index.stored_name} splits the groups (desc_act, activation order)",
        f"at least {GROUPS[0]} neighbouring inputs in a group",
        "take a checkpoint with desc_act false, or the 16-bit one and --weights int4",
    )


FORMAT = Gptq()
