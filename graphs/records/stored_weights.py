"""What a decoder's matrices are stored in and multiplied with, by the names of options. Nothing is loaded for them."""

from typing import Final, Literal

Activations = Literal["int8", "float32"]  # what a CPU multiplies four-bit weights with
# What the decoder's matrices are stored in: as the model has them, or four bits in groups of 128, 32 or 64.
Weights = Literal["model", "int4", "int4-g32", "int4-g64"]
GROUP_OF: Final[dict[str, int]] = {"int4": 128, "int4-g32": 32, "int4-g64": 64}
