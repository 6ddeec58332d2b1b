"""transformers' processor as preprocess.json has it: what its image processor and its tokenizer are set to do.

Only processors whose steps are known here are described; another one, or a setting that has no place in the record, is
refused. That the description is right is shown by comparing results (btp_export/model/prove_processor.py).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image
from pydantic import ValidationError

from btp_export.families._processor import load_processor
from btp_export.preprocess.processor import Processor
from btp_export.preprocess.tokens import Tokens
from graphs.records.errors import InputError
from graphs.records.preprocess import (
    ExactSize,
    Patches,
    PictureSteps,
    PixelRange,
    Preprocess,
    ShortestEdge,
    TextSteps,
    Tiles,
)

TOKENIZER_FILE = "tokenizer.json"
OWN_TOKENIZER = "preprocess-tokenizer.json"  # where transformers makes another tokenizer than the file says
OTHER_INPUTS = ("video_token", "audio_token")
METHODS = ("_preprocess", "process_image", "convert_to_rgb", "resize", "center_crop", "rescale", "normalize", "pad")


def checkpoint_processor(folder: Path) -> Processor:
    """The processor of a folder that has transformers' files only. Raises what load_processor and describe raise."""
    return processor_of(load_processor(folder), folder)


def processor_of(theirs: Any, folder: Path) -> Processor:
    """transformers' processor of a folder as ours; they share the tokenizer."""
    steps = describe(theirs, folder)
    tokens = Tokens(
        theirs.tokenizer.backend_tokenizer, split_special=steps.text.split_special, clean_up=steps.text.clean_up
    )
    return Processor(steps, tokens, folder)


def describe(theirs: Any, folder: Path) -> Preprocess:
    """The record of transformers' processor. Raises InputError naming the setting that it cannot express."""
    try:
        return Preprocess(picture=_picture_steps(theirs.image_processor), text=_text_steps(theirs, folder))
    except ValidationError as error:
        first: Any = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            f"the processor of {folder} cannot be expressed: {where}: {first['msg']}",
            wanted="settings as published models have them",
            do="restore the processor files that the model was published with",
        ) from error


def tokenizer_text(theirs: Any) -> str:
    """The tokenizer that transformers uses, as the tokenizers library writes it, without padding and truncation."""
    backend = theirs.tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    text: str = backend.to_str()
    return text


# -- text ------------------------------------------------------------------------------------------------------------


def _text_steps(theirs: Any, folder: Path) -> TextSteps:
    tokenizer = theirs.tokenizer
    if not hasattr(tokenizer, "backend_tokenizer"):
        _refuse(f"a {type(tokenizer).__name__}", "a tokenizer of the tokenizers library")
    is_bpe = type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
    ruins = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    others = {name: getattr(theirs, name, None) for name in OTHER_INPUTS}
    return TextSteps(
        tokenizer=TOKENIZER_FILE if _is_own_file(theirs, folder) else OWN_TOKENIZER,
        split_special=bool(tokenizer.split_special_tokens),
        clean_up=bool(tokenizer.clean_up_tokenization_spaces) and (not is_bpe or bool(ruins)),
        template=_template(theirs),
        special=dict(tokenizer.special_tokens_map),
        image_token=theirs.image_token,
        placeholders={name: token for name, token in others.items() if isinstance(token, str) and token},
        unknown_id=tokenizer.unk_token_id,
    )


def _template(theirs: Any) -> str | None:
    template = theirs.chat_template or theirs.tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template or None


def _is_own_file(theirs: Any, folder: Path) -> bool:
    """Whether tokenizer.json says all that transformers' tokenizer does.

    For some models transformers makes the tokenizer anew from vocabulary and merges, with its own settings.
    """
    from tokenizers import Tokenizer

    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return False
    own = Tokenizer.from_file(str(path))
    own.no_padding()
    own.no_truncation()
    return bool(own.to_str() == tokenizer_text(theirs))


# -- pictures --------------------------------------------------------------------------------------------------------


def _picture_steps(images: Any) -> PictureSteps:
    """By the class whose methods do the work: transformers' for Pillow."""
    from transformers.image_processing_backends import PilBackend
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    known: dict[type, Callable[[Any], PictureSteps]] = {
        LlavaImageProcessorPil: _padded_to_square,
        LlavaNextImageProcessorPil: _in_tiles,
        Qwen2VLImageProcessorPil: _in_patches,
        PilBackend: _plain,
    }
    for kind, steps in known.items():
        if all(getattr(type(images), method, None) is getattr(kind, method) for method in METHODS):
            return steps(images)
    _refuse(f"a {type(images).__name__}", "the image processor of CLIP, SigLIP, LLaVA, LLaVA-NeXT or Qwen2-VL")


def _plain(images: Any) -> PictureSteps:
    if images.do_pad:
        _refuse("an image processor that pads to a size", "one that scales and crops")
    return PictureSteps(resize=_resize(images) if images.do_resize else None, crop=_crop(images), **_values(images))


def _padded_to_square(images: Any) -> PictureSteps:
    colour = tuple(int(value * 255) for value in images.image_mean or (0, 0, 0))
    plain = PictureSteps(resize=_resize(images) if images.do_resize else None, crop=_crop(images), **_values(images))
    return plain.model_copy(update={"square": colour}) if images.do_pad else plain


def _in_tiles(images: Any) -> PictureSteps:
    size, crop = images.size, images.crop_size
    base = (size.height, size.width) if size.height and size.width else (size.shortest_edge, size.shortest_edge)
    tile = (crop.height if crop else None) or size.height or size.shortest_edge
    tiles = Tiles(base=base, sizes=tuple(map(tuple, images.image_grid_pinpoints)), tile=tile)
    resize = _resize(images) if images.do_resize else None
    return PictureSteps(tiles=tiles, resize=resize, crop=_crop(images), **_values(images))


def _in_patches(images: Any) -> PictureSteps:
    patches = Patches(side=images.patch_size, merge=images.merge_size, frames=images.temporal_patch_size)
    size = images.size
    rule = PixelRange(multiple=patches.side * patches.merge, least=size.shortest_edge, most=size.longest_edge)
    return PictureSteps(resize=rule if images.do_resize else None, patches=patches, **_values(images))


def _resize(images: Any) -> ShortestEdge | ExactSize:
    size = images.size
    if size.shortest_edge:
        return ShortestEdge(pixels=size.shortest_edge, longest=size.longest_edge)
    if size.max_height or size.max_width or not (size.height and size.width):
        _refuse(f"an image processor with the size {dict(size)}", "shortest_edge, or height and width")
    return ExactSize(size=(size.height, size.width))


def _crop(images: Any) -> tuple[int, int] | None:
    return (images.crop_size.height, images.crop_size.width) if images.do_center_crop else None


def _values(images: Any) -> dict[str, Any]:
    """Filter, scale, mean and deviation."""
    normal = bool(images.do_normalize)
    return {
        "filter": Image.Resampling(int(images.resample)).name.lower() if images.resample is not None else "bilinear",
        "rescale": images.rescale_factor if images.do_rescale else None,
        "mean": _channels(images.image_mean) if normal else None,
        "deviation": _channels(images.image_std) if normal else None,
    }


def _channels(value: Any) -> tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, (list, tuple)) else (float(value),) * 3


def _refuse(got: str, wanted: str) -> NoReturn:
    raise InputError(
        f"{got}, which the bundle's own preprocessing cannot express",
        wanted=wanted,
        do="use the processor files that the model was published with",
    )
