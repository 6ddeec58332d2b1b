"""Running graphs that are larger than memory: a part of a graph is open at a time, and all samples go through it.

`StreamedRunner` is a runner for one graph, cut by graphs/building/graph_parts.py. `FreeRunner` generates with the
graphs of a profile as `Chain` does, from pictures to tokens, but opens every graph once for all samples, and the decode
graph once for every new token. Shapes and names are those of graphs/interfaces.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx

from engines.runners import Runner, TensorSpec
from engines.verify.protocol import Array
from graphs import dtypes, names
from graphs.building.graph_parts import Part, has_bfloat16, read_graph, split, wide_weights, widen
from graphs.files.resume import Sequence as Steps
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan, Segment
from graphs.records.progress import Report
from graphs.records.shapes import ShapeProfile

PART_BYTES = 2**30  # weights in float32 that are open at a time: one layer of a 7B

STREAMED_TYPES = ("float32", "float16", "int32")  # what the parts of a graph compute in on a CPU

Seen = Callable[[int, Mapping[str, Array]], None]
Feeds = Sequence[Mapping[str, Array]]


class ModelOpener(Protocol):
    """A loader that opens graphs from memory too."""

    def open_model(self, content: bytes, path: Path) -> Runner:
        """Open a graph whose weights lie where those of the graph at `path` do."""


def run_each(runner: Runner, feeds: Feeds, see: Seen) -> None:
    """Run a graph on every feed; `see(number, outputs)` gets all outputs, perhaps in several parts, in graph order."""
    if isinstance(runner, StreamedRunner):
        runner.run_each(feeds, see)
        return
    for number, feed in enumerate(feeds):
        see(number, runner.run(feed))


class Shares:
    """Progress over several graphs, each with a share by its weights."""

    def __init__(self, files: Sequence[Path], progress: Report | None) -> None:
        self._sizes = [wide_weights(read_graph(path)) + 2**20 for path in files]
        self._progress = progress

    def of(self, number: int) -> Report:
        """A progress function for one of them."""
        before, size, everything = sum(self._sizes[:number]), self._sizes[number], sum(self._sizes)

        def report(done: int, total: int, text: str = "") -> None:
            if self._progress is not None:
                self._progress(before + size * done // total, everything, text)

        return report


class StreamedRunner:
    """One graph, opened part by part. bfloat16 graphs compute in float32 (see graphs/building/graph_parts.py)."""

    def __init__(self, path: Path, loader: ModelOpener, *, most: int = PART_BYTES, progress: Report | None = None):
        if not path.is_file():
            raise InputError(f"no graph {path}", wanted="a complete bundle", do="export it again")
        model = read_graph(path)
        if has_bfloat16(model):
            model = widen(model)
        self.inputs = {value.name: _spec(value, path) for value in model.graph.input}
        self.outputs = {value.name: _spec(value, path) for value in model.graph.output}
        self._parts: list[Part] = split(model, most)
        self._path, self._loader, self._progress = path, loader, progress

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs of one set of inputs."""
        outputs: dict[str, Array] = {}
        self.run_each([inputs], lambda _, part: outputs.update(part))
        return outputs

    def bind(self, inputs: Any, outputs: Any) -> Any:
        """Not for loops: parts are opened for every run."""
        raise NotImplementedError("a streamed graph is run, not bound")

    def run_each(self, feeds: Feeds, see: Seen) -> None:
        """Every feed through the first part, then every feed through the next, and so on."""
        carried: list[dict[str, Array]] = [{} for _ in feeds]
        steps = len(self._parts) * len(feeds)
        for number, part in enumerate(self._parts):
            runner = self._loader.open_model(part.model.SerializeToString(), self._path)
            later = {name for rest in self._parts[number + 1 :] for name in rest.inputs}
            for place, feed in enumerate(feeds):
                held = carried[place]
                given = {name: held[name] if name in held else feed[name] for name in part.inputs}
                made = runner.run(given)
                see(place, {name: value for name, value in made.items() if name in self.outputs})
                carried[place] = {name: value for name, value in (held | made).items() if name in later}
                if self._progress is not None:
                    self._progress(number * len(feeds) + place + 1, steps, self._path.stem)
            del runner


