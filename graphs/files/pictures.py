"""The one opener of pictures: whatever the file holds becomes upright RGB, as transformers' processors take it.

`run`, `calibrate`, `eval`, the report, data sets and lmms-eval all read pictures here, so that a file is the same
picture everywhere and the same limits hold. What a file holds, in the order in which it is treated:

- EXIF orientation is applied before anything is counted or measured.
- 8 bits a channel: as `PIL.Image.convert("RGB")` gives it, what transformers' `load_image` calls. Alpha is dropped.
- 16-bit grey: the upper byte, as Pillow reads 16-bit colour. (`convert` clips it: nearly all of it would be white.)
- 32-bit and floating-point grey are refused: the file does not say which value is white.
- More than SCALE_ABOVE pixels (or `scale_above`): scaled down by a whole factor while the file is read.
"""

import contextlib
import ctypes
import functools
import io
import logging
import math
import os
import re
import struct
import warnings
from pathlib import Path
from typing import Any, BinaryIO, Final

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from graphs.records.errors import InputError
from graphs.records.reading import read_text

# No more: others start programs (EPS: Ghostscript), lie about their name, or are read by code that few look at.
FORMATS: Final = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS: Final = 178_000_000  # Pillow's own limit for what it takes for an attack; in memory 4 bytes each
SCALE_ABOVE: Final = 50_000_000  # no processor keeps as many: Qwen2.5-VL's takes 13 million
MAX_ASPECT: Final = 200  # longer side / shorter side; processors scale the shorter side up
ADDRESS: Final = re.compile(r"(^|/)(https?|ftp|s3|gs|file):/")  # a Path has one slash where an address has two
# Pillow logs what is wrong with a file and raises it; without a handler Python prints the first on standard error.
logging.getLogger("PIL").addHandler(logging.NullHandler())
_STRIP: Final = 256  # rows of the scaled picture that are made at a time

# What Pillow raises for damaged files, depending on the format and on where the damage is.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error)


