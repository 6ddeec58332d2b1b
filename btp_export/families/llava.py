"""LLaVA-1.5 and its relatives with one fixed image size: CLIP or SigLIP tower, two-layer projector, Llama-like decoder.

The image becomes rows x columns patches, one token each, put where the prompt has its image placeholder.
"""

from collections.abc import Mapping
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
from calibrate.place.presets import ReleasedSettings, ReleasedStage
from graphs.files.checkpoint import Checkpoint
from graphs.records.errors import InputError
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import ModelSpec, VisionSpec

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerFast

CLIP_336: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
VICUNA_7B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "vocab_size": 32064,
}
VICUNA_13B = VICUNA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
CONFIG: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "ignore_index": -100,
    "image_token_index": 32000,
    "image_seq_length": 576,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_config": CLIP_336,
}
SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001}
NAMED = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def save_processor(
    config: Mapping[str, Any], tokenizer: "PreTrainedTokenizerFast", template: str, folder: Path
) -> None:
    """Write transformers' own processor with the settings of the published files."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(**picture_size(config))
    LlavaProcessor(images, tokenizer, **counting(config), chat_template=template).save_pretrained(folder)


def picture_size(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an image processor that brings pictures to the tower's size."""
    side = config["vision_config"]["image_size"]
    return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}


def counting(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a processor that decide how many image tokens a picture becomes."""
    return {
        "patch_size": config["vision_config"]["patch_size"],
        "vision_feature_select_strategy": config.get("vision_feature_select_strategy", "default"),
        "num_additional_image_tokens": 1,
    }


DUMMY = DummyProcessor(
    special=SPECIAL,
    named=NAMED,
    extra={"image_token": "<image>"},
    opening="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. ",
    start="message['role'].upper() + ': '",
    image="'<image>\n'",
    end="' '",
    answer="'ASSISTANT:'",
    save=save_processor,
)


class Llava:
    """transformers' LlavaForConditionalGeneration."""

    model_type = "llava"
    models: tuple[KnownModel, ...] = (
        KnownModel("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf", CONFIG | {"text_config": VICUNA_7B}),
        KnownModel("llava-1.5-13b", "llava-hf/llava-1.5-13b-hf", CONFIG | {"text_config": VICUNA_13B}),
    )
    released: ReleasedSettings | None = ReleasedSettings(
        (
            ReleasedStage(layer=3, keep=1 / 2, attention=0.3, factor=3.7, diversity=0.3, seeds=1 / 4),
            ReleasedStage(layer=6, keep=1 / 4, attention=0.9, factor=1.5, diversity=0.1),
            ReleasedStage(layer=14, keep=1 / 12, attention=1.0, factor=1.2, diversity=0.0),
        ),
        drop_layer=22,
        num_layers=32,
    )
    dummy: DummyProcessor | None = DUMMY
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
        vision = VisionSpec(
            image_size=(side, side), grid=(patches, patches), channels=channels, class_token=has_class_token(config)
        )
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

    def vision_module(
        self, checkpoint: Checkpoint, image_size: tuple[int, int] | None = None, *, class_attention: bool = False
    ) -> "nn.Module":
        """transformers' own tower and projector, with the checkpoint's weights in float32."""
        import torch
        from torch import nn
        from transformers import LlavaConfig, LlavaModel

        if class_attention and not has_class_token(checkpoint.config):
            raise refuse_class_attention(str(checkpoint.folder))

        class ImageFeatures(nn.Module):
            """pixel_values [B,3,h,w] -> image features [B,V,C], and with `class_attention` that, [B,V] float32.

            LlavaModel.get_image_features gives a list with one entry per picture, which would put B slices and a
            concatenation into the graph; this keeps the batch whole.
            """

            def __init__(self, model: LlavaModel) -> None:
                super().__init__()
                self.vision_tower = model.vision_tower
                self.multi_modal_projector = model.multi_modal_projector
                self.patch_features = PatchFeatures(model.config)
                self.patch_features.trim(self.vision_tower)

            def forward(self, pixel_values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
                if class_attention:
                    patches, attention = self.patch_features.with_class_attention(self.vision_tower, pixel_values)
                    return self.multi_modal_projector(patches), attention
                features: torch.Tensor = self.multi_modal_projector(
                    self.patch_features(self.vision_tower, pixel_values)
                )
                return features

        model = image_side(LlavaModel, LlavaConfig.from_dict(checkpoint.config))
        load_vision(model, vision_state(checkpoint, ("vision_tower.", "multi_modal_projector.")), checkpoint)
        return ImageFeatures(model).eval().requires_grad_(False)


FAMILY = Llava()
