"""LLaVA-1.6 (LLaVA-NeXT): pictures of any size in tiles ("anyres"), CLIP tower, projector, Llama-like decoder.

A picture is seen twice: squeezed into one square of the tower's size (the base view), and scaled with its proportions
into the best of a few sizes, the pinpoints, padded and cut into squares of that size (the tiles). Every square gives
the same number of patches. The tokens are those of the base view, then those of the tiles put together again, without
the rows or columns that are nothing but padding, and with a learned newline token at the end of each row.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btp_export.families._checkpoint import model_spec
from btp_export.families._known import DummyProcessor, KnownModel
from btp_export.families._vision import (
    Layout,
    PatchFeatures,
    grid_of_patches,
    has_class_token,
    image_side,
    image_token_id,
    load_vision,
    make_profile,
    refuse_class_attention,
    vision_state,
)
from btp_export.families.llava import CONFIG, DUMMY, VICUNA_7B, Llava, counting, picture_size
from btp_export.preprocess.sizes import best_size
from graphs.files.checkpoint import Checkpoint
from graphs.records.errors import InputError
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import ModelSpec, VisionSpec
from graphs.records.token_layout import Grid

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerFast

PINPOINTS = (
    (336, 672),
    (672, 336),
    (672, 672),
    (1008, 336),
    (336, 1008),
)  # transformers' own where config.json has none


VICUNA_1_6 = {
    "architectures": ["LlavaNextForConditionalGeneration"],
    "model_type": "llava_next",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "use_image_newline_parameter": True,
    "text_config": VICUNA_7B,
}


def save_processor(
    config: Mapping[str, Any], tokenizer: "PreTrainedTokenizerFast", template: str, folder: Path
) -> None:
    """Write transformers' own processor with the settings of the published files."""
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    images = LlavaNextImageProcessorPil(**picture_size(config), image_grid_pinpoints=config["image_grid_pinpoints"])
    LlavaNextProcessor(images, tokenizer, **counting(config), chat_template=template).save_pretrained(folder)


