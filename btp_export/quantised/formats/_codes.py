"""Codes in words of 32 bits, and groups that the packed layout does not have."""

import numpy as np

from graphs.packing import GROUPS
from graphs.records.errors import InputError

NIBBLES = 8  # codes in a word


def nibbles(words: np.ndarray) -> np.ndarray:
    """int32 [..., n] -> uint8 [..., n, 8]: bits 4b.. of each word in place b."""
    octets = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8).reshape(*words.shape, 4)
    codes = np.empty((*words.shape, NIBBLES), np.uint8)
    codes[..., 0::2], codes[..., 1::2] = octets & 15, octets >> 4
    return codes


def stored_group(k: int, group: int) -> int:
    """The largest group that can be stored and that divides a format's own: its scales are then written out.

    Raises InputError if there is none.
    """
    fitting = [size for size in GROUPS if group % size == 0 and k % size == 0]
    if not fitting:
        raise InputError(
            f"groups of {group} in rows of {k} weights",
            wanted=f"a multiple of {GROUPS[0]} that divides the row",
            do="quantise the model in groups of 32, 64 or 128",
        )
    return fitting[-1]


def spread(per_group: np.ndarray, group: int, stored: int) -> np.ndarray:
    """[N, K/group] written out for the smaller groups `stored`: [N, K/stored]."""
    return per_group if group == stored else np.repeat(per_group, group // stored, axis=1)
