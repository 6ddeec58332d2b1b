"""Opening pictures: any format Pillow reads, turned upright and to RGB, with clear refusals."""

import struct
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from graphs.errors import InputError

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