class LlavaNext:
    """transformers' LlavaNextForConditionalGeneration."""

    model_type = "llava_next"
    models: tuple[KnownModel, ...] = (
        KnownModel("llava-1.6-7b", "llava-hf/llava-v1.6-vicuna-7b-hf", CONFIG | VICUNA_1_6),
    )
    released = Llava.released
    dummy: DummyProcessor | None = replace(
        DUMMY,
        opening="A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. ",
        save=save_processor,
    )
    renames: tuple[tuple[str, str], ...] = (*Llava.renames, ("model.image_newline", "image_newline"))

    def spec(self, checkpoint: Checkpoint, name: str) -> ModelSpec:
        """The model as data; its own image size is the largest pinpoint."""
        config = checkpoint.config
        side, patches = grid_of_patches(config)
        pinpoints = _pinpoints(config, side)
        size = max(pinpoints, key=lambda size: size[0] * size[1])
        layout = _layout(size, pinpoints, side, patches)
        vision = VisionSpec(
            image_size=size,
            grid=layout.grid,
            blocks=layout.blocks,
            dynamic=True,
            pinpoints=pinpoints,
            tile=side,
            class_token=has_class_token(config),
        )
        return model_spec(
            checkpoint, model_type=self.model_type, name=name, vision=vision, image_token_id=image_token_id(config)
        )

    def layout(self, spec: ModelSpec, picture: tuple[int, int]) -> Layout:
        """The base view's tokens and those of the tiles of the best pinpoint.

        Raises InputError for a picture so long that its tiles are all padding.
        """
        vision = spec.vision
        assert vision.tile is not None
        return _layout(picture, vision.pinpoints, vision.tile, vision.blocks[0][0])

    def profile(
        self,
        spec: ModelSpec,
        *,
        batch: int,
        image_size: tuple[int, int] | None,
        text_tokens: int,
        new_tokens: int,
    ) -> ShapeProfile:
        """Pictures of that size, and all others that become the same tokens."""
        size = image_size or spec.vision.image_size
        layout = self.layout(spec, size)
        return make_profile(spec, layout, batch=batch, image_size=size, text_tokens=text_tokens, new_tokens=new_tokens)

    def vision_module(
        self, checkpoint: Checkpoint, image_size: tuple[int, int] | None = None, *, class_attention: bool = False
    ) -> "nn.Module":
        """transformers' own tower, projector, unpadding and newlines, with the checkpoint's weights in float32."""
        import torch
        from torch import nn
        from transformers import LlavaNextConfig, LlavaNextModel

        if class_attention and not has_class_token(checkpoint.config):
            raise refuse_class_attention(str(checkpoint.folder))

        config = LlavaNextConfig.from_dict(checkpoint.config)
        side, _ = grid_of_patches(checkpoint.config)
        pinpoints = _pinpoints(checkpoint.config, side)
        config.image_grid_pinpoints = [list(size) for size in pinpoints]
        size = image_size or max(pinpoints, key=lambda pinpoint: pinpoint[0] * pinpoint[1])

        class ImageFeatures(nn.Module):
            """pixel_values [B, 1 + tiles, 3, s, s] -> image features [B,V,C], for pictures of one size.

            With `class_attention` that too, [B,V] float32: each patch's from its own square, 0 for newline tokens.
            LlavaNextModel.get_image_features takes the sizes as a tensor and looks into it; here they are a constant.
            """

            def __init__(self, model: LlavaNextModel) -> None:
                super().__init__()
                self.vision_tower = model.vision_tower
                self.multi_modal_projector = model.multi_modal_projector
                self.image_newline = model.image_newline
                self.patch_features = PatchFeatures(config)
                self.patch_features.trim(self.vision_tower)
                self.pack = model.pack_image_features

            def forward(self, pixel_values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
                batch, squares = pixel_values.shape[:2]
                pixels = pixel_values.flatten(0, 1)
                if class_attention:
                    patches, attention = self.patch_features.with_class_attention(self.vision_tower, pixels)
                    by_square = attention.reshape(batch, squares, -1, 1)
                    scores = self._packed(by_square, torch.zeros(1, dtype=attention.dtype, device=attention.device))
                else:
                    patches = self.patch_features(self.vision_tower, pixels)
                features = self.multi_modal_projector(patches).unflatten(0, (batch, squares))
                packed = self._packed(features, self.image_newline)
                return (packed, scores[..., 0]) if class_attention else packed

            def _packed(self, rows: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
                """Rows [B, 1 + tiles, patches, c] in the tokens' order, [B,V,c]."""
                strategy = config.vision_feature_select_strategy
                packed, _ = self.pack(list(rows), [list(size)] * len(rows), strategy, newline)
                return torch.stack(packed)

        model = image_side(LlavaNextModel, config)
        prefixes = ("vision_tower.", "multi_modal_projector.", "image_newline")
        load_vision(model, vision_state(checkpoint, prefixes), checkpoint)
        return ImageFeatures(model).eval().requires_grad_(False)


FAMILY = LlavaNext()


def _pinpoints(config: dict[str, Any], side: int) -> tuple[tuple[int, int], ...]:
    """Height and width of each. Raises InputError unless all can be cut into squares of `side` pixels."""
    if config.get("use_image_newline_parameter") is False:
        raise InputError(
            "config.json sets use_image_newline_parameter to false",
            wanted="a newline token after each row of tiles, as transformers computes it",
            do="use a model with this setting",
        )
    given = config.get("image_grid_pinpoints") or PINPOINTS
    try:
        pinpoints = tuple((int(height), int(width)) for height, width in given)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"config.json sets image_grid_pinpoints to {given!r}"[:200],
            wanted="a list of heights and widths in pixels",
            do="restore config.json",
        ) from error
    for height, width in pinpoints:
        if min(height, width) < side or height % side or width % side:
            raise InputError(
                f"an image grid of {height} x {width} pixels with a tower that sees {side} x {side}",
                wanted=f"multiples of {side}",
                do="restore image_grid_pinpoints and vision_config of config.json",
            )
    return pinpoints


def _layout(picture: tuple[int, int], pinpoints: tuple[tuple[int, int], ...], side: int, patches: int) -> Layout:
    """What a picture (height, width) becomes, with squares of `side` pixels and `patches` x `patches` tokens."""
    best = best_size(picture, pinpoints)
    tiles = (best[0] // side, best[1] // side)
    rows, columns = _unpadded(picture, (tiles[0] * patches, tiles[1] * patches))
    if min(rows, columns) < 1:
        raise InputError(
            f"image size {picture[0]} x {picture[1]}: nothing of it is left in tiles of {best[0]} x {best[1]}",
            wanted="a picture whose sides differ less",
            do="crop it",
        )
    blocks = ((patches, patches), (rows, columns + 1))  # a newline token ends each row of the tiles
    return Layout(best, (rows, columns), blocks, pixel_shape=(1, 1 + tiles[0] * tiles[1], 3, side, side))


def _unpadded(picture: tuple[int, int], padded: Grid) -> Grid:
    """Rows and columns that the picture takes of the padded grid.

    As many are cut away on both sides as are padding, rounded down. The rounding of the division by floats is that of
    transformers (unpad_image), because it decides.
    """
    height, width = picture
    rows, columns = padded
    if width / height > columns / rows:
        filled = int(round(height * (columns / width), 7))
        return rows - (rows - filled) // 2 * 2, columns
    filled = int(round(width * (rows / height), 7))
    return rows, columns - (columns - filled) // 2 * 2
