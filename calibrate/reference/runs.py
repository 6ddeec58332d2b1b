"""A prompt on its way through the layers of the streamed reference under one plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from calibrate.reference.observers import Rows
from calibrate.reference.pruning_stage import SameRows, StageRecord, apply_stage
from calibrate.reference.recording import KeptSegment, OpenSegment, Recorder
from calibrate.reference.records import EmbeddedRecord, SegmentRecord
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan


@dataclass
class Run:
    """A prompt on its way through the layers; `kept` are the surviving image tokens in the unpruned numbering."""

    plan: PruningPlan
    sample: int
    image_start: int
    prompt_tokens: int
    new_tokens: int
    hidden: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    kept: torch.Tensor
    forced: Sequence[Sequence[int]] | None
    class_attention: torch.Tensor | None
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    stages: list[StageRecord] = field(default_factory=list)
    segments: list[SegmentRecord | KeptSegment] = field(default_factory=list)
    embedded: EmbeddedRecord | None = None
    open_segment: OpenSegment | None = None
    same: SameRows | None = None  # what the stage before the present layer shares with others

    @property
    def last(self) -> int:
        """Row of the prompt's last token in the present sequence."""
        return self.hidden.shape[1] - self.new_tokens - 1

    @property
    def rows(self) -> Rows:
        """What it brings to the next layer."""
        return Rows(self.hidden, self.cos, self.sin, text=self.image_start + len(self.kept))

    def follow(self, leader: Run, layer: int) -> None:
        """Take over what `layer` made of a run with the same past."""
        if any(stage.layer == layer for stage in self.plan.stages):
            self.stages.append(leader.stages[-1])
        self.hidden, self.cos, self.sin, self.kept = leader.hidden, leader.cos, leader.sin, leader.kept
        self.query, self.key = leader.query, leader.key

    def prune(self, stage: int) -> None:
        """Keep what the plan's stage of that number selects, or what is forced."""
        record, (self.hidden, self.cos, self.sin) = apply_stage(
            self.plan,
            stage,
            rows=(self.hidden, self.cos, self.sin),
            query=self.query,
            key=self.key,
            last=self.last,
            image_start=self.image_start,
            before=self.kept,
            forced=self.forced[stage] if self.forced is not None else None,
            class_attention=self.class_attention,
            same=self.same,
        )
        self.kept = self.kept[torch.from_numpy(record.indices).to(self.kept.device)]
        self.stages.append(record)

    def close_segment(self, number: int, recorder: Recorder) -> None:
        """What was recorded since the last stage becomes a record; `number` is the run's."""
        if self.open_segment is not None:
            self.segments.append(recorder.close(self.open_segment, number, hidden=self.hidden, last=self.last))
            self.open_segment = None


def past_of(run: Run, layer: int) -> tuple[Any, ...]:
    """What decides a run's rows after `layer`: the prompt, and what was pruned until there."""
    stages = tuple(stage for stage in run.plan.stages if stage.layer <= layer)
    if not stages:
        return (run.sample,)  # however the plan prunes later
    forced = None if run.forced is None else tuple(tuple(kept) for kept in run.forced[: len(stages)])
    return run.sample, run.plan.importance, run.plan.grid, run.plan.spatial_metric, stages, forced


def share_rows(runs: Sequence[Run], layer: int) -> None:
    """Give those of a prompt's runs that choose from the same rows before `layer` what they can share."""
    same: dict[Any, SameRows] = {}
    for run in runs:
        number = next((n for n, stage in enumerate(run.plan.stages) if stage.layer == layer), None)
        if number is None or number < len(run.stages) or run.forced is not None:
            continue
        run.same = same.setdefault(past_of(run, layer - 1), SameRows())
        run.same.expect(run.plan, number)


def batches(runs: Sequence[Run], numbers: Iterable[int]) -> Iterator[list[int]]:
    """Those of one prompt's runs, by number, that go through a layer together: they have as many rows each.

    Few rows take a layer little less time than more. A batch has no more of them than the prompt without pruning, for
    which there is memory.
    """
    alike: dict[int, list[int]] = {}
    for number in numbers:
        alike.setdefault(runs[number].hidden.shape[1], []).append(number)
    for rows, group in alike.items():
        most = max(1, (runs[group[0]].prompt_tokens + runs[group[0]].new_tokens) // rows)
        yield from (group[at : at + most] for at in range(0, len(group), most))


def image_start(input_ids: torch.Tensor, image_token: int, image_tokens: int) -> int:
    """P: where the run of V image placeholders begins in `input_ids` [n].

    Raises InputError unless the prompt holds exactly V of them in one run, with text after it.
    """
    places = torch.nonzero(input_ids == image_token).flatten()
    start = int(places[0]) if len(places) else 0
    whole = len(places) == image_tokens and int(places[-1]) == start + image_tokens - 1
    if not whole or start + image_tokens >= len(input_ids):
        raise InputError(
            f"the prompt holds {len(places)} image tokens" + ("" if whole else ", not in one run with text after it"),
            wanted=f"one image of {image_tokens} tokens, then text",
            do="put the image placeholder into the prompt once, before the question",
        )
    return start
