"""Named examples of BtpGatherTokens, made from seeds; every form of the operator is tested on them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from graphs import dtypes

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    """One call: tokens [B,S,...], indices [B,k] int32, attributes `start` and `count`."""

    name: str
    tokens: Array
    indices: Array
    attributes: dict[str, int]

    @property
    def inputs(self) -> dict[str, Array]:
        """The inputs by name."""
        return {"tokens": self.tokens, "indices": self.indices}


def cases() -> list[Case]:
    """Examples of all ranks, types and places of the image."""
    return [
        _case("released-1", (1, 640, 64), 35, 576, 288),
        _case("batch", (3, 20, 8), 4, 12, 5),
        _case("float16", (2, 20, 8), 4, 12, 5, np.float16),
        _case("bfloat16", (2, 20, 8), 4, 12, 5, dtypes.BFLOAT16),
        _case("float64", (2, 20, 8), 4, 12, 5, np.float64),
        _case("rank-2", (2, 20), 4, 12, 5),
        _case("rank-4", (2, 20, 3, 4), 4, 12, 5),
        _case("rank-4-bfloat16", (2, 20, 3, 4), 4, 12, 5, dtypes.BFLOAT16),
        _case("image-first", (2, 20, 8), 0, 12, 5),
        _case("image-last", (2, 20, 8), 8, 12, 5),
        _case("image-only", (2, 12, 8), 0, 12, 5),
        _case("keep-one", (2, 20, 8), 4, 12, 1),
        _case("keep-all", (2, 20, 8), 4, 12, 12),
        _case("one-token", (1, 1, 8), 0, 1, 1),
        _case("nan-and-infinity", (1, 20, 8), 4, 12, 5, values=(np.nan, np.inf, -np.inf, -0.0)),
        Case(
            "any-order",
            _tokens("any-order", (1, 20, 8)),
            np.array([[7, 7, 0, 11]], np.int32),
            {"start": 4, "count": 12},
        ),
    ]


def _tokens(name: str, shape: tuple[int, ...], values: tuple[float, ...] = ()) -> Array:
    random = np.random.default_rng(np.frombuffer(name.encode(), np.uint8))
    tokens = random.standard_normal(shape).astype(np.float32)
    places = random.integers(0, tokens.size, 4 * len(values))
    tokens.reshape(-1)[places] = np.tile(np.array(values, np.float32), 4)
    return tokens


def _case(
    name: str,
    shape: tuple[int, ...],
    start: int,
    count: int,
    keep: int,
    dtype: npt.DTypeLike = np.float32,
    values: tuple[float, ...] = (),
) -> Case:
    random = np.random.default_rng(keep)
    indices = [np.sort(random.choice(count, keep, replace=False)) for _ in range(shape[0])]
    return Case(
        name, _tokens(name, shape, values).astype(dtype), np.array(indices, np.int32), {"start": start, "count": count}
    )
