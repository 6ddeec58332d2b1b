"""The graphs of a prefill as one, where a loader can join them (engines/runners/interface.py: JoiningLoader)."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from engines.cache_memory import LayerMemory, Staging
from engines.runners.interface import Bound, Buffer, Dtype, Link, Runner
from engines.wiring import Tensors, pick
from graphs import names
from graphs.records.plan import Segment

Allocate = Callable[[Dtype, Sequence[int]], Buffer]


class JoinedPrefill:
    """All graphs behind the vision graph, bound to buffers; called like one of them.

    logits: of the last tokens. last: of each segment. kept, scores: of each stage with keep > 0. straight: keys and
    values that it writes into the caches itself; the others are staged.
    """

    def __init__(
        self,
        runner: Runner,
        links: Sequence[Link],
        segments: Sequence[Segment],
        flow: Mapping[str, Buffer],
        *,
        memory: LayerMemory,
        staging: Staging,
        allocate: Allocate,
    ) -> None:
        self._own = {link.name: link.own for link in links}
        self._parts = [(names.HEAD, 2 * len(segments))]  # and the mark in `milliseconds` at which each begins
        for segment in segments:
            self._parts.append((names.prefill(segment.index), 2 * segment.index + 1))
            if segment.stage is not None:
                self._parts.append((names.select(segment.stage), 2 * segment.index))
        self.straight: set[str] = set()
        rows = dict(self._key_and_value_rows(runner, segments, memory, staging))
        self._spans = allocate(np.dtype(np.int64), (2 * len(segments),))
        rows |= {
            self._own[names.prefill(segment.index)](names.TIMES): self._spans.view((2,), offset=2 * segment.index)
            for segment in segments
        }
        outputs = Tensors(names.WHOLE)
        for name, spec in runner.outputs.items():
            outputs[name] = rows[name] if name in rows else allocate(spec.dtype, spec.shape)
        self._bound: Bound = runner.bind(pick(names.WHOLE, runner, flow), outputs)
        self._began = self._ended = 0
        self.logits = outputs[self._own[names.HEAD]("logits")]
        self.last, self.kept, self.scores = [flow["last"]] * len(segments), dict[int, Buffer](), dict[int, Buffer]()
        for segment in segments:
            if segment.stage is None:
                continue
            own = self._own[names.select(segment.stage)]
            self.last[segment.index] = outputs[own(names.after("last"))]
            if segment.image_tokens:
                self.kept[segment.stage], self.scores[segment.stage] = outputs[own("indices")], outputs[own("scores")]

    def _key_and_value_rows(
        self, runner: Runner, segments: Sequence[Segment], memory: LayerMemory, staging: Staging
    ) -> Iterator[tuple[str, Buffer]]:
        """Where keys and values go: into the caches, if those may have more rows than the graph gives."""
        for segment in segments:
            for layer in range(segment.start, segment.stop):
                for rows in names.cache_rows(layer):
                    name = self._own[names.prefill(segment.index)](rows)
                    if name in runner.outputs and runner.outputs[name].roomy:
                        self.straight.add(rows)
                        yield name, memory.caches[names.past(rows)]
                    else:
                        yield name, staging.rows[rows]

    def __call__(self) -> None:
        self._began = time.perf_counter_ns()
        self._bound()
        self._ended = time.perf_counter_ns()

    def milliseconds(self) -> dict[str, float]:
        """How long each of the graphs took in the latest run.

        Segments say when their layers began and ended. What lies between two is the selection's time, what follows the
        last one the head's.
        """
        marks = [self._began, *self._spans.read().tolist(), self._ended]
        return {name: (marks[place + 1] - marks[place]) / 1e6 for name, place in self._parts}
