"""ModelSpec: everything graph building and running need to know about a model, as data.

A family (btp_export/families/<model_type>.py) makes it from a checkpoint's config.json; nothing below a family
looks at transformers' configuration objects.
"""

from typing import Literal

from pydantic import Field, model_validator

from graphs.dtypes import Precision
from graphs.records.generation import GenerationSettings
from graphs.records.record import Layers, Record, Size
from graphs.records.token_layout import Blocks, blocks_field, check_blocks, count_tokens


class DecoderSpec(Record):
    """A Llama-like decoder: RMSNorm, rotary attention with grouped keys, gated MLP."""

    num_layers: Layers  # L
    hidden_size: Size  # C
    intermediate_size: Size
    num_heads: Size  # H
    num_kv_heads: Size  # K
    head_dim: Size  # D
    vocab_size: Size
    rms_norm_eps: float
    hidden_act: Literal["silu", "gelu", "gelu_pytorch_tanh"] = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    # M-RoPE (three positions a token): how D/2 is divided among temporal, vertical and horizontal, in turn
    rope_sections: tuple[int, ...] | None = Field(default=None, exclude_if=lambda sections: sections is None)
    max_positions: Size

    @property
    def layer_elements(self) -> int:
        """Elements of one layer's matrices: q, k, v and o, gate, up and down."""
        attention = 2 * self.head_dim * (self.num_heads + self.num_kv_heads)
        return self.hidden_size * (attention + 3 * self.intermediate_size)

    @property
    def head_elements(self) -> int:
        """Elements of the output matrix, and of the embedding."""
        return self.hidden_size * self.vocab_size

    @model_validator(mode="after")
    def _check(self) -> "DecoderSpec":
        if self.rope_sections is not None and 2 * sum(self.rope_sections) != self.head_dim:
            raise ValueError(f"rope_sections {self.rope_sections} do not add up to half of head_dim {self.head_dim}")
        return self


class VisionSpec(Record):
    """What the image side takes and gives at its default size.

    A `dynamic` model takes pictures of any size; the family says what tokens each becomes. `pinpoints` are the sizes,
    height x width, that LLaVA-1.6 scales a picture to, in tiles of `tile` pixels.
    """

    image_size: tuple[int, int]  # height, width in pixels
    grid: tuple[int, int]  # rows, columns of image tokens
    channels: int = 3
    blocks: Blocks = blocks_field()  # where the tokens are not one grid, see graphs/records/token_layout.py
    dynamic: bool = Field(default=False, exclude_if=lambda dynamic: not dynamic)
    pinpoints: tuple[tuple[int, int], ...] = Field(default=(), exclude_if=lambda sizes: not sizes)
    tile: int | None = Field(default=None, exclude_if=lambda side: side is None)
    # Where pixel_values are flattened patches (Qwen2.5-VL): patches that make one token, numbers in each
    patches: tuple[int, int] | None = Field(default=None, exclude_if=lambda patches: patches is None)
    # Whether the tower has a class token, whose attention a plan may score by; None: of a bundle that does not say
    class_token: bool | None = Field(default=None, exclude_if=lambda has: has is None)
    # Least and most pixels that the model's processor scales a picture to
    pixel_range: tuple[int, int] | None = Field(default=None, exclude_if=lambda bounds: bounds is None)

    @model_validator(mode="after")
    def _check(self) -> "VisionSpec":
        check_blocks(self.blocks, self.grid, self.image_tokens)
        return self

    @property
    def image_tokens(self) -> int:
        """V at the default image size."""
        return count_tokens(self.blocks or (self.grid,))


class ModelSpec(Record):
    """One model: its family, decoder, vision side and the token ids the runtime needs."""

    model_type: str  # transformers' model_type, also the family's name
    name: str  # what the user called it
    decoder: DecoderSpec
    vision: VisionSpec
    prefix_tokens: int = Field(ge=0)  # P of the chat template
    image_token_id: int
    eos_token_ids: tuple[int, ...]  # none: answers end where there is no more room
    pad_token_id: int
    weight_dtype: Precision  # of the checkpoint's matrices
    change_threshold: float = 0.93  # tau of the calibration, see algorithm.md; a setting of the model
    system: str | None = None  # the system message that P counts; None: what the chat template writes by itself
    generation: GenerationSettings = Field(
        default=GenerationSettings(), exclude_if=lambda settings: settings == GenerationSettings()
    )