def open_picture(
    source: Path | bytes, name: str = "", *, scale_above: int = SCALE_ABOVE, most_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Read a picture file, or its bytes, as upright RGB.

    Raises InputError, which calls it `name` (the path if left out), if the file is missing, is no picture of one of the
    FORMATS, is damaged, or is too large to be meant: more than `most_pixels`, of which MAX_PIXELS is the most.
    """
    name = name or ("the picture" if isinstance(source, bytes) else str(source))
    _silence_libtiff()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, for which MAX_PIXELS is the limit, and of odd metadata
            # An open file and not its path: Pillow 13 maps uncompressed TIFFs into memory and turns them wrongly then.
            with _opened(source) as file, Image.open(file, formats=FORMATS) as image:
                _check_size(image, name, most_pixels)
                factor = _factor(image, scale_above)
                if factor > 1:  # a JPEG is decoded at a half, a quarter or an eighth
                    image.draft(image.mode, (image.width // factor, image.height // factor))
                return to_rgb(image, name=name, scale_above=scale_above)
    except Image.DecompressionBombError as error:
        raise _too_large(f"{name}: {error}") from error
    except _DAMAGE as error:
        if ADDRESS.search(name):
            raise InputError(
                f"the picture {name} is an address", wanted="a picture file", do="download it and give the file"
            ) from error
        reason = (getattr(error, "strerror", None) or str(error)) if isinstance(error, OSError) else "damaged data"
        if isinstance(error, UnidentifiedImageError):
            reason = "not a picture of a known format"
        raise InputError(
            f"cannot read the picture{'' if name == 'the picture' else f' {name}'}: {reason}",
            wanted=f"a whole picture file: {', '.join(FORMATS)}",
            do="check the file",
        ) from error


@functools.cache
def _silence_libtiff() -> None:
    """libtiff writes on standard error what it finds in a file, odd tags and damage; Pillow raises what counts."""
    with contextlib.suppress(InputError, OSError, AttributeError):  # another system, or a Pillow without it
        loaded = {line.split(maxsplit=5)[-1] for line in read_text(Path("/proc/self/maps")).splitlines()}
        for path in (path for path in loaded if "/libtiff" in path):
            library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            for setter in (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler):
                setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
                setter(None)


def _opened(source: Path | bytes) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")


def to_rgb(image: Image.Image, *, name: str = "the picture", scale_above: int = SCALE_ABOVE) -> Image.Image:
    """`image` upright in RGB, at most `scale_above` pixels; see above.

    Raises InputError for sizes that no processor handles and for 32-bit and floating-point pixels.
    """
    _check_size(image, name)
    is_16_bit = _is_16_bit(image, name)
    factor = _factor(image, scale_above)
    if factor == 1:
        return _eight_bit(_upright(image), is_16_bit)
    image.load()  # a TIFF is turned by that, and then has no orientation any more
    orientation = None
    with contextlib.suppress(*_DAMAGE):
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    scaled = _scaled(image, factor, is_16_bit)
    if orientation is not None:
        scaled.getexif()[ExifTags.Base.Orientation] = orientation
    return _upright(scaled)


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF data say; as it is where they cannot be read: Pillow opens such a file, too."""
    image.load()  # what is wrong with its pixels is raised here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of data that are cut off
            return ImageOps.exif_transpose(image)
    except _DAMAGE:
        return image.copy()


def _factor(image: Image.Image, scale_above: int) -> int:
    """By how much both sides are to be divided: 1 up to `scale_above` pixels."""
    return math.ceil(math.sqrt(image.width * image.height / scale_above))


def _scaled(image: Image.Image, factor: int, is_16_bit: bool) -> Image.Image:
    """The picture in RGB with means of factor x factor pixels, made in strips: only `image` itself is held whole."""
    scaled = Image.new("RGB", (math.ceil(image.width / factor), math.ceil(image.height / factor)))
    for top in range(0, scaled.height, _STRIP):
        box = (0, top * factor, image.width, min((top + _STRIP) * factor, image.height))
        scaled.paste(_eight_bit(image.crop(box), is_16_bit).reduce(factor), (0, top))
    return scaled


def _eight_bit(image: Image.Image, is_16_bit: bool) -> Image.Image:
    """RGB of any mode that _is_16_bit lets pass."""
    if is_16_bit:
        return _upper_bytes(image).convert("RGB")
    if image.mode in ("P", "PA", "RGBa"):  # transparency is only understood on the way to RGBA
        return image.convert("RGBA").convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _upper_bytes(image: Image.Image) -> Image.Image:
    import numpy as np

    pixels: np.ndarray[Any, Any] = np.asarray(image)
    return Image.fromarray((pixels >> 8).astype(np.uint8))


def _is_16_bit(image: Image.Image, name: str) -> bool:
    """Whether it is 16-bit grey. Raises InputError for what has more bits, whose white is unknown."""
    if image.mode.startswith("I;16"):
        return True
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # which have no more than 16, whatever Pillow makes of it
        return True
    if image.mode in ("I", "F"):
        kind = "32-bit" if image.mode == "I" else "float"
        raise InputError(f"{name} has {kind} pixels", wanted="8 or 16 bits a channel", do="convert it to PNG first")
    return False


def _check_size(image: Image.Image, name: str, most_pixels: int = MAX_PIXELS) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise InputError(
            f"{name} is {width} x {height} pixels", wanted="a picture that is not empty", do="check the file"
        )
    if width * height > most_pixels:
        raise _too_large(f"{name} is {width} x {height} pixels", most_pixels)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(
            f"{name} is {width} x {height} pixels", wanted=f"sides of at most {MAX_ASPECT} to 1", do="crop the picture"
        )


def _too_large(got: str, most_pixels: int = MAX_PIXELS) -> InputError:
    return InputError(got, wanted=f"at most {most_pixels / 1e6:.3g} million pixels", do="make the picture smaller")
