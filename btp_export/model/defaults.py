"""The shapes that a model is exported and calibrated for, by default or as they are written; samples fitted to one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from btp_export.model.pictures import fitted
from graphs.records.errors import InputError

if TYPE_CHECKING:
    from btp_export.model.open_model import Model
    from calibrate.data.samples import Sample
    from graphs.records.shapes import ShapeProfile
    from graphs.records.spec import ModelSpec

DEMO_SHAPES = (32, 8)  # text bucket and new tokens of the demo, whose prompts and answers are short
SHAPES = (64, 128)


def default_shapes(model: Model) -> tuple[int, int]:
    """Text bucket and new tokens of a model's export."""
    return DEMO_SHAPES if model.source.is_demo else SHAPES


def default_profile(model: Model, image_size: tuple[int, int] | None = None) -> ShapeProfile:
    """That image size, the model's own if there is none, with the text bucket of an export's default.

    Raises InputError for a size that the model cannot take.
    """
    text, _ = default_shapes(model)
    return model.family.profile(model.spec, batch=1, image_size=image_size, text_tokens=text, new_tokens=1)


def fitted_samples(samples: Sequence[Sample], spec: ModelSpec, profile: ShapeProfile) -> tuple[list[Sample], int]:
    """The samples with pictures that fit the profile, and how many were scaled for it."""
    pictures, resized = fitted([sample.image for sample in samples], spec, profile)
    return [replace(sample, image=picture) for sample, picture in zip(samples, pictures, strict=True)], resized


def parse_profile(text: str) -> dict[str, Any]:
    """Keyword arguments of Family.profile from "batch=2,text=64,new=128,image=336x336".

    Raises InputError for text that is none, or says a thing twice.
    """
    keys = {"batch": "batch", "text": "text_tokens", "new": "new_tokens", "image": "image_size"}
    fields: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        numbers = value.split("x") if key == "image" else [value]
        if keys.get(key, key) in fields or key not in keys or not all(map(_is_size, numbers)):
            raise _bad_profile(text)
        if key == "image" and len(numbers) != 2:
            raise _bad_profile(text)
        fields[keys[key]] = (int(numbers[0]), int(numbers[1])) if key == "image" else int(value)
    return fields


def _is_size(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0


def _bad_profile(text: str) -> InputError:
    return InputError(
        f"profile {text!r}",
        wanted="batch, text, new and image (height x width), each once and a positive number",
        do="--shape batch=2,text=64,new=128",
    )
