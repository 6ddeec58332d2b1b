"""LLaVA-1.5 and its relatives with one fixed image size: CLIP or SigLIP tower, two-layer projector, Llama-like decoder.

The image becomes rows x columns patches, one token each, put where the prompt has its image placeholder.
"""

from typing import TYPE_CHECKING

from btp_export.families._checkpoint import model_spec
from btp_export.families._vision import (
    Layout,
    PatchFeatures,
    grid_of_patches,
    image_side,
    image_token_id,
    load_vision,
    make_profile,
    vision_state,
)
from graphs.files.checkpoint import Checkpoint
from graphs.records.errors import InputError
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import ModelSpec, VisionSpec

if TYPE_CHECKING:
    from torch import nn


class Llava:
    """transformers' LlavaForConditionalGeneration."""

    model_type = "llava"
    renames: tuple[tuple[str, str], ...] = (
        ("language_model.model.", "language_model."),  # transformers 4
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.vision_model.", "vision_tower."),
        ("model.language_model.", "language_model."),  # transformers 5
        ("model.vision_tower.vision_model.", "vision_tower."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    )

    def spec(self, checkpoint: Checkpoint, name: str) -> ModelSpec:
        """The model as data."""
        config = checkpoint.config
        side, patches = grid_of_patches(config)
        channels = (config.get("vision_config") or {}).get("num_channels", 3)
        vision = VisionSpec(image_size=(side, side), grid=(patches, patches), channels=channels)
        return model_spec(
            checkpoint, model_type=self.model_type, name=name, vision=vision, image_token_id=image_token_id(config)
        )

    def layout(self, spec: ModelSpec, picture: tuple[int, int]) -> Layout:
        """Every picture is scaled to the one size."""
        return Layout(spec.vision.image_size, spec.vision.grid)

    def profile(
        self,
        spec: ModelSpec,
        *,
        batch: int,
        image_size: tuple[int, int] | None,
        text_tokens: int,
        new_tokens: int,
    ) -> ShapeProfile:
        """The one image size the model has. Raises InputError for another one."""
        size = spec.vision.image_size
        if image_size is not None and image_size != size:
            raise InputError(
                f"image size {image_size[0]} x {image_size[1]}",
                wanted=f"{size[0]} x {size[1]}, the only size of {spec.name}",
                do="leave the image size out: pictures of any size are scaled to it",
            )
        layout = self.layout(spec, size)
        return make_profile(spec, layout, batch=batch, image_size=size, text_tokens=text_tokens, new_tokens=new_tokens)

    def vision_module(self, checkpoint: Checkpoint, image_size: tuple[int, int] | None = None) -> "nn.Module":
        """transformers' own tower and projector, with the checkpoint's weights in float32."""
        import torch
        from torch import nn
        from transformers import LlavaConfig, LlavaModel

        class ImageFeatures(nn.Module):
            """pixel_values [B,3,h,w] -> image features [B,V,C].

            LlavaModel.get_image_features gives a list with one entry per picture, which would put B slices and a
            concatenation into the graph; this keeps the batch whole.
            """

            def __init__(self, model: LlavaModel) -> None:
                super().__init__()
                self.vision_tower = model.vision_tower
                self.multi_modal_projector = model.multi_modal_projector
                self.patch_features = PatchFeatures(model.config)

            def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
                patches = self.patch_features(self.vision_tower, pixel_values)
                features: torch.Tensor = self.multi_modal_projector(patches)
                return features

        model = image_side(LlavaModel, LlavaConfig.from_dict(checkpoint.config))
        load_vision(model, vision_state(checkpoint, ("vision_tower.", "multi_modal_projector.")), checkpoint)
        return ImageFeatures(model).eval().requires_grad_(False)


FAMILY = Llava()
