"""Fitting pictures to a bundle's profiles. They come from graphs/files/pictures.py, upright and in RGB."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from PIL import Image

from btp_export.families import family_of
from btp_export.families._vision import Layout
from graphs.records.errors import InputError
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import ModelSpec

Made = TypeVar("Made")


def fits(picture: Image.Image, spec: ModelSpec, profile: ShapeProfile) -> bool:
    """Whether the picture becomes the tokens that the profile's graphs are for."""
    family = family_of(spec)
    try:
        return family.layout(spec, (picture.height, picture.width)) == family.layout(spec, profile.image_size)
    except InputError:  # a size that the model takes nowhere
        return False


def require_fit(pictures: Sequence[Image.Image], spec: ModelSpec, profile: ShapeProfile) -> None:
    """Raise InputError for the first picture that the profile's graphs are not for."""
    for picture in pictures:
        if not fits(picture, spec, profile):
            raise misfit(picture, spec, [profile])


def fitted(pictures: Sequence[Image.Image], spec: ModelSpec, profile: ShapeProfile) -> tuple[list[Image.Image], int]:
    """The pictures, those that do not fit the profile scaled to its size whatever their proportions; how many those
    are.
    """
    height, width = profile.image_size

    def fitting(picture: Image.Image) -> Image.Image:
        is_fit = fits(picture, spec, profile)
        return picture if is_fit else picture.resize((width, height), Image.Resampling.BICUBIC)

    scaled = each_once(fitting, pictures)
    return scaled, sum(new is not old for new, old in zip(scaled, pictures, strict=True))


def each_once(make: Callable[[Image.Image], Made], pictures: Sequence[Image.Image]) -> list[Made]:
    """What is made of each picture, of one that is there several times, as in several prompts' samples, once."""
    made = {number: make(picture) for number, picture in {id(picture): picture for picture in pictures}.items()}
    return [made[id(picture)] for picture in pictures]


def profile_for(
    pictures: Sequence[Image.Image], spec: ModelSpec, profiles: Sequence[ShapeProfile], *, resize: bool = False
) -> ShapeProfile:
    """The first profile that all pictures fit; with `resize` else the one nearest to the first picture's proportions.

    Raises InputError naming the profiles' sizes if there is none.
    """
    fitting = [[profile for profile in profiles if fits(picture, spec, profile)] for picture in pictures]
    for profile in profiles:
        if all(profile in some for some in fitting):
            return profile
    if resize:
        shape = pictures[0].height / pictures[0].width
        return min(profiles, key=lambda profile: abs(math.log(profile.image_size[0] / profile.image_size[1] / shape)))
    for picture, some in zip(pictures, fitting, strict=True):
        if not some:
            raise misfit(picture, spec, profiles)
    raise InputError(
        "pictures that fit different profiles", wanted="one profile for all", do="run them one by one, or with --resize"
    )


def misfit(picture: Image.Image, spec: ModelSpec, profiles: Sequence[ShapeProfile]) -> InputError:
    """What to say about a picture that fits none of the profiles."""
    size = f"{picture.height} x {picture.width} pixels (height x width)"
    try:
        layout = family_of(spec).layout(spec, (picture.height, picture.width))
    except InputError as error:
        return InputError(f"a picture of {size}: {error.got}", wanted=error.wanted, do="run with --resize")
    # Some models are exported for sizes that they scale to, not for every picture's own.
    scaled = family_of(spec).layout(spec, layout.size) == layout
    height, width = layout.size if scaled else (picture.height, picture.width)
    kinds = dict.fromkeys(
        f"{_grid(profile)} from {profile.image_size[0]} x {profile.image_size[1]}" for profile in profiles
    )
    return InputError(
        f"a picture of {size} becomes {_grid(layout)} image tokens",
        wanted=f"what the bundle is built for: {'; or '.join(kinds)}",
        do=f"run with --resize, or export with --image-size {height}x{width}",
    )


def _grid(kind: Layout | ShapeProfile) -> str:
    return " + ".join(f"{rows} x {columns}" for rows, columns in kind.blocks or (kind.grid,))
