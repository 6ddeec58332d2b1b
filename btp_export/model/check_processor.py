"""Before an export: a picture of each profile's size goes through the checkpoint's processor and chat template.

What they make has to be what the graphs are built for, or no prompt would ever run; and a bundle has to make the same
by itself.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from btp_export.families._describe import processor_of
from btp_export.families._processor import counting_of, load_processor
from btp_export.model.open_model import Model, missing_parts
from btp_export.model.prompting import Encoded, Prompter
from btp_export.model.prove_processor import preprocess_files, prove_processor
from graphs.records.errors import InputError
from graphs.records.shapes import ShapeProfile

PROMPTS = ("?", "What is there to be seen in this picture, and where?")  # of different lengths
COUNTING = ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")


def check_processor(model: Model, profiles: Sequence[ShapeProfile]) -> None:
    """Raise InputError unless a prompt about a picture of each profile becomes the profile's tokens and pixels.

    A folder without processor or template, whose btp.json says where the image stands, is not checked.
    """
    if missing_parts(model.source.folder):
        return
    folder = model.source.folder
    theirs = load_processor(folder)
    prompter = Prompter(folder, model.spec, processor_of(theirs, folder))
    for profile in profiles:
        height, width = profile.image_size
        picture = Image.new("RGB", (width, height))
        for prompt in PROMPTS:
            _check_prefix(prompter, prompter.ids(picture, prompt))
        encoded = prompter.encode([picture], [PROMPTS[0]])
        _check_counts(model, theirs, picture, encoded, profile)
        text = encoded.text_lengths[0]
        if text > profile.text_tokens:
            raise InputError(
                f"the chat template alone has {text} tokens after the image",
                wanted=f"at most {profile.text_tokens} (text bucket of profile {profile.name})",
                do=f"--text-tokens {-(-text // 16) * 16 + 16}",
            )
    prove_processor(theirs, folder, model.family, model.spec, [profile.image_size for profile in profiles])


def files_of_processor(model: Model) -> dict[str, str]:
    """What a bundle's processor/ gets beside the checkpoint's files, by name; nothing where these are not whole."""
    folder = model.source.folder
    return {} if missing_parts(folder) else preprocess_files(load_processor(folder), folder)


def _check_prefix(prompter: Prompter, ids: Any) -> None:
    spec = prompter.spec
    before = next((place for place, token in enumerate(ids) if token == spec.image_token_id), None)
    if before != spec.prefix_tokens or ids[-1] == spec.image_token_id:
        folder = prompter.processor.folder
        got = "no image token" if before is None else f"{before} tokens before the image"
        raise InputError(
            f"the chat template of {folder} puts {got} for one question and {spec.prefix_tokens} for another"
            if before != spec.prefix_tokens
            else f"the chat template of {folder} puts nothing after the image",
            wanted="the picture before the question, so that the tokens before it are always the same",
            do="change chat_template.jinja to write the image first, or use the template the model was published with",
        )


def _check_counts(model: Model, theirs: Any, picture: Image.Image, encoded: Encoded, profile: ShapeProfile) -> None:
    """The number of image tokens and the shape of the pixels, as transformers' processor counts them."""
    prepared = theirs(images=[picture], text=[theirs.image_token], return_tensors="np")
    count = int(np.count_nonzero(prepared["input_ids"][0] == model.spec.image_token_id))
    try:
        replace(encoded, image_tokens=count, pixel_values=prepared["pixel_values"]).check_picture(profile)
    except InputError as error:
        wanted = counting_of(model.checkpoint.config)
        got = {name: getattr(theirs, name, None) for name in COUNTING}
        wrong = [f"{name} {got[name]} in place of {wanted[name]}" for name in COUNTING if got[name] != wanted[name]]
        advice = f"its files say {', '.join(wrong)}" if wrong else "compare its size and crop_size with config.json"
        raise InputError(
            f"the processor of {model.source.folder} does not fit the model: {error.got}",
            wanted=error.wanted,
            do=f"use the processor files of the same model: {advice}",
        ) from error
