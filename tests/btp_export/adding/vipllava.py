"""A family that the toolkit does not have: ViP-LLaVA, whose projector reads five layers of the tower through a norm.

A test puts this file into the families' folder list; it must be all that a family takes.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from btp_export.families._checkpoint import model_spec
from btp_export.families._known import KnownModel
from btp_export.families._vision import image_side, image_token_id, load_vision, vision_state
from btp_export.families.llava import CLIP_336, CONFIG, DUMMY, VICUNA_7B, Llava
from calibrate.place.presets import ReleasedSettings, ReleasedStage
from graphs.files.checkpoint import Checkpoint
from graphs.records.spec import ModelSpec, VisionSpec

if TYPE_CHECKING:
    from torch import nn

TINY: dict[str, Any] = {
    **{name: value for name, value in CONFIG.items() if not name.startswith("vision_feature")},
    "architectures": ["VipLlavaForConditionalGeneration"],
    "model_type": "vipllava",
    "image_seq_length": 36,
    "vision_feature_layers": [-2, -1, 1],
    "text_config": VICUNA_7B
    | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "vision_config": CLIP_336
    | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 84,
    },
}


class VipLlava(Llava):
    """transformers' VipLlavaForConditionalGeneration."""

    model_type = "vipllava"
    models = (KnownModel("vip-tiny", "nobody/vip-tiny", TINY),)
    released = ReleasedSettings((ReleasedStage(2, 1 / 3, 0.5, 1.0, None),), drop_layer=4, num_layers=5)
    dummy = replace(DUMMY, opening="A look at regions. ")

    def spec(self, checkpoint: Checkpoint, name: str) -> ModelSpec:
        vision = checkpoint.config["vision_config"]
        side, patches = vision["image_size"], vision["image_size"] // vision["patch_size"]
        return model_spec(
            checkpoint,
            model_type=self.model_type,
            name=name,
            vision=VisionSpec(image_size=(side, side), grid=(patches, patches)),
            image_token_id=image_token_id(checkpoint.config),
        )

    def vision_module(
        self, checkpoint: Checkpoint, image_size: tuple[int, int] | None = None, *, class_attention: bool = False
    ) -> "nn.Module":
        import torch
        from torch import nn
        from transformers import VipLlavaConfig, VipLlavaModel

        class ImageFeatures(nn.Module):
            def __init__(self, model: VipLlavaModel) -> None:
                super().__init__()
                self.tower, self.projector = model.vision_tower, model.multi_modal_projector
                self.layers = model.config.vision_feature_layers

            def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
                states = self.tower(pixel_values, output_hidden_states=True).hidden_states
                features: torch.Tensor = self.projector(torch.cat([states[n][:, 1:] for n in self.layers], dim=-1))
                return features

        model = image_side(VipLlavaModel, VipLlavaConfig.from_dict(checkpoint.config))
        load_vision(model, vision_state(checkpoint, ("vision_tower.", "multi_modal_projector.")), checkpoint)
        return ImageFeatures(model).eval().requires_grad_(False)


FAMILY = VipLlava()
