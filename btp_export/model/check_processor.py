"""Before an export: a picture of each profile's size goes through the checkpoint's processor and chat template.

What they make has to be what the graphs are built for, or no prompt would ever run.
"""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from btp_export.families._processor import counting_of
from btp_export.model.open_model import Model, missing_parts
from btp_export.model.prompting import Encoded, Prompter
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
    prompter = Prompter(model.source.folder, model.spec)
    for profile in profiles:
        height, width = profile.image_size
        picture = Image.new("RGB", (width, height))
        for prompt in PROMPTS:
            _check_prefix(prompter, prompter.ids(picture, prompt))
        encoded = prompter.encode([picture], [PROMPTS[0]])
        _check_counts(model, prompter, encoded, profile)
        text = encoded.text_lengths[0]
        if text > profile.text_tokens:
            raise InputError(
                f"the chat template alone has {text} tokens after the image",
                wanted=f"at most {profile.text_tokens} (text bucket of profile {profile.name})",
                do=f"--text-tokens {-(-text // 16) * 16 + 16}",
            )


def _check_prefix(prompter: Prompter, ids: Any) -> None:
    spec = prompter.spec
    before = next((place for place, token in enumerate(ids) if token == spec.image_token_id), None)
    if before != spec.prefix_tokens or ids[-1] == spec.image_token_id:
        got = "no image token" if before is None else f"{before} tokens before the image"
        raise InputError(
            f"the chat template of {prompter.folder} puts {got} for one question and {spec.prefix_tokens} for another"
            if before != spec.prefix_tokens
            else f"the chat template of {prompter.folder} puts nothing after the image",
            wanted="the picture before the question, so that the tokens before it are always the same",
            do="change chat_template.jinja to write the image first, or use the template the model was published with",
        )


def _check_counts(model: Model, prompter: Prompter, encoded: Encoded, profile: ShapeProfile) -> None:
    """The number of image tokens and the shape of the pixels."""
    try:
        encoded.check_picture(profile)
    except InputError as error:
        wanted = counting_of(model.checkpoint.config)
        got = {name: getattr(prompter.processor, name, None) for name in COUNTING}
        wrong = [f"{name} {got[name]} in place of {wanted[name]}" for name in COUNTING if got[name] != wanted[name]]
        advice = f"its files say {', '.join(wrong)}" if wrong else "compare its size and crop_size with config.json"
        raise InputError(
            f"the processor of {prompter.folder} does not fit the model: {error.got}",
            wanted=error.wanted,
            do=f"use the processor files of the same model: {advice}",
        ) from error
