"""Made-up weights of four bits: random codes and scales in the layout of a packed checkpoint.

Nothing is searched for or rounded: random weights have nothing to keep. Sizes, types and the spread of the values are
those of real ones, so times and memory are too.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

from graphs.files.packed_weights import QWEIGHT, SCALES
from graphs.packing import qweight_shape
from graphs.records.errors import InputError
from graphs.records.quantization import Quantization

Shape = tuple[int, ...]

PROJECTION: Final = re.compile(r"layers\.\d+\.(self_attn|mlp)\.(\w+_proj)\.weight$")
VISION: Final = re.compile(r"vision|visual")
SOURCE: Final = "random codes"


def is_projection(name: str) -> bool:
    """Whether a stored tensor is a matrix of a decoder layer, which four bits are for."""
    return PROJECTION.search(name) is not None and VISION.search(name) is None


def packed_shapes(shapes: Mapping[str, Shape], group: int) -> dict[str, Shape]:
    """Shapes by stored name with the projections in four bits. Raises InputError if the group does not divide a row."""
    packed: dict[str, Shape] = {}
    for name, shape in shapes.items():
        if not is_projection(name):
            packed[name] = shape
            continue
        (rows, width), module = shape, name.removesuffix(".weight")
        if width % group:
            raise InputError(f"groups of {group}", wanted=f"a size that divides {width}, the rows of {name}", do="32")
        packed[f"{module}.{QWEIGHT}"] = qweight_shape(rows, width, group)
        packed[f"{module}.{SCALES}"] = (rows, width // group)
    return packed


def quantization(shapes: Mapping[str, Shape], group: int) -> dict[str, Any]:
    """What config.json says of them."""
    count = sum(map(is_projection, shapes))
    return Quantization(method="rtn", source=SOURCE, groups={group: count}).model_dump(mode="json")
