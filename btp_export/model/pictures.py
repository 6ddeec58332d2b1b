"""Opening pictures of any format as upright RGB, with clear refusals, and fitting them to a bundle's profiles."""

import math
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from btp_export.families import family_of
from btp_export.families._vision import Layout
from graphs.records.errors import InputError
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import ModelSpec

MAX_PIXELS = 100_000_000  # about 300 MB as RGB; a larger header is a mistake or an attack
MAX_ASPECT = 200  # longer side / shorter side; processors scale the shorter side up

# What Pillow raises for damaged files, depending on the format and on where the damage is.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)


def open_picture(path: Path) -> Image.Image:
    """Read a picture file as upright RGB.

    Raises InputError if the file is missing, is no picture, is damaged, or is too large to be meant.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `to_rgb` has its own limit
            with Image.open(path) as image:
                _check_size(image, str(path))
                image.load()
                return to_rgb(image, name=str(path))
    except Image.DecompressionBombError as error:
        raise _too_large(f"{path}: {error}") from error
    except _DAMAGE as error:
        reason = (getattr(error, "strerror", None) or str(error)) if isinstance(error, OSError) else "damaged data"
        if isinstance(error, UnidentifiedImageError):
            reason = "not a picture of a known format"
        raise InputError(
            f"cannot read the picture {path}: {reason}",
            wanted="a PNG, JPEG, WebP or other picture",
            do="check the file",
        ) from error


def to_rgb(image: Image.Image, *, name: str = "the picture") -> Image.Image:
    """`image` upright (EXIF orientation) in RGB; the alpha channel is dropped, as transformers does.

    16-bit grey is scaled to 8 bits. Raises InputError for sizes that no processor handles and for float pixels.
    """
    _check_size(image, name)
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "RGB":
        return upright
    if upright.mode == "P":  # transparency of a palette is only understood on the way to RGBA
        return upright.convert("RGBA").convert("RGB")
    if upright.mode.startswith("I"):
        return _grey_16(upright, name)
    if upright.mode == "F":
        raise InputError(f"{name} has float pixels", wanted="8 or 16 bits a channel", do="convert it to PNG first")
    return upright.convert("RGB")


def fits(picture: Image.Image, spec: ModelSpec, profile: ShapeProfile) -> bool:
    """Whether the picture becomes the tokens that the profile's graphs are for."""
    family = family_of(spec)
    try:
        return family.layout(spec, (picture.height, picture.width)) == family.layout(spec, profile.image_size)
    except InputError:  # a size that the model takes nowhere
        return False


def fitted(pictures: Sequence[Image.Image], spec: ModelSpec, profile: ShapeProfile) -> list[Image.Image]:
    """The pictures in RGB; those that do not fit the profile are scaled to its size, whatever their proportions."""
    height, width = profile.image_size
    upright = [to_rgb(picture) for picture in pictures]
    return [
        picture if fits(picture, spec, profile) else picture.resize((width, height), Image.Resampling.BICUBIC)
        for picture in upright
    ]


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
        return min(profiles, key=lambda one: abs(math.log(one.image_size[0] / one.image_size[1] / shape)))
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
    kinds = dict.fromkeys(f"{_grid(one)} from {one.image_size[0]} x {one.image_size[1]}" for one in profiles)
    return InputError(
        f"a picture of {size} becomes {_grid(layout)} image tokens",
        wanted=f"what the bundle is built for: {'; or '.join(kinds)}",
        do=f"run with --resize, or export with --image-size {height}x{width}",
    )


def _grid(kind: Layout | ShapeProfile) -> str:
    return " + ".join(f"{rows} x {columns}" for rows, columns in kind.blocks or (kind.grid,))


def _grey_16(image: Image.Image, name: str) -> Image.Image:
    import numpy as np

    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise InputError(f"{name} has 32-bit pixels", wanted="8 or 16 bits a channel", do="convert it to PNG first")
    return Image.fromarray((pixels // 257).astype(np.uint8)).convert("RGB")


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise InputError(
            f"{name} is {width} x {height} pixels", wanted="a picture that is not empty", do="check the file"
        )
    if width * height > MAX_PIXELS:
        raise _too_large(f"{name} is {width} x {height} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(
            f"{name} is {width} x {height} pixels", wanted=f"sides of at most {MAX_ASPECT} to 1", do="crop the picture"
        )


def _too_large(got: str) -> InputError:
    return InputError(got, wanted=f"at most {MAX_PIXELS // 1_000_000} million pixels", do="make the picture smaller")
