"""One graph on the reference's own inputs: how each kind of graph is fed, and what is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from engines.runners.interface import Runner
from engines.verify.gates import CheckResults, GraphCheck, agreement
from engines.verify.protocol import Array, SegmentRun, StageRun, VerifySample
from engines.verify.streamed_graphs import run_each
from graphs import names
from graphs.records.plan import PruningPlan, Segment
from graphs.records.shapes import ShapeProfile

Numbered = list[tuple[int, VerifySample]]  # a batch of samples with their numbers
Makers = Mapping[str, Callable[[], Sequence[Array]]]
Look = Callable[[Mapping[str, Array]], None]


class _Feed(Mapping[str, Array]):
    """A batch's inputs, each stacked when it is asked for: the caches of all layers together would fill memory.

    The arrays of the samples are filled up with the last sample, and padded at the end to the declared shape. A sample
    has one row of the first dimension, or several where pixels are a list of patches. `result` is told of numbers that
    the graph's type does not hold: they become infinite, and what it makes of them is not its fault.
    """

    def __init__(self, runner: Runner, batch: int, makers: Makers, result: GraphCheck) -> None:
        self._inputs, self._batch, self._makers, self._result = runner.inputs, batch, makers, result

    def __getitem__(self, name: str) -> Array:
        spec, values = self._inputs[name], self._makers[name]()
        stacked = np.zeros(spec.shape, spec.dtype)
        rows = spec.shape[0] // self._batch
        for place in range(self._batch):
            value = values[min(place, len(values) - 1)]
            sizes = np.shape(value)[1 if rows > 1 else 0 :]
            corner = [slice(place * rows, (place + 1) * rows), *(slice(0, size) for size in sizes)]
            try:
                with np.errstate(over="raise"):
                    stacked[tuple(corner)] = value
            except FloatingPointError:
                self._result.fails(f"the reference's {name} has numbers that {stacked.dtype} does not hold")
                with np.errstate(over="ignore"):
                    stacked[tuple(corner)] = value
        return stacked

    def __iter__(self) -> Iterator[str]:
        return iter(self._inputs)

    def __len__(self) -> int:
        return len(self._inputs)


@dataclass
class GraphVerifier:
    """One open graph; each kind of graph has a method that says how a batch is fed and looks at what comes out.

    What comes out may come in several parts (engines/verify/streamed_graphs.py), each output once.
    """

    name: str
    runner: Runner
    plan: PruningPlan
    profile: ShapeProfile
    findings: CheckResults

    def __post_init__(self) -> None:
        self.result = GraphCheck(self.name)
        self.findings.graphs.append(self.result)

    def check(self, samples: Sequence[VerifySample]) -> None:
        """Every sample through the graph. Raises CheckError where it does not run."""
        graph = names.parse_graph(self.name)
        runs: list[tuple[_Feed, Look]] = []
        for batch in _batches(samples, self.profile.batch):
            if graph.kind == "prefill":
                runs += self._prefill(batch, self.plan.segments()[graph.at])
            elif graph.kind == "select":
                runs += self._select(batch, graph.at)
            else:
                others = {"vision": self._vision, "head": self._head, "decode": self._decode, "whole": self._whole}
                runs += others[graph.kind](batch)
        run_each(self.runner, [feed for feed, _ in runs], lambda place, out: runs[place][1](out))

    def _feed(self, makers: Makers) -> _Feed:
        return _Feed(self.runner, self.profile.batch, makers, self.result)

    def _compare(self, output: str, sample: int, wanted: Array, got: Array) -> None:
        self.result.add(f"{output} of sample {sample}", wanted, got)

    def _vision(self, batch: Numbered) -> Iterator[tuple[_Feed, Look]]:
        def look(out: Mapping[str, Array]) -> None:
            for place, (number, sample) in enumerate(batch):
                self._compare("image_features", number, sample.image_features, out["image_features"][place])
                if sample.class_attention is not None and names.CLASS_ATTENTION in out:
                    got = out[names.CLASS_ATTENTION][place]
                    self._compare(names.CLASS_ATTENTION, number, sample.class_attention, got)

        yield self._feed({"pixel_values": lambda: [s.pixel_values for _, s in batch]}), look

    def _prefill(self, batch: Numbered, segment: Segment) -> Iterator[tuple[_Feed, Look]]:
        runs = [sample.run.segments[segment.index] for _, sample in batch]
        rows = self.profile.tokens_with(segment.image_tokens)
        following = next((n for n, stage in enumerate(self.plan.stages) if stage.layer == segment.stop), 0)
        if self.runner.inputs["hidden"].shape[1] != rows:
            self._fail(f"sees {self.runner.inputs['hidden'].shape[1]} rows, the plan says {rows}: tokens not pruned")
            return

        layers = {name for layer in range(segment.start, segment.stop) for name in names.cache_rows(layer)}
        given = self.runner.outputs.keys() - {names.after("hidden"), "query"}
        if given != layers or names.after("hidden") not in self.runner.outputs:
            self._fail(f"is not the graph of layers {segment.start} to {segment.stop - 1}, which the plan puts here")
            return

        def look(out: Mapping[str, Array]) -> None:
            for place, ((number, sample), run) in enumerate(zip(batch, runs, strict=True)):
                n = run.last + 1
                for name, got in _by_layer(out):
                    tensor = names.parse_tensor(name)
                    if tensor.is_cache:
                        self._compare(name, number, _rows(run, tensor)[:, :n], got[place, :, :n])
                    elif name == "query":
                        query = self._query_rows(run, following, sample.run.image_start, got.shape[2])
                        self._compare(name, number, query, got[place, :, : query.shape[1]])
                    else:
                        self._compare(name, number, run.hidden_out[:n], got[place, :n])

        feed = {
            "hidden": lambda: [_real(run.hidden_in, run) for run in runs],
            "cos": lambda: [_real(run.cos, run) for run in runs],
            "sin": lambda: [_real(run.sin, run) for run in runs],
            "last": lambda: [np.asarray(run.last, np.int32) for run in runs],
        }
        yield self._feed(feed), look

    def _select(self, batch: Numbered, number: int) -> Iterator[tuple[_Feed, Look]]:
        stage, before = self.plan.stages[number], self.plan.tokens_before(number)

        def look(out: Mapping[str, Array]) -> None:
            for place, (at, sample) in enumerate(batch):
                inputs = self._stage_inputs(sample, number)
                record, last = sample.run.stages[number], int(inputs["last"])
                kept = out["indices"][place] if stage.keep else np.empty(0, np.int64)
                self._kept(number, at, kept, record, before)
                if int(out[names.after("last")][place]) != last - before + stage.keep:
                    at_row, wanted = int(out[names.after("last")][place]), last - before + stage.keep
                    self._fail(f"puts the last token at row {at_row}, the plan at {wanted}: tokens not pruned")
                if stage.keep and len(record.scores) and np.isfinite(record.scores).all():
                    self._compare("scores", at, record.scores, out["scores"][place])
                # The rows that come out must be those at the graph's own indices, with their own positions.
                start = sample.run.image_start
                parts = [np.arange(start), start + kept, np.arange(start + before, last + 1)]
                rows = np.concatenate(parts).astype(np.int64)
                for name in ("hidden", "cos", "sin"):
                    got = out[names.after(name)][place, : len(rows)]
                    if rows.max() > last:  # only with indices that were already reported as wrong
                        continue
                    self._compare(names.after(name), at, inputs[name][rows], got)

        feed = {name: partial(self._stage_input, batch, number, name) for name in self.runner.inputs}
        yield self._feed(feed), look

    def _stage_input(self, batch: Numbered, number: int, name: str) -> list[Array]:
        return [self._stage_inputs(sample, number)[name] for _, sample in batch]

    def _kept(self, number: int, sample: int, kept: Array, record: StageRun, before: int) -> None:
        """Count, order and range of the kept indices, and how many are the reference's."""
        keep = self.plan.stages[number].keep
        if len(kept) != keep:
            self._fail(f"keeps {len(kept)} tokens, the plan says {keep}")
        if len(kept) and (int(kept.min()) < 0 or int(kept.max()) >= before or bool((np.diff(kept) <= 0).any())):
            self._fail(f"the kept indices of sample {sample} are not ascending, distinct and below {before}")
        share = agreement(record.indices, kept)
        self.findings.kept[number].append(share)
        if share < 1.0:
            self.findings.near_ties.append(_difference(self.name, sample, record, kept))

    def _head(self, batch: Numbered) -> Iterator[tuple[_Feed, Look]]:
        runs = [sample.run.segments[-1] for _, sample in batch]

        def look(out: Mapping[str, Array]) -> None:
            for place, (number, sample) in enumerate(batch):
                self._compare("logits", number, sample.run.logits[0], out["logits"][place])

        feed = {
            "hidden": lambda: [_real(run.hidden_out, run) for run in runs],
            "last": lambda: [np.asarray(run.last, np.int32) for run in runs],
        }
        yield self._feed(feed), look

    def _decode(self, batch: Numbered) -> Iterator[tuple[_Feed, Look]]:
        """Every generated token but the last, with the reference's caches before it."""
        steps = min(len(sample.run.logits) - 1 for _, sample in batch)
        for segment in self.plan.segments():
            capacity = self.profile.capacity_with(segment.image_tokens)
            cache = self.runner.inputs.get(names.past_key(segment.start))
            if names.length(segment.index) not in self.runner.inputs or cache is None or cache.shape[2] != capacity:
                self._fail(f"has no caches of {capacity} rows from layer {segment.start} on: tokens not pruned")
                return
        for step in range(min(steps, self.profile.new_tokens)):
            feed = {name: partial(self._decode_input, batch, step, name) for name in self.runner.inputs}
            yield self._feed(feed), partial(self._decoded, batch, step)

    def _decoded(self, batch: Numbered, step: int, out: Mapping[str, Array]) -> None:
        for place, (number, sample) in enumerate(batch):
            for name, got in _by_layer(out):
                if name == "logits":
                    self._compare(name, number, sample.run.logits[step + 1], got[place])
                    continue
                tensor = names.parse_tensor(name)
                run = self._segment_of(sample, tensor.at)
                self._compare(name, number, _rows(run, tensor)[:, run.last + 1 + step], got[place, :, 0])

    def _decode_input(self, batch: Numbered, step: int, name: str) -> list[Array]:
        tensor = names.parse_tensor(name)
        values: list[Array] = []
        for _, sample in batch:
            if tensor.role == "length":
                values.append(np.asarray(sample.run.segments[tensor.at].last + 1 + step, np.int32))
            elif tensor.is_cache:
                run = self._segment_of(sample, tensor.at)
                values.append(_rows(run, tensor)[:, : run.last + 1 + step])
            else:
                row = sample.embedded.last + 1 + step
                values.append(getattr(sample.embedded, name)[row : row + 1])
        return values

    def _segment_of(self, sample: VerifySample, layer: int) -> SegmentRun:
        index = next(part.index for part in self.plan.segments() if part.start <= layer < part.stop)
        return sample.run.segments[index]

    def _whole(self, batch: Numbered) -> Iterator[tuple[_Feed, Look]]:
        """The prefill in one graph: not forced, so its own kept sets go through all layers."""
        same = [True] * len(batch)  # other tokens give other values; agreement says how many, and its gate decides

        def look(out: Mapping[str, Array]) -> None:
            for place, (number, sample) in enumerate(batch):
                for stage, record in enumerate(sample.run.stages):
                    if self.plan.stages[stage].keep and names.indices(stage) in out:
                        kept = out[names.indices(stage)][place]
                        self._kept(stage, number, kept, record, self.plan.tokens_before(stage))
                        same[place] = same[place] and np.array_equal(record.indices, kept)
                    elif not self.plan.stages[stage].keep and "logits" in out:
                        self._kept(stage, number, np.empty(0, np.int64), record, self.plan.tokens_before(stage))
                self._whole_values(number, sample, place, out, same=same[place])

        feed = {name: partial(self._whole_input, batch, name) for name in self.runner.inputs}
        yield self._feed(feed), look

    def _whole_values(
        self, number: int, sample: VerifySample, place: int, out: Mapping[str, Array], *, same: bool
    ) -> None:
        """Where other tokens were kept the values are others; they must be finite all the same."""
        for name, values in _by_layer(out):
            tensor, wanted, got = names.parse_tensor(name), sample.run.logits[0], values[place]
            if tensor.is_cache:
                run = self._segment_of(sample, tensor.at)
                rows = slice(0, run.last + 1)
                wanted, got = _rows(run, tensor)[:, rows], got[:, rows]
            elif name != "logits":
                continue
            if same:
                self._compare(name, number, wanted, got)
            else:
                self.result.must_be_finite(f"{name} of sample {number}", got)

    def _whole_input(self, batch: Numbered, name: str) -> list[Array]:
        start, image = self.profile.prefix_tokens, self.profile.image_tokens
        values: list[Array] = []
        for _, sample in batch:
            embedded = sample.embedded
            n = embedded.last + 1
            if name == "pixel_values":
                values.append(sample.pixel_values)
            elif name == "last":
                values.append(np.asarray(embedded.last, np.int32))
            elif name in ("cos", "sin"):
                values.append(getattr(embedded, name)[:n])
            else:
                values.append(embedded.hidden[:start] if name == "prefix" else embedded.hidden[start + image : n])
        return values

    def _stage_inputs(self, sample: VerifySample, number: int) -> dict[str, Array]:
        """hidden, cos, sin, last, query and key (before layer 0 the tower's class attention) that stage `number` of the
        reference saw; real rows only.
        """
        layer = self.plan.stages[number].layer
        if layer == 0:
            whole = sample.embedded
            n = whole.last + 1
            real = {"hidden": whole.hidden[:n], "cos": whole.cos[:n], "sin": whole.sin[:n]}
            if sample.class_attention is not None:
                real[names.CLASS_ATTENTION] = sample.class_attention
            return real | {"last": np.asarray(whole.last, np.int32)}
        index = next(segment.index for segment in self.plan.segments() if segment.stop == layer)
        run = sample.run.segments[index]
        values = {name: _real(getattr(run, name), run) for name in ("cos", "sin")}
        values |= {"hidden": _real(run.hidden_out, run), "last": np.asarray(run.last, np.int32)}
        if "query" in self.runner.inputs:
            rows = self.runner.inputs["query"].shape[2]
            values["query"] = self._query_rows(run, number, sample.run.image_start, rows)
            values["key"] = run.keys[layer - 1][:, : run.last + 1]
        return values

    def _query_rows(self, run: SegmentRun, stage: int, image_start: int, rows: int) -> Array:
        """[H, q, D] that the stage looks from: the row at `last`, or the real rows after the image."""
        if self.plan.importance_of(stage) in ("mean-text", "similar-text"):
            start = image_start + self.plan.tokens_before(stage)
            return run.query[:, start : min(run.last + 1, start + rows)]
        return run.query[:, run.last : run.last + 1]

    def _fail(self, text: str) -> None:
        sentence = f"{self.name} {text}"
        if sentence not in self.findings.failures:
            self.findings.failures.append(sentence)


