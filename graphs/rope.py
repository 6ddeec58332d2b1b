"""RoPE tables from transformers' own rotary module, so that every scaling type is transformers' and not ours."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphs.checkpoint import read_config
from graphs.errors import InputError

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
    from transformers import AutoConfig

    fields = dict(document.get("text_config") or {})
    model_type = fields.pop("model_type", "llama")
    try:
        text = AutoConfig.for_model(model_type, **fields)
    except (TypeError, ValueError) as error:
        raise InputError(f"text_config: {error}", wanted=f"a {model_type} configuration", do="restore it") from error
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
    names = [name for name in vars(modeling) if name.endswith("RotaryEmbedding")]
    if len(names) != 1:
        raise InputError(f"a {model_type} decoder has no single rotary embedding", wanted="a Llama-like decoder")
    module: nn.Module = getattr(modeling, names[0])(text)
    return module
