"""One graph on the reference's own inputs: how each kind of graph is fed, and what is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engines.findings import Findings, GraphCheck, agreement
from engines.reference_run import Array, SegmentRun, StageRun, VerifySample
from engines.runners import Runner
from graphs.plan import PruningPlan, Segment
from graphs.profile import ShapeProfile


@dataclass
class GraphVerifier:
    """One open graph; each kind of graph has a method that feeds it and looks at what comes out."""

    name: str
    runner: Runner
    plan: PruningPlan
    profile: ShapeProfile
    findings: Findings

    def check(self, samples: Sequence[VerifySample]) -> None:
        self.result = GraphCheck(self.name)
        self.findings.graphs.append(self.result)
        kind, _, number = self.name.partition("_")
        for batch in _batches(samples, self.profile.batch):
            if kind == "prefill" and number:
                self._prefill(batch, self.plan.segments()[int(number)])
            elif kind == "select":
                self._select(batch, int(number))
            else:
                others = {"vision": self._vision, "head": self._head, "decode": self._decode, "prefill": self._whole}
                others[kind](batch)

    def _run(self, feeds: Mapping[str, Sequence[Array]], count: int) -> dict[str, Array]:
        """Stack one array per sample into the batch, filled up and padded at the end to the declared shape."""
        inputs = {}
        for name, spec in self.runner.inputs.items():
            stacked = np.zeros(spec.shape, spec.dtype)
            for place in range(spec.shape[0]):
                value = feeds[name][min(place, count - 1)]
                corner = [slice(place, place + 1), *(slice(0, size) for size in np.shape(value))]
                stacked[tuple(corner)] = value
            inputs[name] = stacked
        return self.runner.run(inputs)

    def _compare(self, output: str, sample: int, wanted: Array, got: Array) -> None:
        self.result.add(f"{output} of sample {sample}", wanted, got)

    def _vision(self, batch: list[tuple[int, VerifySample]]) -> None:
        out = self._run({"pixel_values": [s.pixel_values for _, s in batch]}, len(batch))
        for place, (number, sample) in enumerate(batch):
            self._compare("image_features", number, sample.image_features, out["image_features"][place])

    def _prefill(self, batch: list[tuple[int, VerifySample]], segment: Segment) -> None:
        runs = [sample.run.segments[segment.index] for _, sample in batch]
        rows = self.profile.tokens_with(segment.image_tokens)
        if self.runner.inputs["hidden"].shape[1] != rows:
            self._fail(f"sees {self.runner.inputs['hidden'].shape[1]} rows, the plan says {rows}: tokens not pruned")
            return
        feeds = {
            "hidden": [_real(run.hidden_in, run) for run in runs],
            "cos": [_real(run.cos, run) for run in runs],
            "sin": [_real(run.sin, run) for run in runs],
            "last": [np.asarray(run.last, np.int32) for run in runs],
        }
        out = self._run(feeds, len(batch))
        for place, ((number, sample), run) in enumerate(zip(batch, runs, strict=True)):
            n = run.last + 1
            self._compare("hidden_out", number, run.hidden_out[:n], out["hidden_out"][place, :n])
            for layer in range(segment.start, segment.stop):
                key, value = f"key_{layer}", f"value_{layer}"
                self._compare(key, number, run.keys[layer][:, :n], out[key][place, :, :n])
                self._compare(value, number, run.values[layer][:, :n], out[value][place, :, :n])
            if "query" in out:
                query = self._query_rows(run, segment.image_tokens, sample.run.image_start, out["query"].shape[2])
                self._compare("query", number, query, out["query"][place, :, : query.shape[1]])

    def _select(self, batch: list[tuple[int, VerifySample]], number: int) -> None:
        stage, before = self.plan.stages[number], self.plan.tokens_before(number)
        feeds: dict[str, list[Array]] = {name: [] for name in self.runner.inputs}
        for _, sample in batch:
            for name, value in self._stage_inputs(sample, number).items():
                if name in feeds:
                    feeds[name].append(value)
        out = self._run(feeds, len(batch))
        for place, (at, sample) in enumerate(batch):
            inputs = self._stage_inputs(sample, number)
            record, last = sample.run.stages[number], int(inputs["last"])
            kept = out["indices"][place] if stage.keep else np.empty(0, np.int64)
            self._kept(number, at, kept, record, before)
            if int(out["last_out"][place]) != last - before + stage.keep:
                at_row, wanted = int(out["last_out"][place]), last - before + stage.keep
                self._fail(f"puts the last token at row {at_row}, the plan at {wanted}: tokens not pruned")
            if stage.keep and len(record.scores) and np.isfinite(record.scores).all():
                self._compare("scores", at, record.scores, out["scores"][place])
            # The rows that come out must be those at the graph's own indices, with their own positions.
            start = sample.run.image_start
            parts = [np.arange(start), start + kept, np.arange(start + before, last + 1)]
            rows = np.concatenate(parts).astype(np.int64)
            for name in ("hidden", "cos", "sin"):
                got = out[f"{name}_out"][place, : len(rows)]
                if rows.max() > last:  # only with indices that were already reported as wrong
                    continue
                self._compare(f"{name}_out", at, inputs[name][rows], got)

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

    def _head(self, batch: list[tuple[int, VerifySample]]) -> None:
        runs = [sample.run.segments[-1] for _, sample in batch]
        feeds = {
            "hidden": [_real(run.hidden_out, run) for run in runs],
            "last": [np.asarray(run.last, np.int32) for run in runs],
        }
        out = self._run(feeds, len(batch))
        for place, (number, sample) in enumerate(batch):
            self._compare("logits", number, sample.run.logits[0], out["logits"][place])

    def _decode(self, batch: list[tuple[int, VerifySample]]) -> None:
        """Every generated token but the last, with the reference's caches before it."""
        steps = min(len(sample.run.logits) - 1 for _, sample in batch)
        room = self.profile.new_tokens
        for segment in self.plan.segments():
            capacity = self.profile.capacity_with(segment.image_tokens)
            cache = self.runner.inputs.get(f"past_key_{segment.start}")
            if f"length_{segment.index}" not in self.runner.inputs or cache is None or cache.shape[2] != capacity:
                self._fail(f"has no caches of {capacity} rows from layer {segment.start} on: tokens not pruned")
                return
        for step in range(min(steps, room)):
            feeds: dict[str, list[Array]] = {name: [] for name in self.runner.inputs}
            for _, sample in batch:
                self._decode_inputs(sample, step, feeds)
            out = self._run(feeds, len(batch))
            for place, (number, sample) in enumerate(batch):
                self._compare("logits", number, sample.run.logits[step + 1], out["logits"][place])
                for run in sample.run.segments:
                    row = run.last + 1 + step
                    for layer in run.keys:
                        key, value = f"key_{layer}", f"value_{layer}"
                        self._compare(key, number, run.keys[layer][:, row], out[key][place, :, 0])
                        self._compare(value, number, run.values[layer][:, row], out[value][place, :, 0])

    def _decode_inputs(self, sample: VerifySample, step: int, feeds: dict[str, list[Array]]) -> None:
        embedded = sample.embedded
        row = embedded.last + 1 + step
        feeds["hidden"].append(embedded.hidden[row : row + 1])
        feeds["cos"].append(embedded.cos[row : row + 1])
        feeds["sin"].append(embedded.sin[row : row + 1])
        for index, run in enumerate(sample.run.segments):
            length = run.last + 1 + step
            feeds[f"length_{index}"].append(np.asarray(length, np.int32))
            for layer in run.keys:
                feeds[f"past_key_{layer}"].append(run.keys[layer][:, :length])
                feeds[f"past_value_{layer}"].append(run.values[layer][:, :length])

    def _whole(self, batch: list[tuple[int, VerifySample]]) -> None:
        """The prefill in one graph: not forced, so its own kept sets go through all layers."""
        start, image = self.profile.prefix_tokens, self.profile.image_tokens
        feeds: dict[str, list[Array]] = {name: [] for name in self.runner.inputs}
        for _, sample in batch:
            embedded = sample.embedded
            n = embedded.last + 1
            values = {"pixel_values": sample.pixel_values, "prefix": embedded.hidden[:start]}
            values |= {"text": embedded.hidden[start + image : n], "cos": embedded.cos[:n], "sin": embedded.sin[:n]}
            for name in feeds:
                feeds[name].append(values[name] if name in values else np.asarray(embedded.last, np.int32))
        out = self._run(feeds, len(batch))
        for place, (number, sample) in enumerate(batch):
            same = True
            for stage, record in enumerate(sample.run.stages):
                kept = out[f"indices_{stage}"][place] if self.plan.stages[stage].keep else np.empty(0, np.int64)
                self._kept(stage, number, kept, record, self.plan.tokens_before(stage))
                same = same and np.array_equal(record.indices, kept)
            if not same:  # other tokens give other values; agreement says how many, and its gate decides
                continue
            self._compare("logits", number, sample.run.logits[0], out["logits"][place])
            for run in sample.run.segments:
                for layer in run.keys:
                    rows = slice(0, run.last + 1)
                    key, value = f"key_{layer}", f"value_{layer}"
                    self._compare(key, number, run.keys[layer][:, rows], out[key][place][:, rows])
                    self._compare(value, number, run.values[layer][:, rows], out[value][place][:, rows])

    def _stage_inputs(self, sample: VerifySample, number: int) -> dict[str, Array]:
        """hidden, cos, sin, last, query and key that stage `number` of the reference saw; real rows only."""
        layer, before = self.plan.stages[number].layer, self.plan.tokens_before(number)
        if layer == 0:
            whole = sample.embedded
            n = whole.last + 1
            real = {"hidden": whole.hidden[:n], "cos": whole.cos[:n], "sin": whole.sin[:n]}
            return real | {"last": np.asarray(whole.last, np.int32)}
        index = next(segment.index for segment in self.plan.segments() if segment.stop == layer)
        run = sample.run.segments[index]
        values = {name: _real(getattr(run, name), run) for name in ("cos", "sin")}
        values |= {"hidden": _real(run.hidden_out, run), "last": np.asarray(run.last, np.int32)}
        if "query" in self.runner.inputs:
            rows = self.runner.inputs["query"].shape[2]
            values["query"] = self._query_rows(run, before, sample.run.image_start, rows)
            values["key"] = run.keys[layer - 1][:, : run.last + 1]
        return values

    def _query_rows(self, run: SegmentRun, image_tokens: int, image_start: int, rows: int) -> Array:
        """[H, q, D]: the row at `last`, or the real rows after the image where the graph takes all of them."""
        if self.plan.importance in ("mean-text", "similar-text"):
            start = image_start + image_tokens
            return run.query[:, start : min(run.last + 1, start + rows)]
        return run.query[:, run.last : run.last + 1]

    def _fail(self, text: str) -> None:
        sentence = f"{self.name} {text}"
        if sentence not in self.findings.failures:
            self.findings.failures.append(sentence)


def _real(rows: Array, run: SegmentRun) -> Array:
    """Rows of the prompt, without the appended tokens."""
    return rows[: run.last + 1]


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