def _real(rows: Array, run: SegmentRun) -> Array:
    """Rows of the prompt, without the appended tokens."""
    return rows[: run.last + 1]


def _rows(run: SegmentRun, tensor: names.TensorName) -> Array:
    """The reference's keys or values [K,n,D] of the layer that a cache tensor is of."""
    return (run.keys if tensor.role in ("key", "past_key") else run.values)[tensor.at]


def _by_layer(out: Mapping[str, Array]) -> list[tuple[str, Array]]:
    """Outputs, those of layers first and in their order: the first that is not finite tells where that began."""
    return sorted(out.items(), key=lambda entry: not names.parse_tensor(entry[0]).is_cache)


def _batches(samples: Sequence[VerifySample], size: int) -> Iterator[list[tuple[int, VerifySample]]]:
    numbered = list(enumerate(samples))
    for start in range(0, len(numbered), size):
        yield numbered[start : start + size]


def _difference(name: str, sample: int, record: StageRun, kept: Array) -> str:
    """Names the tokens that differ, with the reference's scores."""
    wanted, got = {int(i) for i in record.indices}, {int(i) for i in kept}
    scores = record.scores

    def show(tokens: set[int]) -> str:
        some = sorted(tokens)[:6]
        return ", ".join(f"{i} ({scores[i]:.6g})" if i < len(scores) else str(i) for i in some)

    return (
        f"{name}, sample {sample}: {len(wanted - got)} of {len(wanted)} kept tokens differ; reference "
        f"{show(wanted - got)}, graph {show(got - wanted)}; narrowest cut {record.margin:.2g} of the highest score"
    )
