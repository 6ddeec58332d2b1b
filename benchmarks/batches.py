"""Batches of 1, 2, 4 and 8 in static profiles of one bundle: samples a second, and the same answers as one at a time.

    python -m benchmarks --only batches

Every sample of a batch has its own prompt. Answers are greedy; a batch whose tokens are not those of batch 1, or whose
first logits differ by more than float32 does, is a row without a number. Throughput is a batch's, in the order 1, 2,
4, 8, 1, 2, ...
"""

from collections.abc import Iterator, Sequence
from statistics import median
from time import perf_counter

import numpy as np

from benchmarks import models
from benchmarks.findings import Row, Wishes, skipped
from benchmarks.peers import Array
from benchmarks.peers.ours import Ours
from btp_export.running.runtime import load
from graphs.files.bundle import Bundle

SIZES = (1, 2, 4, 8)
STEPS = 8
LARGEST = 1e-4  # of the logits' spread: by how much those of a batch may differ from those of one sample


def benchmark(wishes: Wishes) -> Iterator[Row]:
    """Rows of the demo; `quick`: of a tiny model in batches of 1 and 2."""
    sizes = SIZES[:2] if wishes.quick else SIZES
    profiles = tuple(f"batch={size}" for size in sizes)
    for name, bundle in models.small(wishes, "batches", profiles):
        yield from _batches(name, bundle, sizes, wishes)


def _batches(name: str, bundle: Bundle, sizes: Sequence[int], wishes: Wishes) -> Iterator[Row]:
    profiles = bundle.manifest.profiles
    shape = (max(sizes), profiles[0].total_tokens)
    ids = np.random.default_rng(0).integers(5, bundle.spec.decoder.vocab_size, shape)
    loaded = [load(bundle, profile=profile.name, threads=wishes.threads) for profile in profiles]
    alone = [_answer(Ours(loaded[0], ids[sample : sample + 1])) for sample in range(max(sizes))]
    opened = {size: Ours(model, ids[:size]) for size, model in zip(sizes, loaded, strict=True)}
    prefill: dict[int, list[float]] = {size: [] for size in sizes}
    steps: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(-1, wishes.rounds):
        for size, model in opened.items():
            spent = _timed(model, size)
            if number >= 0:
                prefill[size].append(spent[0])
                steps[size].append(spent[1])
    for size, model in opened.items():
        difference = _difference(_answer(model), alone[:size])
        if difference is None:
            yield skipped(f"{name}: batch {size}", "its answers are not those of batch 1")
            continue
        same = "" if size == 1 else f"tokens equal, logits within {difference:.0e}"
        rates = [size / median(times[size]) for times in (prefill, steps)]
        ones = [1 / median(times[1]) for times in (prefill, steps)]
        for what, rate, one in zip(("prefills", "tokens"), rates, ones, strict=True):
            limit = None if size == 1 else one
            why = "" if size == 1 else "batch 1"
            yield Row(f"{name}: {what} a second, batch {size}", rate, "/s", limit, why, True, same)


def _timed(model: Ours, size: int) -> tuple[float, float]:
    """Seconds of a prefill, and the median of decode steps."""
    start = perf_counter()
    logits = model.prefill()
    prefill, steps = perf_counter() - start, []
    for _ in range(STEPS):
        start = perf_counter()
        logits = model.step(logits.argmax(axis=1).tolist())
        steps.append(perf_counter() - start)
    return prefill, median(steps)


def _answer(model: Ours) -> tuple[Array, Array]:
    """Logits [B, vocab] of the prefill, and the tokens [B, steps] that follow."""
    first = logits = model.prefill().copy()
    tokens = []
    for _ in range(STEPS):
        tokens.append(logits.argmax(axis=1))
        logits = model.step(tokens[-1].tolist())
    return first, np.stack(tokens, axis=1)


def _difference(batch: tuple[Array, Array], alone: Sequence[tuple[Array, Array]]) -> float | None:
    """The largest difference of first logits as a share of their spread; None if it is too large, or tokens differ."""
    logits, tokens = (np.concatenate(parts) for parts in zip(*alone, strict=True))
    found = float(np.abs(batch[0] - logits).max() / logits.std())
    return found if found <= LARGEST and np.array_equal(batch[1], tokens) else None
