"""The graphs of one profile, wired together over memory that is allocated once.

Everything is static, so the whole memory plan is made when the chain is built: every tensor between two graphs has one
buffer, every layer's cache has its own capacity, and every graph is bound to its buffers. The prefill is one program
and the decode step another: fixed inputs in host memory, a fixed order of graphs and copies, fixed outputs, which a
device may run as one piece of work. Keys and values of a new token are written into their row of the cache in place. A
chain holds one batch at a time: the next prefill replaces it.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np

from engines.cache_memory import ALIGNMENT, allocate_layers, allocate_staging
from engines.joined_prefill import JoinedPrefill
from engines.prompt_memory import allocate_prompt
from engines.runners.interface import Array, Buffer, Dtype, JoiningLoader, Loader, Program, Runner, Step, TensorSpec
from engines.wiring import Tensors, behind, check_indices, links, not_the_plan, pick
from graphs import names
from graphs.records.errors import CheckError, InputError
from graphs.records.plan import PruningPlan, Segment
from graphs.records.shapes import ShapeProfile


@dataclass(frozen=True)
class Batch:
    """What a prefill takes, for the B samples of a profile.

    pixel_values: [B,3,h,w] float32, or what else the model takes (ShapeProfile.pixel_shape).
    prefix: embedding rows before the image [B,P,C]; text: those after it [B,T,C], anything right of a sample's last.
    last: [B] index of each sample's last token in the unpruned sequence.
    """

    pixel_values: Array
    prefix: Array
    text: Array
    last: Array


@dataclass(frozen=True)
class PrefillRun:
    """What a prefill gave, for the whole batch B of the profile.

    logits: [B, vocab] float32 of each sample's last token.
    kept: for each stage with keep > 0, [B, k] int32 indices into that stage's own image tokens, ascending.
    lengths: for each segment, [B] int32 valid cache rows.
    milliseconds: by graph, and "total" for the decoder chain with selection, head and copies but without vision.
    """

    logits: Array
    kept: dict[int, Array]
    lengths: tuple[Array, ...]
    milliseconds: dict[str, float]


class Chain:
    """Prefill and decode of one profile.

    Args:
        graphs: file of each graph of the profile by name, see graphs/interfaces.md.
        plan, profile: what the graphs were built for.
        rope: cos and sin, float32 [S + new tokens, D/2] each, a row for every token
        (graphs.building.rope.token_tables). loader: backend and device.
        opened: graphs by name that another chain of this backend and device has open; they are not opened again.

    Raises InputError if a graph is missing or its inputs are not those of the plan and the profile.
    """

    def __init__(
        self,
        graphs: Mapping[str, Path],
        *,
        plan: PruningPlan,
        profile: ShapeProfile,
        rope: tuple[Array, Array],
        loader: Loader,
        alignment: int = ALIGNMENT,
        opened: Mapping[str, Runner] | None = None,
    ) -> None:
        self._alignment = alignment  # bytes, of every address of the caches
        self.plan, self.profile, self.segments = plan, profile, plan.segments()
        self._graphs, self._loader = graphs, loader
        self.runners: dict[str, Runner] = {}  # the opened graphs by name
        self._opened = opened or {}
        self._steps: list[Step] = []
        self._joined: JoinedPrefill | None = None
        self._kept: dict[int, Buffer] = {}
        self._scores: dict[int, Buffer] = {}
        self._last: list[Buffer] = []
        self._chosen = {n: (stage.keep, plan.tokens_before(n)) for n, stage in enumerate(plan.stages) if stage.keep}
        self._gone = [profile.image_tokens - segment.image_tokens for segment in self.segments]
        self._is_seen = False  # whether the vision graph's outputs are those of its pixels
        self._lengths = np.zeros((len(self.segments), profile.batch), np.int32)
        self._places = np.zeros(profile.batch, np.int64)  # of the next token, in the unpruned sequence
        decode = self._open(names.DECODE)
        self.dtype: Dtype = decode.inputs["hidden"].dtype
        if len(rope[0]) < profile.max_positions:
            raise InputError(
                f"rotary tables for {len(rope[0])} positions",
                wanted=f"{profile.max_positions} for profile {profile.name}",
                do="export the bundle again",
            )
        self._rope = (rope[0].astype(self.dtype), rope[1].astype(self.dtype))
        self._bind_decode(decode)
        whole = names.WHOLE in graphs
        self._links = [] if whole else links(self.segments, self._path)
        joined = loader.join(self._links) if self._links and isinstance(loader, JoiningLoader) else None
        self._staging = allocate_staging(
            loader, self.segments, self._layers, [profile.tokens_with(s.image_tokens) for s in self.segments],
            whole=whole or joined is not None, alignment=alignment,
        )  # fmt: skip
        if whole:
            self._wire_whole()
        else:
            self._wire_segments(joined)

    # Prefill

    def prefill(
        self, batch: Batch, *, vision: Mapping[str, Array] | None = None, same_pictures: bool = False
    ) -> PrefillRun:
        """Run a batch from pictures to the logits of its last tokens; the caches then hold it.

        `vision` is `vision_outputs` after an earlier run of the same pictures, in place of running the vision graph,
        which is done if anything is missing there. With `same_pictures` it is not run either where the pixels are those
        of the latest prefill: what it gave is still in its place. A whole graph has no such place.
        """
        given = self._given(vision)
        if given is not None:
            program, first = self._prefill_after_vision, given
        elif same_pictures and self._has_seen(batch):
            program, first = self._prefill_of_same_pictures, []
        else:
            program, first = self._prefill, [batch.pixel_values]
        values = [*first, np.asarray(batch.last), batch.prefix, batch.text]
        self._is_seen = False  # until it has run
        for array, value in zip(program.inputs, values, strict=True):
            _fill(array, value)
        ran = program()
        self._is_seen = given is None and not self.is_whole
        times = {} if self._joined is None else self._joined.milliseconds()
        for name in ran.spans:
            times[name] = ran.lasted(name)
        times["total"] = ran.end - (ran.spans[names.VISION][1] if names.VISION in ran.spans else 0.0)
        logits, *found = program.outputs
        ends = [rows.tolist() for rows in found[: len(self.segments)]]
        kept = {stage: chosen.copy() for stage, chosen in zip(self._kept, found[len(self.segments) :], strict=True)}
        last = np.asarray(batch.last).tolist()
        self._check_pruning(last, ends, kept)
        self._lengths = np.array([[row + 1 for row in rows] for rows in ends], np.int32)
        self._places = np.array([row + 1 for row in last], np.int64)
        return PrefillRun(logits.copy(), kept, tuple(self._lengths.copy()), times)

    def _given(self, vision: Mapping[str, Array] | None) -> list[Array] | None:
        """The vision graph's outputs in their order; None if any is missing, or there is no such graph."""
        if vision is None or self.is_whole or not self._vision_out.keys() <= vision.keys():
            return None
        return [vision[name] for name in self._vision_out]

    def _has_seen(self, batch: Batch) -> bool:
        """Whether the vision graph's outputs are those of the batch's pictures."""
        return self._is_seen and np.array_equal(self._prefill.inputs[0], batch.pixel_values)

    # Decode

    def decode(self, hidden: Array) -> Array:
        """One more token for every sample: embedding rows [B,C] -> logits [B,vocab] float32, until the next step."""
        if int(self._lengths[0].max()) >= self._capacity(self.segments[0]):
            raise InputError(
                "the caches are full",
                wanted=f"at most {self.profile.new_tokens} new tokens",
                do="export with more room",
            )
        token, cos, sin, *lengths = self._decode.inputs
        token[...] = hidden.reshape(token.shape)
        for array, table in zip((cos, sin), self._rope, strict=True):
            table.take(self._places, axis=0, out=array[:, 0], mode="clip")  # the check above bounds the places
        for array, rows in zip(lengths, self._lengths, strict=True):
            array[...] = rows
        self._decode(after=self._append)
        self._lengths += 1
        self._places += 1
        return self._decode.outputs[0]

    def _append(self) -> None:
        """Put the new rows of all layers behind the valid ones of their caches."""
        for segment, rows in zip(self.segments, self._lengths.tolist(), strict=True):
            self._layers.append(segment.index, rows)

    @property
    def lengths(self) -> tuple[Array, ...]:
        """Valid cache rows now, for each segment [B]."""
        return tuple(lengths.copy() for lengths in self._lengths)

    @property
    def is_whole(self) -> bool:
        """Whether the prefill is one graph, so that vision and selection cannot be told apart."""
        return not self._vision_out

    @property
    def vision_outputs(self) -> dict[str, Array]:
        """What the vision graph made of the latest pictures, after a prefill of segments: image_features [B,V,C], and
        class_attention [B,V] if the plan scores by it. Empty for a whole graph.
        """
        return {name: buffer.read() for name, buffer in self._vision_out.items()}

    @property
    def stage_scores(self) -> dict[int, Array]:
        """Importance scores [B,n] of the latest prefill's stages with keep > 0; empty for a whole graph."""
        return {stage: buffer.read() for stage, buffer in self._scores.items()}

    def cache_bytes(self) -> int:
        """Bytes of all key and value caches."""
        buffers = [buffer for pair in self.caches.values() for buffer in pair]
        return sum(prod(buffer.shape) * buffer.dtype.itemsize for buffer in buffers)

    # Building

    def _path(self, name: str) -> Path:
        if name not in self._graphs:
            raise InputError(f"the bundle has no graph {name}", wanted="a complete bundle", do="export it again")
        return self._graphs[name]

    def _open(self, name: str) -> Runner:
        path = self._path(name)
        runner = self._opened[name] if name in self._opened else self._loader(path)
        self.runners[name] = runner
        return runner

    def _inputs(self, name: str) -> Tensors:
        """A new buffer for every input of an opened graph."""
        return self._buffers(name, self.runners[name].inputs, {})

    def _outputs(self, name: str, **given: Buffer) -> Tensors:
        """A buffer for every output of an opened graph: the given ones, new ones for the rest."""
        return self._buffers(name, self.runners[name].outputs, given)

    def _buffers(self, graph: str, specs: Mapping[str, TensorSpec], given: Mapping[str, Buffer]) -> Tensors:
        tensors = Tensors(graph)
        for name, spec in specs.items():
            tensors[name] = given[name] if name in given else self._loader.allocate(spec.dtype, spec.shape)
        return tensors

    def _capacity(self, segment: Segment) -> int:
        return self.profile.capacity_with(segment.image_tokens)

    def _bind_decode(self, decode: Runner) -> None:
        self._check_layers(decode)
        self._layers = allocate_layers(
            self._loader, self.segments, decode.inputs, decode.outputs, alignment=self._alignment
        )
        inputs = self._buffers(names.DECODE, decode.inputs, self._layers.caches)
        outputs = self._outputs(names.DECODE, **self._layers.rows)
        layers = range(self.plan.num_layers)
        self.caches = {n: (inputs[names.past_key(n)], inputs[names.past_value(n)]) for n in layers}
        lengths = [inputs[names.length(segment.index)] for segment in self.segments]
        self._hidden_size = inputs["hidden"].shape[-1]
        self._decode = self._loader.program(
            [Step("", decode.bind(inputs, outputs))],  # not timed part by part
            writes=[inputs["hidden"], inputs["cos"], inputs["sin"], *lengths],
            reads=[outputs["logits"]],
        )

    def _check_layers(self, decode: Runner) -> None:
        """Raise InputError unless the decode graph has the plan's layers with caches of the plan's sizes."""
        for segment in self.segments:
            for layer in range(segment.start, segment.stop):
                for rows in names.cache_rows(layer):
                    cache = decode.inputs.get(names.past(rows))
                    if cache is None or cache.shape[2] != self._capacity(segment):
                        raise not_the_plan(names.DECODE, names.past(rows))
                    if rows not in decode.outputs:
                        raise not_the_plan(names.DECODE, rows)

    def _straight(self, runner: Runner) -> dict[str, Buffer]:
        """The caches that a prefill graph writes itself: keys and values that may have more rows than it gives."""
        roomy = [name for name, spec in runner.outputs.items() if spec.roomy]
        return {name: self._layers.caches[names.past(name)] for name in roomy}

    def _store(self, segments: Sequence[Segment], straight: Container[str]) -> Callable[[], None] | None:
        """What writes staged keys and values [B,K,S_i,D] to the beginning of the layers' caches, if any are staged."""
        writers = [write for segment in segments for write in self._staging.writers(segment, straight)]
        starts = [0] * self.profile.batch

        def store() -> None:
            for write in writers:
                write(starts)

        return store if writers else None

    def _allocate_positions(self) -> dict[str, Buffer]:
        """cos and sin [B,S,D/2] of the unpruned sequence and `last` [B]; the first two never change."""
        batch, tokens = self.profile.batch, self.profile.total_tokens
        positions: dict[str, Buffer] = {}
        for name, table in zip(("cos", "sin"), self._rope, strict=True):
            positions[name] = self._loader.allocate(self.dtype, (batch, tokens, table.shape[1]))
            positions[name].write(np.broadcast_to(table[:tokens], positions[name].shape))
        positions["last"] = self._last_in = self._loader.allocate(np.dtype(np.int32), (batch,))
        return positions

    def _wire_segments(self, joined: Runner | None) -> None:
        """joined: all graphs behind the vision graph as one, if they are."""
        vision = self._open(names.VISION)
        inputs = self._inputs(names.VISION)
        self._pixels = inputs["pixel_values"]
        if "image_features" not in vision.outputs:
            raise not_the_plan(names.VISION, "image_features")
        kinds = self.dtype, vision.outputs["image_features"].dtype
        hidden, (self._prefix, features, self._text), join = allocate_prompt(
            self._loader, self.profile, self._hidden_size, kinds, alignment=self._alignment
        )
        self._vision_out: dict[str, Buffer] = self._outputs(names.VISION, image_features=features)
        self._steps.append(Step(names.VISION, vision.bind(inputs, self._vision_out)))
        if join is not None:
            self._steps.append(Step("", copies=join))
        flow = {**self._vision_out, "hidden": hidden, **self._allocate_positions()}
        if joined is None:
            self._wire_apart(flow)
        else:
            self._wire_joined(joined, flow)

    def _wire_apart(self, flow: dict[str, Buffer]) -> None:
        by_name = {link.name: link for link in self._links}
        for segment in self.segments:
            if segment.stage is not None:
                stage = by_name[names.select(segment.stage)]
                flow = behind(stage, flow, self._wire_selection(segment.stage, flow))
            self._last.append(flow["last"])
            flow = behind(by_name[names.prefill(segment.index)], flow, self._wire_prefill(segment, flow))
        head = self._open(names.HEAD)
        self._logits = self._outputs(names.HEAD)["logits"]
        self._steps.append(Step(names.HEAD, head.bind(pick(names.HEAD, head, flow), {"logits": self._logits})))

    def _wire_joined(self, runner: Runner, flow: dict[str, Buffer]) -> None:
        self._joined = joined = JoinedPrefill(
            runner, self._links, self.segments, flow, memory=self._layers, staging=self._staging,
            allocate=self._loader.allocate,
        )  # fmt: skip
        self._steps.append(Step("", joined, self._store(self.segments, joined.straight)))
        self._logits, self._last, self._kept, self._scores = joined.logits, joined.last, joined.kept, joined.scores

    def _wire_selection(self, stage: int, flow: dict[str, Buffer]) -> Tensors:
        name = names.select(stage)
        runner = self._open(name)
        outputs = self._outputs(name)
        self._steps.append(Step(name, runner.bind(pick(name, runner, flow), outputs)))
        if "indices" in outputs:
            self._kept[stage], self._scores[stage] = outputs["indices"], outputs["scores"]
        return outputs

    def _wire_prefill(self, segment: Segment, flow: dict[str, Buffer]) -> Tensors:
        name = names.prefill(segment.index)
        runner = self._open(name)
        last_key, straight = names.key(segment.stop - 1), self._straight(runner)
        if "query" in runner.outputs:  # a selection follows that reads this key too, without further rows
            straight.pop(last_key, None)
        outputs = self._outputs(name, **self._staging.rows | straight)
        run = runner.bind(pick(name, runner, flow), outputs)
        self._steps.append(Step(name, run, self._store([segment], straight)))
        return outputs

    def _wire_whole(self) -> None:
        runner = self._open(names.WHOLE)
        straight = self._straight(runner)
        outputs = self._outputs(names.WHOLE, **self._staging.rows | straight)
        flow = self._inputs(names.WHOLE)
        flow |= self._allocate_positions()
        self._pixels, self._prefix, self._text = flow["pixel_values"], flow["prefix"], flow["text"]
        run = runner.bind(pick(names.WHOLE, runner, flow), outputs)
        self._steps.append(Step(names.WHOLE, run, self._store(self.segments, straight)))
        self._logits = outputs["logits"]
        self._last = [outputs[names.last(segment.index)] for segment in self.segments]
        self._kept = {
            number: outputs[names.indices(number)] for number, stage in enumerate(self.plan.stages) if stage.keep
        }
        self._vision_out = {}

    # Running

    @cached_property
    def _prefill(self) -> Program:
        """From pixels to logits."""
        return self._program(self._steps, [self._pixels])

    @cached_property
    def _prefill_after_vision(self) -> Program:
        """The same from the vision graph's outputs."""
        return self._program(self._steps[1:], list(self._vision_out.values()))

    @cached_property
    def _prefill_of_same_pictures(self) -> Program:
        """The same from the outputs that the vision graph left."""
        return self._program(self._steps[1:], [])

    def _program(self, steps: Sequence[Step], first: list[Buffer]) -> Program:
        writes = [*first, self._last_in, self._prefix, self._text]
        return self._loader.program(steps, writes=writes, reads=[self._logits, *self._last, *self._kept.values()])

    def _check_pruning(self, last: list[int], ends: list[list[int]], kept: dict[int, Array]) -> None:
        """Raise CheckError unless every stage kept exactly its tokens and the sequence shrank by the rest.

        last: of each sample in the unpruned sequence; ends: of each segment, the same in its own. Lists, as a numpy
        call takes longer than all of it.
        """
        for number, (keep, tokens) in self._chosen.items():
            check_indices(number, kept[number], keep=keep, tokens=tokens)
        for segment, gone, rows in zip(self.segments, self._gone, ends, strict=True):
            wanted = [place - gone for place in last]
            if rows != wanted:
                raise CheckError(
                    f"segment {segment.index} ends at rows {rows}: pruning did not happen as planned",
                    wanted=f"{wanted}, that is {segment.image_tokens} image tokens",
                    do="export the bundle again",
                )


def _fill(array: Array, value: Array) -> None:
    """Write a whole input. Raises ValueError for a value of another shape: numpy would repeat it to fit."""
    if value.shape != array.shape:
        raise ValueError(f"an input of shape {value.shape} in place of {array.shape}")
    array[...] = value
