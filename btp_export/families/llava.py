"""LLaVA-1.5 and its relatives with one fixed image size: CLIP or SigLIP tower, two-layer projector, Llama-like decoder.

The image becomes rows x columns patches, one token each, put where the prompt has its image placeholder.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from btp_export.families._decoder import decoder_spec
from graphs.checkpoint import Checkpoint
from graphs.errors import InputError
from graphs.profile import ShapeProfile
from graphs.spec import ModelSpec, Precision, VisionSpec
from graphs.strict import Strict, parse_record

if TYPE_CHECKING:
    from torch import nn

SETTINGS_FILE = "btp.json"
PRECISION_OF: dict[str, Precision] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
HAS_CLASS_TOKEN = {"clip_vision_model": True, "siglip_vision_model": False}


class Settings(Strict):
    """btp.json of a checkpoint folder: what the toolkit wants to know and transformers' files have no place for."""

    change_threshold: float | None = Field(default=None, gt=-1, lt=1)
    prefix_tokens: int | None = Field(default=None, ge=0)


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
        """The model as data; reads config.json, generation_config.json, btp.json and the tokenizer's chat template."""
        config = checkpoint.config
        settings = _settings(checkpoint.folder)
        eos, pad = _stop_tokens(checkpoint)
        stored = checkpoint["language_model.layers.0.self_attn.q_proj.weight"].dtype
        extra = {} if settings.change_threshold is None else {"change_threshold": settings.change_threshold}
        prefix = settings.prefix_tokens
        image_token = _image_token_id(config)
        return ModelSpec(
            model_type=self.model_type,
            name=name,
            decoder=decoder_spec(checkpoint),
            vision=vision_spec(config),
            prefix_tokens=count_prefix_tokens(checkpoint.folder, image_token) if prefix is None else prefix,
            image_token_id=image_token,
            eos_token_ids=eos,
            pad_token_id=pad,
            weight_dtype=PRECISION_OF[stored],
            **extra,
        )

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
        return ShapeProfile(
            name=f"b{batch}-{size[0]}x{size[1]}-t{text_tokens}-n{new_tokens}",
            batch=batch,
            image_size=size,
            grid=spec.vision.grid,
            prefix_tokens=spec.prefix_tokens,
            image_tokens=spec.vision.image_tokens,
            text_tokens=text_tokens,
            new_tokens=new_tokens,
        )

    def vision_module(self, checkpoint: Checkpoint) -> "nn.Module":
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
                layers = model.config.vision_feature_layer
                self.layers: list[int] = [layers] if isinstance(layers, int) else list(layers)
                self.first = 1 if model.config.vision_feature_select_strategy == "default" else 0

            def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
                states = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
                chosen = [states[layer][:, self.first :] for layer in self.layers]
                features: torch.Tensor = self.multi_modal_projector(torch.cat(chosen, dim=-1))
                return features

        config = LlavaConfig.from_dict(checkpoint.config)
        config.text_config.num_hidden_layers = 0  # only the image side is used; the decoder would cost its memory
        config.text_config.vocab_size, config.text_config.pad_token_id = 1, None
        model = LlavaModel(config).float()  # a configuration may ask for half precision
        model.language_model = nn.Identity()
        state = {
            name: torch.from_numpy(np.array(ref.read(), dtype=np.float32))
            for name, ref in checkpoint.tensors.items()
            if name.startswith(("vision_tower.", "multi_modal_projector.")) and not name.endswith(".position_ids")
        }
        _load(model, state, checkpoint)
        return ImageFeatures(model).eval().requires_grad_(False)


FAMILY = Llava()


def _load(model: "nn.Module", state: dict[str, Any], checkpoint: Checkpoint) -> None:
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        names = [*(f"{name} is missing" for name in missing), *(f"{name} is unknown" for name in unexpected)]
        raise InputError(
            f"{checkpoint.folder}: {len(names)} vision tensors do not fit: {names[0]}",
            wanted="the tower and projector that config.json describes",
            do="use the config.json and the safetensors files of the same model",
        )


def vision_spec(config: dict[str, Any]) -> VisionSpec:
    """Image size and token grid. Raises InputError if the tokens are not a grid of patches."""
    vision = config.get("vision_config") or {}
    tower = vision.get("model_type", "clip_vision_model")
    strategy = config.get("vision_feature_select_strategy", "default")
    has_class_token = HAS_CLASS_TOKEN.get(tower)
    if has_class_token is None:
        raise InputError(
            f"a {tower} vision tower", wanted=f"one of {', '.join(HAS_CLASS_TOKEN)}", do="use a model with one of them"
        )
    wanted_strategy = "default" if has_class_token else "full"
    if strategy != wanted_strategy:
        raise InputError(
            f"vision_feature_select_strategy {strategy!r} with a {tower}",
            wanted=f"{wanted_strategy!r}: the image tokens are the patches, no more and no fewer",
            do="use a model with this setting",
        )
    side, patch = _side(vision, "image_size", 336), _side(vision, "patch_size", 14)
    return VisionSpec(
        image_size=(side, side), grid=(side // patch, side // patch), channels=vision.get("num_channels", 3)
    )


def _side(vision: dict[str, Any], key: str, default: int) -> int:
    side = vision.get(key, default)
    if not isinstance(side, int) or side < 1:
        raise InputError(f"vision_config sets {key} to {side!r}", wanted="a number of pixels", do="restore config.json")
    return side


def _image_token_id(config: dict[str, Any]) -> int:
    token: int = config.get("image_token_id", config.get("image_token_index", 32000))
    return token


def _stop_tokens(checkpoint: Checkpoint) -> tuple[tuple[int, ...], int]:
    """eos ids and the pad id: generation_config.json, then config.json, then its text_config."""
    config = checkpoint.config
    sources = [_optional_json(checkpoint.folder / "generation_config.json"), config, config.get("text_config") or {}]
    eos = next((source["eos_token_id"] for source in sources if source.get("eos_token_id") is not None), 2)
    ids = (eos,) if isinstance(eos, int) else tuple(eos)
    pad = next((source["pad_token_id"] for source in sources if source.get("pad_token_id") is not None), ids[0])
    return ids, pad if pad >= 0 else ids[0]


def _settings(folder: Path) -> Settings:
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return Settings()
    return parse_record(Settings, path.read_bytes(), source=path, noun="settings file")


def _optional_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}", wanted="the model's own file", do="restore it") from error
    return document


def count_prefix_tokens(folder: Path, image_token_id: int) -> int:
    """P: tokens of the chat template before the first image token, by the checkpoint's own processor.

    Raises InputError if there are no processor files, no chat template, or no image placeholder in it.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} has no usable processor files: {str(error).splitlines()[0]}",
            wanted="tokenizer and processor files with a chat template",
            do='add them, or say where the image stands in btp.json: {"prefix_tokens": N}',
        ) from error
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    try:
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    except ValueError as error:
        raise InputError(
            f"{folder} has no chat template: {str(error).splitlines()[0]}",
            wanted="chat_template.jinja or a template in the tokenizer's configuration",
            do='add it, or say where the image stands in btp.json: {"prefix_tokens": N}',
        ) from error
    ids = processor.tokenizer(text)["input_ids"]
    if image_token_id not in ids:
        raise InputError(
            f"the chat template of {folder} puts no image token {image_token_id} in a prompt with a picture",
            wanted="a template that places it",
            do="use the processor files of the same model",
        )
    return int(ids.index(image_token_id))
