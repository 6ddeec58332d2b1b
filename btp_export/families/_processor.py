"""A model's processor from its folder: pictures and text only, whatever else the model could take."""

import contextlib
import importlib.util
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graphs.files.checkpoint import read_config
from graphs.records.errors import InputError, UnavailableError
from graphs.records.reading import read_json, require_file
from graphs.records.refusing import refusing

# Names in published files that transformers no longer has, and those it has for the same class.
RENAMED = {"Qwen2_5_VLImageProcessor": "Qwen2VLImageProcessor"}
RENAMED_SIZES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
SETTINGS = {
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "chat_template.json",
    "special_tokens_map.json",
    "added_tokens.json",
}
MOST_BYTES = 512 * 2**20  # of a tokenizer
READERS = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}  # of tokenizer.model: module -> package


def load_processor(folder: Path) -> Any:
    """transformers' processor of the model in `folder`, without its video part where it has one.

    transformers reads videos with torchvision, which pictures do not need and which there is not for every machine; its
    own loader fails without it. Nothing is fetched and no code of the folder is run.
    Raises InputError for files that are missing, damaged or of another kind of model, UnavailableError if the only
    tokenizer is tokenizer.model and what reads it is not installed.
    """
    _check_tokenizer(folder)
    check_files(folder)
    with (
        readable_folder(folder) as readable,
        refusing(
            f"{folder} holds no usable processor",
            wanted="the model's tokenizer, processor and chat template files",
            do='restore them; a folder without any says where the image stands in btp.json: {"prefix_tokens": N}',
        ),
    ):
        processor = _loaded(readable)
    for part, kind in {"tokenizer": object, "image_processor": object, "image_token": str}.items():
        if not isinstance(getattr(processor, part, None), kind) or getattr(processor, part, None) is None:
            raise InputError(
                f"{folder} holds a {type(processor).__name__} without {part}",
                wanted="the processor of a vision-language model",
                do="add processor_config.json or preprocessor_config.json of the model",
            )
    return processor


def check_files(folder: Path) -> None:
    """Raise InputError for a file that transformers would read, unless it is a file of a bounded size.

    Those of a few settings must be JSON too, within our limits; tokenizers, which can be large, are left to what parses
    them.
    """
    for path in sorted(folder.iterdir()):
        if path.name in SETTINGS:
            read_json(path, noun="model's own file")
        elif path.suffix in (".json", ".jinja", ".txt", ".model"):
            require_file(path, noun="model's own file", most=MOST_BYTES)


@contextlib.contextmanager
def readable_folder(folder: Path) -> Iterator[Path]:
    """The folder, or a temporary one of links to its files with preprocessor_config.json in the form of today.

    transformers reads processors from files only, and forgets names and forms that it has published itself.
    """
    path = folder / "preprocessor_config.json"
    try:
        document = read_json(path)
    except InputError:
        document = None  # not there, or damaged: transformers says so
    changed = _in_todays_form(document) if isinstance(document, dict) else document
    if changed == document:
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        linked = Path(name)
        for file in folder.iterdir():
            if file.name != path.name:
                (linked / file.name).symlink_to(file.resolve())
        (linked / path.name).write_text(json.dumps(changed), encoding="utf-8")
        yield linked


def _in_todays_form(document: dict[str, Any]) -> dict[str, Any]:
    kind, size = document.get("image_processor_type"), document.get("size")
    changed = dict(document)
    if isinstance(kind, str):
        plain = kind.removesuffix("Fast")
        changed["image_processor_type"] = RENAMED.get(plain, kind)
    if isinstance(size, dict):
        known = {key: value for key, value in size.items() if value is not None}
        changed["size"] = {RENAMED_SIZES.get(key, key): value for key, value in known.items()}
    return changed


def _check_tokenizer(folder: Path) -> None:
    """Without tokenizer.json, transformers converts tokenizer.model, and names another library if it cannot."""
    if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file():
        return
    missing = [package for module, package in READERS.items() if not _is_installed(module)]
    if missing:
        raise UnavailableError(
            f"the only tokenizer of {folder} is tokenizer.model",
            wanted=f"tokenizer.json, or {' and '.join(missing)} to read it, which is not installed",
            do=f"pip install {' '.join(missing)}",
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent
        return False


def _loaded(folder: Path) -> Any:
    """The processor with the image processor for Pillow; where torchvision is installed, transformers prefers one for
    that, which gives other pixels.
    """
    from transformers import AutoImageProcessor

    processor = _preferred(folder)
    if getattr(getattr(processor, "image_processor", None), "backend", "pil") != "pil":
        processor.image_processor = AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        )
    return processor


def _preferred(folder: Path) -> Any:
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    model_type = read_config(folder).get("model_type") if (folder / "config.json").is_file() else None
    if model_type in PROCESSOR_MAPPING_NAMES:
        full = processor_class_from_name(PROCESSOR_MAPPING_NAMES[model_type])
        if full is not None and "video_processor" in full.get_attributes():
            return _without_videos(full).from_pretrained(folder, **options)
    processor = AutoProcessor.from_pretrained(folder, **options)
    if getattr(processor, "patch_size", 0) is None:  # old files lack all three
        for name, value in counting_of(read_config(folder)).items():
            setattr(processor, name, value)
    return processor


def counting_of(config: dict[str, Any]) -> dict[str, Any]:
    """What decides how many image tokens a LLaVA-like processor makes of a picture, as its tower has it."""
    vision = config.get("vision_config") or {}
    return {
        "patch_size": vision.get("patch_size", 14),
        "num_additional_image_tokens": int(vision.get("model_type", "clip_vision_model") == "clip_vision_model"),
        "vision_feature_select_strategy": config.get("vision_feature_select_strategy", "default"),
    }


def _without_videos(full: Any) -> Any:
    """The class with an image processor and a tokenizer only: transformers loads what the constructor names."""

    class PictureProcessor(full):  # type: ignore[misc]
        def __init__(
            self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **rest: Any
        ) -> None:
            super().__init__(image_processor, tokenizer, chat_template=chat_template, **rest)

    return PictureProcessor
