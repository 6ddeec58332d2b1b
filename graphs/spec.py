"""ModelSpec: everything graph building and running need to know about a model, as data.

A family (btp_export/families/<model_type>.py) makes it from a checkpoint's config.json; nothing below a family
looks at transformers' configuration objects.
"""

from typing import Literal

from pydantic import Field

from graphs.strict import Strict

Precision = Literal["float32", "float16", "bfloat16"]


class DecoderSpec(Strict):
    """A Llama-like decoder: RMSNorm, rotary attention with grouped keys, gated MLP."""

    num_layers: int  # L
    hidden_size: int  # C
    intermediate_size: int
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D
    vocab_size: int
    rms_norm_eps: float
    hidden_act: Literal["silu", "gelu", "gelu_pytorch_tanh"] = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    max_positions: int


class VisionSpec(Strict):
    """What the image side takes and gives at its default size."""

    image_size: tuple[int, int]  # height, width in pixels
    grid: tuple[int, int]  # rows, columns of image tokens
    channels: int = 3

    @property
    def image_tokens(self) -> int:
        """V at the default image size."""
        return self.grid[0] * self.grid[1]


class ModelSpec(Strict):
    """One model: its family, decoder, vision side and the token ids the runtime needs."""

    model_type: str  # transformers' model_type, also the family's name
    name: str  # what the user called it
    decoder: DecoderSpec
    vision: VisionSpec
    prefix_tokens: int = Field(ge=0)  # P of the chat template
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    weight_dtype: Precision  # of the checkpoint's matrices
    change_threshold: float = 0.93  # tau of the calibration, see algorithm.md; a setting of the model
