"""Samples side by side on the CPU, for small models: a second thread gains a product little, a second sample all of it.

On a busy machine it even loses: threads of a product wait for one another without sleeping. How many threads a product
has depends on the model and the process, never on the samples, so that some of them give the numbers of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final, Protocol, TypeVar

import torch

from graphs.files.cores import SMALL_WEIGHTS

MOST_WORKERS: Final = 4  # what Python does between the products runs in one thread at a time

T = TypeVar("T")
R = TypeVar("R")


class Each(Protocol):
    """`map` over samples that have nothing to do with one another; results in order."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]: ...


@contextmanager
def side_by_side(weights: int, device: str = "cpu") -> Iterator[Each]:
    """A `map` that works on several samples at a time if the model's `weights`, in bytes, are small, else on one."""
    threads = torch.get_num_threads()
    workers = min(threads, MOST_WORKERS) if device == "cpu" and weights <= SMALL_WEIGHTS else 1
    if workers == 1:
        yield map
        return
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
            # Whether gradients are wanted is a thread's own.
            yield lambda function, items: pool.map(torch.inference_mode()(function), items)
    finally:
        torch.set_num_threads(threads)  # part of what a worker sets is the whole process's
