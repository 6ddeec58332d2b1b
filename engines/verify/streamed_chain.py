"""Prefill and decode of graphs that are larger than memory, as `Chain` has them, for all batches at a time.

Every graph is opened once for all samples, a part at a time (engines/verify/streamed_graphs.py), and the decode graph
once for every new token. Shapes and names are those of graphs/interfaces.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engines.chain import Batch
from engines.runners.interface import Runner, TensorSpec
from engines.verify.protocol import Array
from engines.verify.streamed_graphs import Shares, run_each
from graphs import names
from graphs.files.resume import Sequence as Steps
from graphs.records.plan import PruningPlan, Segment
from graphs.records.progress import Report
from graphs.records.shapes import ShapeProfile


@dataclass
class BatchRun:
    """A batch on its way: what flows between graphs, and what decoding needs afterwards."""

    flow: dict[str, Array] = field(default_factory=dict)
    caches: dict[str, Array] = field(default_factory=dict)  # past_key_<l> and past_value_<l>: [B,K,cap_i,D]
    lengths: dict[int, Array] = field(default_factory=dict)  # by segment [B]
    kept: dict[int, Array] = field(default_factory=dict)  # by stage [B,k], among the tokens it chose from
    fed: list[list[int]] = field(default_factory=list)  # for each decode step the token of each sample
    logits: Array | None = None

    def state(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Everything, as tensors and JSON types."""
        tensors = {f"flow.{name}": value for name, value in self.flow.items()}
        tensors |= {f"caches.{name}": value for name, value in self.caches.items()}
        tensors |= {f"lengths.{number}": value for number, value in self.lengths.items()}
        tensors |= {f"kept.{number}": value for number, value in self.kept.items()}
        if self.logits is not None:
            tensors["logits."] = self.logits
        return tensors, {"fed": self.fed}

    @staticmethod
    def restored(tensors: Mapping[str, Array], meta: Mapping[str, Any]) -> BatchRun:
        """The run that `state` was taken of."""
        run = BatchRun(fed=[list(ids) for ids in meta["fed"]])
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            array = np.array(value)
            if kind in ("flow", "caches"):
                getattr(run, kind)[rest] = array
            elif kind in ("kept", "lengths"):
                getattr(run, kind)[int(rest)] = array
            elif kind == "logits":
                run.logits = array
        return run


