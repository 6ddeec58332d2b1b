"""preprocess.json of a bundle ("btp-preprocess/1"): how pictures become pixels and prompts become token ids.

`export` writes it from transformers' processor and proves that both give the same; running a bundle reads it, and then
needs numpy, Pillow, tokenizers and jinja2 only. Steps on pictures are taken in the order of the fields.
"""

from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from graphs.records.record import Name, Record

PREPROCESS: Final = "preprocess.json"
Side = Annotated[int, Field(ge=1, le=65_536)]  # of a picture or a part of it, in pixels
Size = tuple[Side, Side]  # height, width
Filter = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]  # Pillow's


class ShortestEdge(Record):
    """Scaled with its proportions until the shorter side has `pixels`, and the longer one at most `longest`."""

    rule: Literal["shortest-edge"] = "shortest-edge"
    pixels: Side
    longest: Side | None = None


class ExactSize(Record):
    """Scaled to one size, whatever its proportions."""

    rule: Literal["exact"] = "exact"
    size: Size


class PixelRange(Record):
    """Scaled to sides that are multiples of `multiple`, with `least` to `most` pixels in all."""

    rule: Literal["pixel-range"] = "pixel-range"
    multiple: Side
    least: Annotated[int, Field(ge=1)]
    most: Annotated[int, Field(ge=1)]


class Tiles(Record):
    """LLaVA-1.6: the whole picture scaled to `base`, then the picture in the best of `sizes` cut into squares.

    Scaled with its proportions into that size, padded with zeros around, and cut into squares of `tile` pixels.
    """

    base: Size
    sizes: Annotated[tuple[Size, ...], Field(min_length=1)]
    tile: Side


class Patches(Record):
    """Qwen2.5-VL: flattened squares of `side` pixels, `merge` x `merge` neighbours together, each `frames` times."""

    side: Side
    merge: Annotated[int, Field(ge=1, le=64)]
    frames: Annotated[int, Field(ge=1, le=64)]


class PictureSteps(Record):
    """From an RGB picture to float32 pixels; what is None is left out.

    square: the colour with which a picture is first padded to a square. tiles: the parts on which all that follows is
    done, each by itself. crop: the middle of that size, padded with zeros where the picture is smaller. Then each value
    times `rescale`, minus `mean` and through `deviation` of its channel, each step rounded to float32.
    """

    square: tuple[int, int, int] | None = None
    tiles: Tiles | None = None
    resize: Annotated[ShortestEdge | ExactSize | PixelRange, Field(discriminator="rule")] | None = None
    filter: Filter = "bicubic"
    crop: Size | None = None
    rescale: float | None = None
    mean: tuple[float, float, float] | None = None
    deviation: tuple[float, float, float] | None = None
    patches: Patches | None = None

    @model_validator(mode="after")
    def _check(self) -> "PictureSteps":
        if (self.mean is None) != (self.deviation is None):
            raise ValueError("mean and deviation go together")
        if self.deviation is not None and 0 in self.deviation:
            raise ValueError("a deviation of 0")
        if self.tiles is not None and self.patches is not None:
            raise ValueError("tiles and patches exclude each other")
        return self


class TextSteps(Record):
    """From a prompt to token ids.

    tokenizer: its file in processor/, as the tokenizers library writes it. split_special: special tokens in a prompt
    are plain text. clean_up: spaces before punctuation are taken out of generated text. template: the chat template in
    Jinja, to which `special` tokens are known by name (bos_token, ...); None where there is none. image_token: what
    stands for one image token in a text. placeholders: those of other inputs (video_token, ...), which no prompt may
    hold. unknown_id: of the token for words that the tokenizer does not know.
    """

    tokenizer: Name
    split_special: bool = False
    clean_up: bool = False
    template: str | None
    special: dict[str, str]
    image_token: Annotated[str, Field(min_length=1)]
    placeholders: dict[str, str] = Field(default_factory=dict)
    unknown_id: int | None = None


class Preprocess(Record):
    """The whole of preprocess.json."""

    format: Literal["btp-preprocess/1"] = "btp-preprocess/1"
    picture: PictureSteps
    text: TextSteps
