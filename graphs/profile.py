"""ShapeProfile: the static shapes one set of graphs is built for."""

from pydantic import Field

from graphs.strict import Strict


class ShapeProfile(Strict):
    """Batch B, prefix P, image tokens V on a grid, text bucket T and room for new tokens."""

    name: str
    batch: int = Field(default=1, ge=1)
    image_size: tuple[int, int]  # height, width in pixels after the processor
    grid: tuple[int, int]  # rows, columns of image tokens
    prefix_tokens: int = Field(ge=0)  # P
    image_tokens: int = Field(ge=1)  # V
    text_tokens: int = Field(ge=1)  # T, the padded bucket
    new_tokens: int = Field(ge=1)  # room in the caches for generated tokens

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