class StreamedChain:
    """The graphs of one profile over all batches.

    Args:
        graphs: file of each graph by name.
        batches: what is to be run, each of the profile's size.
        plan, profile, rope: as for `Chain`.
        open_graph: gives a runner for a file, streamed or not, that may report how far it is.
        embed: embedding rows [n, C] of ids [n].
        tokens: at most so many are generated, so tokens - 1 decoded: for the progress.
        steps: where checkpoints go, if anywhere; what an interrupted run left there is taken up.
    """

    def __init__(
        self,
        graphs: Mapping[str, Path],
        batches: Sequence[Batch],
        *,
        plan: PruningPlan,
        profile: ShapeProfile,
        rope: tuple[Array, Array],
        open_graph: Callable[[Path, Report], Runner],
        embed: Callable[[Array], Array],
        tokens: int,
        steps: Steps | None = None,
        progress: Report | None = None,
    ) -> None:
        self._graphs, self._batches, self._plan, self._profile, self._rope = graphs, batches, plan, profile, rope
        self._open_graph, self._embed, self._steps = open_graph, embed, steps
        self._prefill_names = names.prefill_graphs(plan, whole=names.WHOLE in graphs)
        self._runs = [BatchRun() for _ in batches]
        self._done = 0  # graphs that have run
        latest = steps.resume("the free run") if steps is not None else None
        if latest is not None:
            self._runs, self._done = _restored(latest.tensors, latest.meta), latest.number
        self._begun = self._done
        order = [*self._prefill_names, *[names.DECODE] * (tokens - 1)]
        self._shares = Shares([graphs[name] for name in order[self._done :]], progress)

    @property
    def kept(self) -> list[dict[int, Array]]:
        """For each batch by stage [B,k], indices among the tokens that the stage chose from."""
        return [run.kept for run in self._runs]

    @property
    def fed(self) -> list[list[int]]:
        """Tokens that an interrupted run has decoded already: for each step one of each sample, in batch order."""
        batches = [run.fed for run in self._runs]
        return [[token for tokens in step for token in tokens] for step in zip(*batches, strict=True)]

    def prefill(self) -> Array:
        """Run all batches to their next logits [N,vocab], those after the tokens `fed`; N samples in batch order."""
        for name in self._prefill_names[self._done :]:
            self._prefill_graph(name, self._open(name))
            self._finish_graph()
        return self._logits()

    def decode(self, tokens: Sequence[int]) -> Array:
        """One token more for each of the N samples -> logits [N,vocab]."""
        size = self._profile.batch
        for number, run in enumerate(self._runs):
            run.fed.append([int(token) for token in tokens[number * size : (number + 1) * size]])
        runner = self._open(names.DECODE)
        feeds = [_DecodeFeed(self, runner, run, batch) for run, batch in zip(self._runs, self._batches, strict=True)]
        run_each(runner, feeds, lambda number, outputs: self._take_token(self._runs[number], outputs))
        for run in self._runs:
            run.lengths = {number: lengths + 1 for number, lengths in run.lengths.items()}
        self._finish_graph()
        return self._logits()

    def token_inputs(self, run: BatchRun, batch: Batch) -> dict[str, Array]:
        """hidden [B,1,C], cos and sin [B,1,D/2] of each sample's latest token, and the caches' lengths."""
        positions = np.asarray(batch.last, np.int64) + len(run.fed)
        inputs = {"hidden": self._embed(np.array(run.fed[-1]))[:, None]}
        inputs |= {name: table[positions][:, None] for name, table in zip(("cos", "sin"), self._rope, strict=True)}
        return inputs | {names.length(number): lengths for number, lengths in run.lengths.items()}

    def _open(self, name: str) -> Runner:
        return self._open_graph(self._graphs[name], self._shares.of(self._done - self._begun))

    def _finish_graph(self) -> None:
        self._done += 1
        if self._steps is not None and self._steps.due:
            self._steps.save(self._done, *_state(self._runs))

    def _logits(self) -> Array:
        logits = [run.logits for run in self._runs if run.logits is not None]
        return np.concatenate(logits)

    def _prefill_graph(self, name: str, runner: Runner) -> None:
        feeds: list[Mapping[str, Array]]
        if name in (names.VISION, names.WHOLE):
            feeds = [self._inputs(batch) for batch in self._batches]
        else:
            feeds = [run.flow for run in self._runs]
        feeds = [{part: _as(feed[part], runner.inputs[part]) for part in runner.inputs} for feed in feeds]
        take = self._taker(names.parse_graph(name))
        run_each(runner, feeds, lambda number, outputs: take(self._batches[number], self._runs[number], outputs))

    def _inputs(self, batch: Batch) -> dict[str, Array]:
        """Inputs of the vision graph and of a whole prefill."""
        tokens = self._profile.total_tokens
        cos, sin = (np.broadcast_to(table[:tokens], (len(batch.last), *table[:tokens].shape)) for table in self._rope)
        inputs = {"pixel_values": batch.pixel_values, "prefix": batch.prefix, "text": batch.text}
        return inputs | {"cos": cos, "sin": sin, "last": batch.last}

    def _taker(self, graph: names.GraphName) -> Callable[[Batch, BatchRun, Mapping[str, Array]], None]:
        """What puts a graph's outputs where they belong. They may come in several parts, each output once."""
        if graph.kind == "select":
            return partial(self._take_selection, graph.at)
        takers = {
            "vision": self._take_features,
            "prefill": self._take_segment,
            "head": self._take_logits,
            "whole": self._take_whole,
        }
        return takers[graph.kind]

    def _take_features(self, batch: Batch, run: BatchRun, outputs: Mapping[str, Array]) -> None:
        if names.CLASS_ATTENTION in outputs:
            run.flow = dict(run.flow) | {names.CLASS_ATTENTION: outputs[names.CLASS_ATTENTION]}
        if "image_features" in outputs:
            features = outputs["image_features"].astype(batch.prefix.dtype)
            hidden = np.concatenate([batch.prefix, features, batch.text], axis=1)
            run.flow = dict(run.flow) | self._inputs(batch) | {"hidden": hidden}
            self._begin_segment(run)

    def _take_segment(self, batch: Batch, run: BatchRun, outputs: Mapping[str, Array]) -> None:
        self._take_caches(run, outputs)
        run.flow |= {name: outputs[name] for name in ("query",) if name in outputs}
        if names.after("hidden") in outputs:
            run.flow["hidden"] = outputs[names.after("hidden")]

    def _take_selection(self, stage: int, batch: Batch, run: BatchRun, outputs: Mapping[str, Array]) -> None:
        if "indices" in outputs:
            run.kept[stage] = outputs["indices"]
        run.flow = {part: outputs[names.after(part)] for part in names.STREAM}
        self._begin_segment(run)

    def _take_logits(self, batch: Batch, run: BatchRun, outputs: Mapping[str, Array]) -> None:
        if "logits" in outputs:
            run.logits = outputs["logits"]
            run.flow = {}  # nothing flows on

    def _take_whole(self, batch: Batch, run: BatchRun, outputs: Mapping[str, Array]) -> None:
        self._take_caches(run, outputs)
        for name, value in outputs.items():
            tensor = names.parse_tensor(name)
            if tensor.role == "indices":
                run.kept[tensor.at] = value
            elif tensor.role == "last":
                run.lengths[tensor.at] = value.astype(np.int32) + 1
        self._take_logits(batch, run, outputs)

    def _take_caches(self, run: BatchRun, outputs: Mapping[str, Array]) -> None:
        for name, value in outputs.items():
            tensor = names.parse_tensor(name)
            if tensor.is_cache:
                self._cache(run, tensor, value)

    def _begin_segment(self, run: BatchRun) -> None:
        """The next segment sees what flows now. With a stage at layer 0 there is no segment in front of it."""
        first = self._plan.segments()[0]
        if not run.lengths and first.stage is not None and run.flow["hidden"].shape[1] == self._profile.total_tokens:
            return
        run.lengths[len(run.lengths)] = np.asarray(run.flow["last"], np.int32) + 1

    def _cache(self, run: BatchRun, tensor: names.TensorName, rows: Array) -> None:
        segment = self._segment(tensor.at)
        capacity = self._profile.capacity_with(segment.image_tokens)
        cache = np.zeros((*rows.shape[:2], capacity, rows.shape[3]), rows.dtype)
        cache[:, :, : rows.shape[2]] = rows
        run.caches[names.past(tensor.name)] = cache
        if tensor.role == "key":
            run.flow["key"] = rows

    def _segment(self, layer: int) -> Segment:
        return next(segment for segment in self._plan.segments() if segment.start <= layer < segment.stop)

    def _take_token(self, run: BatchRun, outputs: Mapping[str, Array]) -> None:
        for name, value in outputs.items():
            if name == "logits":
                run.logits = value
                continue
            lengths = run.lengths[self._segment(names.parse_tensor(name).at).index]
            for sample, row in enumerate(lengths):
                run.caches[names.past(name)][sample, :, row] = value[sample, :, 0]


