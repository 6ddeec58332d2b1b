"""RoPE tables from transformers' own rotary module, so that every scaling type is transformers' and not ours.

A table holds cos and sin of the positions 0, 1, 2, ... A token's row of it is that of its position; with M-RoPE a token
has three positions, and the sections of its row come from the rows of one or another of them: `token_tables`.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphs.files.checkpoint import read_config
from graphs.files.configuration import text_config
from graphs.records.errors import InputError
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import DecoderSpec

if TYPE_CHECKING:
    from torch import nn

DEPENDS_ON_LENGTH = ("dynamic", "longrope")  # their frequencies change once a sequence is longer than in training


def rope_tables(config: "Path | dict[str, Any]", positions: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, float32 [positions, D/2], for positions 0, 1, ... of the decoder in config.json (or its folder).

    transformers' tables are [positions, D] with both halves the same; one half is kept. They are computed in float32
    as transformers does: float64 would move keys by 1e-4.
    Raises InputError for an unknown decoder type, or a table that would depend on the length of the sequence.
    """
    import torch

    document = config if isinstance(config, dict) else read_config(config)
    rotary = _rotary_module(document, positions)
    ids = torch.arange(positions)[None]
    with torch.no_grad():
        tables = [table[0].numpy() for table in rotary(torch.zeros(1, dtype=torch.float32), ids)]
    halves = []
    for table in tables:
        half = table.shape[1] // 2
        if not np.array_equal(table[:, :half], table[:, half:]):
            raise InputError(
                "this decoder's rotary table is not made of two equal halves",
                wanted="rotation of the two halves of each head, as in Llama",
                do="use a model with such a decoder",
            )
        halves.append(np.ascontiguousarray(table[:, :half]))
    return halves[0], halves[1]


def _rotary_module(document: dict[str, Any], positions: int) -> "nn.Module":
    """The rotary embedding of the decoder's transformers implementation."""
    text = text_config(document)
    parameters = getattr(text, "rope_parameters", None) or {}
    kind = parameters.get("rope_type", "default")
    trained = parameters.get("original_max_position_embeddings") or text.max_position_embeddings
    if kind in DEPENDS_ON_LENGTH and positions > trained:
        raise InputError(
            f"{kind} RoPE over {positions} positions",
            wanted=f"at most {trained}: beyond that its frequencies depend on the length of each sequence",
            do="lower --text-tokens or --max-new-tokens",
        )
    modeling = importlib.import_module(type(text).__module__.replace(".configuration_", ".modeling_"))
    names = [name for name in vars(modeling) if name.endswith("RotaryEmbedding") and "Vision" not in name]
    if len(names) != 1:
        raise InputError(f"a {text.model_type} decoder has no single rotary embedding", wanted="a Llama-like decoder")
    module: nn.Module = getattr(modeling, names[0])(text)
    return module


def positions(spec: DecoderSpec, profile: ShapeProfile) -> np.ndarray:
    """Positions, int64 [1 or 3, S + N], of every token of the unpruned sequence and of the N new tokens.

    Without M-RoPE the n-th token has position n. With it (Qwen2-VL, arXiv 2409.12191, section 2.1) a token has a
    temporal, a vertical and a horizontal position: all three are n for the P tokens before the image; an image token in
    row r and column c has P, P + r and P + c; the text goes on at the largest position so far + 1, which is less than
    its index. Padding does not matter: it comes after every real token.
    """
    total = profile.max_positions
    if spec.rope_sections is None:
        return np.arange(total)[None]
    start, stop = profile.prefix_tokens, profile.prefix_tokens + profile.image_tokens
    rows, columns = profile.grid
    axes = np.empty((3, total), np.int64)
    axes[:, :start] = np.arange(start)
    axes[0, start:stop] = start
    axes[1:, start:stop] = start + np.indices((rows, columns)).reshape(2, stop - start)
    axes[:, stop:] = start + max(rows, columns) + np.arange(total - stop)
    return axes


def token_tables(
    tables: tuple[np.ndarray, np.ndarray], spec: DecoderSpec, profile: ShapeProfile
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [S + N, D/2] of every token of the unpruned sequence and of the N new ones.

    `tables` are `rope_tables` of at least `profile.max_positions` rows. With M-RoPE section i of a token's row comes
    from the row of its position on axis i modulo 3.
    """
    axes = positions(spec, profile)
    if spec.rope_sections is None:
        return tables[0][: axes.shape[1]], tables[1][: axes.shape[1]]
    axis = np.repeat(np.arange(len(spec.rope_sections)) % 3, spec.rope_sections)  # [D/2]
    gathered = [np.ascontiguousarray(table[axes[axis].T, np.arange(len(axis))]) for table in tables]
    return gathered[0], gathered[1]
