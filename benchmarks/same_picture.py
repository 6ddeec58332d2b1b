"""A further question about the picture before it, beside one about another picture: time to the first token's logits.

    python -m benchmarks --only same_picture

The vision graph does not run for pictures that are those of the batch before (`BundleModel.prefill`), so what remains
of a first token is the decoder's prefill. Logits are compared with those of a run with the vision graph before anything
is timed; both kinds are asked in turns.
"""

from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from time import perf_counter

import numpy as np
from PIL import Image

from benchmarks import models
from benchmarks.findings import Row, Wishes, ratio, skipped
from btp_export.running.runtime import load
from graphs.files.bundle import Bundle

PROMPT = "what color is the circle ?"


def benchmark(wishes: Wishes) -> Iterator[Row]:
    """Rows of the demo; `quick`: of a tiny model."""
    for name, bundle in models.small(wishes, "same-picture"):
        yield _one(f"{name}: first token about the same picture / another", bundle, wishes)


def _one(what: str, bundle: Bundle, wishes: Wishes) -> Row:
    model = load(bundle, threads=wishes.threads)
    height, width = model.profile.image_size
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (2, height, width, 3), np.uint8)
    asked = [model.encode([Image.fromarray(picture)], [PROMPT]) for picture in pixels]
    wanted = [model.prefill(encoded).logits for encoded in asked]
    if not np.array_equal(model.prefill(asked[1], same_pictures=True).logits, wanted[1]):
        return skipped(what, "logits are not those of a run with the vision graph")
    times: dict[bool, list[float]] = {True: [], False: []}
    vision, decoder = [], []
    for turn in range(-2, 2 * wishes.rounds):
        for again in (False, True):  # the other picture, then the same
            start = perf_counter()
            prefill = model.prefill(asked[turn % 2], same_pictures=True)
            took = (perf_counter() - start) * 1e3
            assert (prefill.vision_ms is None) == again
            if turn >= 0:
                times[again].append(took)
                decoder.append(prefill.prefill_ms)
                vision += [] if prefill.vision_ms is None else [prefill.vision_ms]
    row = ratio(what, times[True], times[False], unit="ms", limit=1.0, why="the vision graph does not run")
    alone = median(decoder) / (median(decoder) + median(vision))
    return replace(row, detail=f"{row.detail}; the decoder alone {alone:.3f}")
