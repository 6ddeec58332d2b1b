"""Where TF32, the matrix units' float32 with 10 bits of mantissa, may stand in for float32: one rule for every runtime.

Runtimes differ in what they do unasked: ONNX Runtime, TensorRT and cuDNN take TF32, torch's matrix products do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from graphs.dtypes import Precision


def allows_tf32(precision: Precision) -> bool:
    """Whether a bundle of this precision may be computed with TF32.

    A float32 bundle is verified to float32's own rounding, so never. In a half-precision bundle the only products in
    float32 are the scores and the similarity of the selections, of operands that half precision has rounded coarser.
    """
    return precision != "float32"


@contextmanager
def torch_without_tf32() -> Iterator[None]:
    """Products and convolutions of torch in float32 proper, whatever the process has set; put back at the end."""
    from torch import backends

    # torch's new switches (its types do not know them yet): reading the old ones fails where someone set a new one.
    switches: tuple[Any, ...] = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