class _DecodeFeed(Mapping[str, Array]):
    """Inputs of one decode step, each made when it is asked for: together the caches are many."""

    def __init__(self, chain: StreamedChain, runner: Runner, run: BatchRun, batch: Batch) -> None:
        self._runner, self._run, self._token = runner, run, chain.token_inputs(run, batch)

    def __getitem__(self, name: str) -> Array:
        value = self._run.caches[name] if name in self._run.caches else self._token[name]
        return _as(value, self._runner.inputs[name])

    def __iter__(self) -> Any:
        return iter(self._runner.inputs)

    def __len__(self) -> int:
        return len(self._runner.inputs)


def _as(value: Array, spec: TensorSpec) -> Array:
    """The array in the type the graph takes."""
    return np.ascontiguousarray(value, dtype=spec.dtype)


def _state(runs: Sequence[BatchRun]) -> tuple[dict[str, Array], list[Any]]:
    states = [run.state() for run in runs]
    tensors = {f"{number}/{name}": value for number, (part, _) in enumerate(states) for name, value in part.items()}
    return tensors, [meta for _, meta in states]


def _restored(tensors: Mapping[str, Array], metas: Sequence[Any]) -> list[BatchRun]:
    runs = []
    for number, meta in enumerate(metas):
        start = f"{number}/"
        own = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
        runs.append(BatchRun.restored(own, meta))
    return runs
