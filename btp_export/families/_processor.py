"""A model's processor from its folder: pictures and text only, whatever else the model could take."""

from pathlib import Path
from typing import Any

from graphs.files.checkpoint import read_config


def load_processor(folder: Path) -> Any:
    """transformers' processor of the model in `folder`, without its video part where it has one.

    transformers reads videos with torchvision, which pictures do not need and which there is not for every machine; its
    own loader fails without it. Nothing is fetched and no code of the folder is run.
    Raises what transformers' loader raises: OSError, ValueError, ImportError, and others for damaged files.
    """
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    model_type = read_config(folder).get("model_type") if (folder / "config.json").is_file() else None
    if model_type in PROCESSOR_MAPPING_NAMES:
        full = processor_class_from_name(PROCESSOR_MAPPING_NAMES[model_type])
        if full is not None and "video_processor" in full.get_attributes():
            return _without_videos(full).from_pretrained(folder, **options)
    processor = AutoProcessor.from_pretrained(folder, **options)
    if getattr(processor, "patch_size", 0) is None:
        _count_as_the_tower(processor, read_config(folder))
    return processor


def _count_as_the_tower(processor: Any, config: dict[str, Any]) -> None:
    """Old files lack what decides how many image tokens a picture becomes; it is the tower's."""
    vision = config.get("vision_config") or {}
    processor.patch_size = vision.get("patch_size", 14)
    processor.vision_feature_select_strategy = config.get("vision_feature_select_strategy", "default")
    class_token = vision.get("model_type", "clip_vision_model") == "clip_vision_model"
    processor.num_additional_image_tokens = 1 if class_token else 0


def _without_videos(full: Any) -> Any:
    """The class with an image processor and a tokenizer only: transformers loads what the constructor names."""

    class PictureProcessor(full):  # type: ignore[misc]
        def __init__(
            self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **rest: Any
        ) -> None:
            super().__init__(image_processor, tokenizer, chat_template=chat_template, **rest)

    return PictureProcessor
