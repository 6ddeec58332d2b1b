"""The demo model: a small trained LLaVA that ships with the project, so that every command works with no download."""

from __future__ import annotations

from pathlib import Path


def checkpoint_path() -> Path:
    """The folder of the shipped checkpoint: config, float16 weights, tokenizer and processor files."""
    return Path(__file__).parent / "model"