def _spec(value: onnx.ValueInfoProto, path: Path) -> TensorSpec:
    kind = value.type.tensor_type
    element = dtypes.BY_ONNX.get(kind.elem_type)
    static = all(dim.HasField("dim_value") for dim in kind.shape.dim)
    if element is None or element.name not in STREAMED_TYPES or not static:
        raise InputError(
            f"{path.name}: {value.name} has no static shape or a type that is not float32, float16 or int32",
            wanted="graphs as exported",
            do="export the bundle again",
        )
    return TensorSpec(value.name, element.numpy, tuple(dim.dim_value for dim in kind.shape.dim))


# -- generation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """What a prefill takes, for the B samples of a profile: see `Chain.prefill`."""

    pixel_values: Array
    prefix: Array  # [B,P,C]
    text: Array  # [B,T,C]
    last: Array  # [B]


@dataclass
class BatchRun:
    """A batch on its way: what flows between graphs, and what generation needs afterwards."""

    flow: dict[str, Array] = field(default_factory=dict)
    caches: dict[str, Array] = field(default_factory=dict)  # past_key_<l> and past_value_<l>: [B,K,cap_i,D]
    lengths: dict[int, Array] = field(default_factory=dict)  # by segment [B]
    kept: dict[int, Array] = field(default_factory=dict)  # by stage [B,k], among the tokens it chose from
    tokens: list[list[int]] = field(default_factory=list)  # by sample
    logits: Array | None = None

    def state(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Everything, as tensors and JSON types."""
        tensors = {f"flow.{name}": value for name, value in self.flow.items()}
        tensors |= {f"caches.{name}": value for name, value in self.caches.items()}
        tensors |= {f"lengths.{number}": value for number, value in self.lengths.items()}
        tensors |= {f"kept.{number}": value for number, value in self.kept.items()}
        if self.logits is not None:
            tensors["logits."] = self.logits
        return tensors, {"tokens": self.tokens}

    @staticmethod
    def restored(tensors: Mapping[str, Array], meta: Mapping[str, Any]) -> BatchRun:
        """The run that `state` was taken of."""
        run = BatchRun(tokens=[list(ids) for ids in meta["tokens"]])
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


class FreeRunner:
    """Greedy generation with the graphs of one profile, all batches at a time.

    Args:
        graphs: file of each graph by name.
        plan, profile, rope: as for `Chain`.
        open_graph: gives a runner for a file, streamed or not, that may tell how far it is.
        embed: embedding rows [n, C] of ids [n].
        steps: where checkpoints go, if anywhere.
    """

    def __init__(
        self,
        graphs: Mapping[str, Path],
        *,
        plan: PruningPlan,
        profile: ShapeProfile,
        rope: tuple[Array, Array],
        open_graph: Callable[[Path, Report], Runner],
        embed: Callable[[Array], Array],
        steps: Steps | None = None,
        progress: Report | None = None,
    ) -> None:
        self._graphs, self._plan, self._profile, self._rope = graphs, plan, profile, rope
        self._open_graph, self._embed, self._steps, self._progress = open_graph, embed, steps, progress

    def run(self, batches: Sequence[Batch], *, tokens: int, ends: Sequence[int]) -> list[BatchRun]:
        """`tokens` new tokens for every sample, or fewer where an end token comes."""
        prefill = names.prefill_graphs(self._plan, whole=names.WHOLE in self._graphs)
        order = [*prefill, *[names.DECODE] * (tokens - 1)]
        runs = [BatchRun() for _ in batches]
        latest = self._steps.resume("the free run") if self._steps is not None else None
        done = latest.number if latest is not None else 0
        if latest is not None:
            runs = _restored(latest.tensors, latest.meta)
        shares = Shares([self._graphs[name] for name in order[done:]], self._progress)
        for number, name in enumerate(order[done:], done):
            runner = self._open_graph(self._graphs[name], shares.of(number - done))
            if name == names.DECODE:
                self._decode(runner, runs, batches, ends)
            else:
                self._prefill_graph(name, runner, batches, runs)
            if self._steps is not None and self._steps.due:
                self._steps.save(number + 1, *_state(runs))
        return runs

    def _prefill_graph(self, name: str, runner: Runner, batches: Sequence[Batch], runs: list[BatchRun]) -> None:
        feeds: list[Mapping[str, Array]]
        if name in (names.VISION, names.WHOLE):
            feeds = [self._inputs(batch) for batch in batches]
        else:
            feeds = [run.flow for run in runs]
        feeds = [{part: _as(feed[part], runner.inputs[part]) for part in runner.inputs} for feed in feeds]
        take = self._taker(names.parse_graph(name))
        run_each(runner, feeds, lambda place, made: take(batches[place], runs[place], made))

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

    def _take_features(self, batch: Batch, run: BatchRun, made: Mapping[str, Array]) -> None:
        if "image_features" in made:
            rows = np.concatenate([batch.prefix, made["image_features"].astype(batch.prefix.dtype), batch.text], axis=1)
            run.flow = self._inputs(batch) | {"hidden": rows}
            self._begin_segment(run)

    def _take_segment(self, batch: Batch, run: BatchRun, made: Mapping[str, Array]) -> None:
        self._take_caches(run, made)
        run.flow |= {name: made[name] for name in ("query",) if name in made}
        if names.after("hidden") in made:
            run.flow["hidden"] = made[names.after("hidden")]

    def _take_selection(self, stage: int, batch: Batch, run: BatchRun, made: Mapping[str, Array]) -> None:
        if "indices" in made:
            run.kept[stage] = made["indices"]
        run.flow = {part: made[names.after(part)] for part in names.STREAM}
        self._begin_segment(run)

    def _take_logits(self, batch: Batch, run: BatchRun, made: Mapping[str, Array]) -> None:
        if "logits" in made:
            self._choose(run, made["logits"])

    def _take_whole(self, batch: Batch, run: BatchRun, made: Mapping[str, Array]) -> None:
        self._take_caches(run, made)
        for output, value in made.items():
            tensor = names.parse_tensor(output)
            if tensor.role == "indices":
                run.kept[tensor.at] = value
            elif tensor.role == "last":
                run.lengths[tensor.at] = value.astype(np.int32) + 1
        self._take_logits(batch, run, made)

    def _take_caches(self, run: BatchRun, made: Mapping[str, Array]) -> None:
        for output, value in made.items():
            tensor = names.parse_tensor(output)
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

    def _choose(self, run: BatchRun, logits: Array) -> None:
        run.logits = logits
        best = logits.argmax(axis=1)
        run.tokens = run.tokens or [[] for _ in best]
        for ids, token in zip(run.tokens, best, strict=True):
            ids.append(int(token))
        run.flow = {}

    def _decode(self, runner: Runner, runs: list[BatchRun], batches: Sequence[Batch], ends: Sequence[int]) -> None:
        """One token more for every sample; after its end token a sample goes on, and `run`'s reader stops there."""
        if all(set(ids) & set(ends) for run in runs for ids in run.tokens):
            return
        feeds = [_DecodeFeed(self, runner, run, batch) for run, batch in zip(runs, batches, strict=True)]
        run_each(runner, feeds, lambda place, made: self._take_token(runs[place], made))
        for run in runs:
            run.lengths = {number: lengths + 1 for number, lengths in run.lengths.items()}

    def _take_token(self, run: BatchRun, made: Mapping[str, Array]) -> None:
        for output, value in made.items():
            if output == "logits":
                self._choose(run, value)
                continue
            lengths = run.lengths[self._segment(names.parse_tensor(output).at).index]
            for sample, row in enumerate(lengths):
                run.caches[names.past(output)][sample, :, row] = value[sample, :, 0]

    def token_inputs(self, run: BatchRun, batch: Batch) -> dict[str, Array]:
        """hidden [B,1,C], cos and sin [B,1,D/2] of each sample's latest token, and the caches' lengths."""
        made = len(run.tokens[0])
        places = np.asarray(batch.last, np.int64) + made
        inputs = {"hidden": self._embed(np.array([ids[-1] for ids in run.tokens]))[:, None]}
        inputs |= {name: table[places][:, None] for name, table in zip(("cos", "sin"), self._rope, strict=True)}
        return inputs | {names.length(number): lengths for number, lengths in run.lengths.items()}


class _DecodeFeed(Mapping[str, Array]):
    """Inputs of one decode step, each made when it is asked for: together the caches are many."""

    def __init__(self, owner: FreeRunner, runner: Runner, run: BatchRun, batch: Batch) -> None:
        self._runner, self._run, self._token = runner, run, owner.token_inputs(run, batch)

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
    tensors = {f"{place}/{name}": value for place, (part, _) in enumerate(states) for name, value in part.items()}
    return tensors, [meta for _, meta in states]


def _restored(tensors: Mapping[str, Array], meta: Sequence[Any]) -> list[BatchRun]:
    runs = []
    for place, one in enumerate(meta):
        start = f"{place}/"
        mine = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
        runs.append(BatchRun.restored(mine, one))
    return runs
