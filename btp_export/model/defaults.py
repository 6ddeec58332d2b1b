"""The shapes that a model is exported and calibrated for unless the user says others, and samples fitted to a shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from btp_export.model.pictures import fitted

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
