"""Qwen2.5-VL: a vision transformer with windows for pictures of any size, 2 x 2 patches a token, M-RoPE, Qwen2 decoder.

A picture is scaled to a multiple of 28 pixels on each side and cut into 14 x 14 patches, which the processor hands over
flattened, each twice (the tower takes two frames at a time). Four neighbours become one token, so a picture of H x W
pixels gives (H / 28) x (W / 28) tokens.

The tower is transformers' with other plumbing. Its forward turns the grid into lists, which torch.export cannot follow,
and runs windows one by one. Here the grid is fixed when the module is made: see _qwen_vision.py and
docs/decisions/qwen-vision-capture.md.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btp_export.families._checkpoint import model_spec
from btp_export.families._known import DummyProcessor, KnownModel
from btp_export.families._processor import check_files, readable_folder
from btp_export.families._vision import (
    Layout,
    load_vision,
    make_profile,
    refuse_class_attention,
    vision_state,
)
from btp_export.preprocess.sizes import in_pixel_range
from calibrate.place.presets import ReleasedSettings, ReleasedStage
from graphs.files.checkpoint import Checkpoint
from graphs.files.configuration import refusing_config
from graphs.records.errors import InputError
from graphs.records.reading import read_object
from graphs.records.refusing import refusing
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import ModelSpec, VisionSpec

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerFast

DEFAULT_SIDE = 672  # 24 x 24 = 576 tokens, as many as LLaVA-1.5 has
PIXEL_RANGE = (56 * 56, 28 * 28 * 1280)  # of transformers' image processor, where the checkpoint brings none

DECODER_7B: dict[str, Any] = {
    "model_type": "qwen2_5_vl_text",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "sliding_window": 32768,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}
TOWER: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
CONFIG_7B: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "text_config": DECODER_7B,
    "vision_config": TOWER,
}
# Settings of published files without effect; text_config repeats ids of the whole model (transformers 4.52 to 4.57).
UNUSED = frozenset({"in_chans", "spatial_patch_size", "image_token_id", "video_token_id", "vision_token_id"})
UNUSED |= {"vision_start_token_id", "vision_end_token_id"}
SPECIAL = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}


def save_processor(
    config: Mapping[str, Any], tokenizer: "PreTrainedTokenizerFast", template: str, folder: Path
) -> None:
    """Write the files as they are published; transformers builds a Qwen processor only where torchvision is."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    vision = config["vision_config"]
    images = Qwen2VLImageProcessorPil(
        patch_size=vision["patch_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        merge_size=vision["spatial_merge_size"],
        size={"shortest_edge": 3136, "longest_edge": 12845056},  # pixels, as published
    )
    images.save_pretrained(folder)
    document = read_object(folder / "preprocessor_config.json")
    document |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


class Qwen2_5_VL:
    """transformers' Qwen2_5_VLForConditionalGeneration, pictures only."""

    model_type = "qwen2_5_vl"
    models: tuple[KnownModel, ...] = (KnownModel("qwen2.5-vl-7b", "Qwen/Qwen2.5-VL-7B-Instruct", CONFIG_7B),)
    released: ReleasedSettings | None = ReleasedSettings(
        (
            ReleasedStage(layer=3, keep=1 / 2, attention=0.1, factor=1.2, diversity=None),
            ReleasedStage(layer=6, keep=1 / 4, attention=0.4, factor=1.2, diversity=None),
            ReleasedStage(layer=15, keep=1 / 8, attention=1.0, factor=1.2, diversity=None),
        ),
        drop_layer=22,
        num_layers=28,
        caution="dropping every image token at layer 22 loses reading: an independent run found TextVQA 86.2 -> 23.3, "
        "DocVQA 94.7 -> 19.2 (docs/calibration.md); btp-paper-corrected keeps 12.5 % to the end",
    )
    dummy: DummyProcessor | None = DummyProcessor(
        special=SPECIAL,
        named={"unk_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        extra={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        opening="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        start="'<|im_start|>' + message['role'] + '\n'",
        image="'<|vision_start|><|image_pad|><|vision_end|>'",
        end="'<|im_end|>\n'",
        answer="'<|im_start|>assistant\n'",
        save=save_processor,
    )
    renames: tuple[tuple[str, str], ...] = (
        ("model.language_model.", "language_model."),  # transformers 5
        ("model.visual.", "visual."),
        ("model.", "language_model."),  # transformers 4, where `visual.` stands beside
    )

    def spec(self, checkpoint: Checkpoint, name: str) -> ModelSpec:
        """The model as data."""
        token = checkpoint.config.get("image_token_id", 151655)
        return model_spec(
            checkpoint,
            model_type=self.model_type,
            name=name,
            vision=_vision_spec(checkpoint),
            image_token_id=token,
            unused=UNUSED,
        )

    def layout(self, spec: ModelSpec, picture: tuple[int, int]) -> Layout:
        """The nearest size the processor scales to: its area within the model's bounds, about the picture's shape."""
        vision, cell = spec.vision, _cell(spec.vision)
        height, width = in_pixel_range(picture, cell, *(vision.pixel_range or PIXEL_RANGE))
        grid = (height // cell, width // cell)
        patches, values = vision.patches or (4, 1176)
        return Layout((height, width), grid, pixel_shape=(grid[0] * grid[1] * patches, values))

    def profile(
        self,
        spec: ModelSpec,
        *,
        batch: int,
        image_size: tuple[int, int] | None,
        text_tokens: int,
        new_tokens: int,
    ) -> ShapeProfile:
        """Any size that the processor leaves as it is. Raises InputError for another, naming the nearest."""
        size = image_size or spec.vision.image_size
        layout = self.layout(spec, size)
        if layout.size != size:
            least, most = spec.vision.pixel_range or PIXEL_RANGE
            cell = _cell(spec.vision)
            raise InputError(
                f"image size {size[0]} x {size[1]}",
                wanted=f"height and width multiples of {cell}, {least} to {most} pixels in all",
                do=f"--image-size {layout.size[0]}x{layout.size[1]}, the nearest",
            )
        return make_profile(spec, layout, batch=batch, image_size=size, text_tokens=text_tokens, new_tokens=new_tokens)

    def vision_module(
        self, checkpoint: Checkpoint, image_size: tuple[int, int] | None = None, *, class_attention: bool = False
    ) -> "nn.Module":
        """transformers' own tower and merger with the checkpoint's weights in float32, for one grid of patches."""
        import torch
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

        from btp_export.families._qwen_vision import ImageFeatures

        if class_attention:
            raise refuse_class_attention(str(checkpoint.folder))

        config = _vision_config(checkpoint)
        with torch.device("meta"):  # no weights of its own: those of the checkpoint are put in its place
            tower = Qwen2_5_VisionTransformerPretrainedModel(config).float()
        state = vision_state(checkpoint, ("visual.",))
        load_vision(tower, {name.removeprefix("visual."): tensor for name, tensor in state.items()}, checkpoint)
        tower.rotary_pos_emb = type(tower.rotary_pos_emb)(config)  # only tables, which its constructor computes
        height, width = image_size or _vision_spec(checkpoint).image_size
        grid = (height // config.patch_size, width // config.patch_size)
        return ImageFeatures(tower, grid).eval().requires_grad_(False)


FAMILY = Qwen2_5_VL()


def _vision_spec(checkpoint: Checkpoint) -> VisionSpec:
    """Default picture size, patches and bounds."""
    vision = _vision_config(checkpoint)
    patch, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    cell = patch * merge
    bounds = _pixel_range(checkpoint.folder, (patch, merge, frames))
    size = in_pixel_range((DEFAULT_SIDE, DEFAULT_SIDE), cell, *bounds)
    return VisionSpec(
        image_size=size,
        grid=(size[0] // cell, size[1] // cell),
        channels=vision.in_channels,
        dynamic=True,
        class_token=False,
        patches=(merge * merge, vision.in_channels * frames * patch * patch),
        pixel_range=bounds,
    )


def _vision_config(checkpoint: Checkpoint) -> Any:
    """transformers' own configuration object of the tower. Raises InputError for settings that it refuses."""
    from transformers import Qwen2_5_VLConfig

    with refusing_config("config.json", "qwen2_5_vl"):
        return Qwen2_5_VLConfig.from_dict(copy.deepcopy(checkpoint.config)).vision_config


def _pixel_range(folder: Path, sizes: tuple[int, int, int]) -> tuple[int, int]:
    """Least and most pixels of a picture by the checkpoint's image processor; `sizes` are the tower's."""
    from transformers import AutoImageProcessor

    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return PIXEL_RANGE  # the prefix then comes from btp.json, or its absence is said
    check_files(folder)
    with (
        readable_folder(folder) as readable,
        refusing(
            f"{folder} holds no usable image processor",
            wanted="the model's own preprocessor_config.json",
            do="restore it",
        ),
    ):
        processor = AutoImageProcessor.from_pretrained(readable, local_files_only=True, trust_remote_code=False)
    own = (processor.patch_size, processor.merge_size, processor.temporal_patch_size)
    if own != sizes:
        raise InputError(
            f"the processor of {folder} makes patches of {own} (side, merged, frames)",
            wanted=f"{sizes}, as config.json says",
            do="use the processor files of the same model",
        )
    return int(processor.size["shortest_edge"]), int(processor.size["longest_edge"])


def _cell(vision: VisionSpec) -> int:
    """Pixels of a token's side."""
    return vision.image_size[0] // vision.grid[0]
