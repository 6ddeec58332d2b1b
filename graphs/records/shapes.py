"""ShapeProfile: the static shapes one set of graphs is built for."""

from pydantic import Field, model_validator

from graphs.records.record import MOST_TOKENS, Name, Record, Tokens
from graphs.records.token_layout import Blocks, blocks_field, check_blocks


class ShapeProfile(Record):
    """Batch B, prefix P, image tokens V on a grid, text bucket T and room for new tokens.

    `blocks` is there where the image tokens are not one grid: rows x columns of each block of tokens, in order (see
    graphs/records/token_layout.py). `pixel_shape` is the shape of `pixel_values` where it is not [B, channels, h, w]:
    exactly what the model's processor returns for a batch.
    """

    name: Name
    batch: int = Field(default=1, ge=1, le=2**16)
    image_size: tuple[int, int]  # height, width in pixels of the pictures it is built for
    grid: tuple[int, int]  # rows, columns of image tokens
    blocks: Blocks = blocks_field()
    pixel_shape: tuple[int, ...] | None = Field(default=None, exclude_if=lambda shape: shape is None)
    prefix_tokens: int = Field(ge=0, le=MOST_TOKENS)  # P
    image_tokens: Tokens  # V
    text_tokens: Tokens  # T, the padded bucket
    new_tokens: Tokens  # room in the caches for generated tokens

    @model_validator(mode="after")
    def _check(self) -> "ShapeProfile":
        check_blocks(self.blocks, self.grid, self.image_tokens)
        if self.pixel_shape is not None and (min(self.pixel_shape, default=0) < 1 or self.pixel_shape[0] % self.batch):
            raise ValueError(f"pixel_shape {self.pixel_shape} does not hold a batch of {self.batch}")
        return self

    def pixel_input(self, channels: int = 3) -> tuple[int, ...]:
        """The shape of the vision graph's `pixel_values`."""
        return self.pixel_shape or (self.batch, channels, *self.image_size)

    @property
    def total_tokens(self) -> int:
        """S = P + V + T of the unpruned sequence."""
        return self.tokens_with(self.image_tokens)

    def tokens_with(self, image_tokens: int) -> int:
        """S_i of a segment that sees `image_tokens` image tokens."""
        return self.prefix_tokens + image_tokens + self.text_tokens

    def capacity_with(self, image_tokens: int) -> int:
        """Rows of a layer's key or value cache: the segment's tokens and the new ones."""
        return self.tokens_with(image_tokens) + self.new_tokens

    @property
    def max_positions(self) -> int:
        """Positions that can occur: the unpruned sequence and the new tokens."""
        return self.capacity_with(self.image_tokens)
