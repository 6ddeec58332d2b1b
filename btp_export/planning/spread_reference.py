"""The streamed reference on the machines of a Ray cluster, a few samples at a time.

Each part reads the weights by itself, a layer at a time, so it is large enough that this is little of its time. What is
done lies in the work folder of the machine that asks; a run that goes on asks for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from btp_export.spreading import Cluster
from calibrate.calibrate import DROPPED_SAMPLES, measure_statistics
from calibrate.measure.statistics import Statistics
from calibrate.place.counts import Shape
from calibrate.reference.records import ReferenceInput
from calibrate.reference.streamed_model import StreamedReference
from graphs.files.checkpoint import Checkpoint
from graphs.files.resume import Work, digest
from graphs.records.plan import PruningPlan
from graphs.records.progress import Report

PART = 8  # samples; DROPPED_SAMPLES is so many parts


class SpreadReference(StreamedReference):
    """StreamedReference whose passes for `logits` and `measured` run on a cluster; all others run here.

    Parts compute with as many threads as this process, so that their numbers are its own.
    """

    def __init__(
        self, cluster: Cluster, checkpoint: Checkpoint, *, dtype: torch.dtype, device: str, work: Work | None
    ) -> None:
        super().__init__(checkpoint, dtype=dtype, device=device, work=work)
        self._cluster = cluster
        self._opens = (checkpoint, dtype, device, torch.get_num_threads())

    def logits(
        self, inputs: Sequence[ReferenceInput], plans: Sequence[PruningPlan], *, progress: Report | None = None
    ) -> list[np.ndarray]:
        parts = self.spread(_logits, _parts(inputs), (list(plans),), progress)
        each = [[arrays[str(number)] for number in range(len(arrays))] for arrays in parts]
        sizes = [len(part) for part in _parts(inputs)]
        return [
            logits
            for plan in range(len(plans))
            for arrays, size in zip(each, sizes, strict=True)
            for logits in arrays[plan * size : (plan + 1) * size]
        ]

    def spread(
        self,
        function: Callable[..., dict[str, np.ndarray]],
        parts: Sequence[Sequence[ReferenceInput]],
        more: tuple[Any, ...],
        progress: Report | None,
    ) -> list[Mapping[str, np.ndarray]]:
        """function(reference's making, part, *more) of each part, in order; what an interrupted run left is taken."""
        names = [f"{function.__name__.strip('_')}-{_identity(part, more)[:16]}" for part in parts]
        done = {number: arrays for number, name in enumerate(names) if (arrays := self._kept(name)) is not None}
        left = [number for number in range(len(parts)) if number not in done]
        asked = [(self._opens, parts[number], *more) for number in left]
        for place, arrays in self._cluster.results(function, asked, cpus=self._opens[-1]):
            done[left[place]] = arrays
            if self.work is not None:
                self.work.sequence(names[left[place]]).save(1, arrays, None)
            if progress is not None:
                progress(len(done), len(parts))
        return [done[number] for number in range(len(parts))]

    def _kept(self, name: str) -> Mapping[str, np.ndarray] | None:
        step = None if self.work is None else self.work.sequence(name).latest()
        return None if step is None else step.tensors


def measured(
    reference: StreamedReference,
    inputs: Sequence[ReferenceInput],
    shape: Shape,
    *,
    progress: Report | None = None,
    **settings: Any,
) -> Statistics:
    """calibrate.calibrate.measure_statistics, on the cluster where the reference is spread over one."""
    if not isinstance(reference, SpreadReference):
        return measure_statistics(reference, inputs, shape, progress=progress, **settings)
    parts = [(part, max(0, DROPPED_SAMPLES - PART * number)) for number, part in enumerate(_parts(inputs))]
    statistics: list[Mapping[str, np.ndarray]] = []
    for dropped in (PART, 0):  # parts that measure what dropping does, and those behind them
        some = [part for part, count in parts if min(count, PART) == dropped]
        statistics += reference.spread(_statistics, some, (shape, settings | {"dropped": dropped}), progress)
    return Statistics.joined([_of_arrays(arrays) for arrays in statistics])


def _of_arrays(arrays: Mapping[str, np.ndarray]) -> Statistics:
    taus = tuple(float(tau) for tau in arrays["taus"])
    return Statistics(taus=taus, **{name: array for name, array in arrays.items() if name != "taus"})


def _parts(inputs: Sequence[ReferenceInput]) -> list[Sequence[ReferenceInput]]:
    return [inputs[first : first + PART] for first in range(0, len(inputs), PART)]


def _identity(part: Sequence[ReferenceInput], more: tuple[Any, ...]) -> str:
    """What decides a part's results beside the model, which decides the work folder."""
    arrays = [
        array.cpu().float().numpy()
        for sample in part
        for array in (sample.input_ids, sample.image_features, sample.class_attention, sample.position_ids)
        if array is not None
    ]
    return digest([list(sample.new_tokens) for sample in part], repr(more), *arrays)


# What runs on the machines


def _opened(opens: tuple[Checkpoint, torch.dtype, str, int]) -> StreamedReference:
    checkpoint, dtype, device, threads = opens
    torch.set_num_threads(threads)
    return StreamedReference(checkpoint, dtype=dtype, device=device)


def _logits(opens: Any, part: Sequence[ReferenceInput], plans: Sequence[PruningPlan]) -> dict[str, np.ndarray]:
    return {str(number): logits for number, logits in enumerate(_opened(opens).logits(part, plans))}


def _statistics(
    opens: Any, part: Sequence[ReferenceInput], shape: Shape, settings: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    arrays = asdict(measure_statistics(_opened(opens), part, shape, **settings))
    return arrays | {"taus": np.array(arrays["taus"])}
