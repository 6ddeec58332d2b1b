"""Checkpoints of a pass of the streamed reference: every run's rows after a layer, and what observers have seen.

A pass that is resumed gives the same numbers as one that was never interrupted: what is saved is what the next layer
reads, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from calibrate.reference.pruning_stage import StageRecord
from calibrate.reference.recording import Kept, OpenSegment, make_segment, segment_arrays
from calibrate.reference.records import EmbeddedRecord
from graphs import dtypes
from graphs.files.resume import KeptArray, Work
from graphs.files.resume import Sequence as Steps

STAGE_ARRAYS = ("indices", "absolute", "chosen", "scores")


@runtime_checkable
class Resumable(Protocol):
    """An observer whose state can be saved; one that has not these two makes a pass that cannot be resumed."""

    def state(self) -> tuple[Mapping[str, torch.Tensor], Any]:
        """Tensors by name, and the rest as JSON types."""

    def restore(self, tensors: Mapping[str, torch.Tensor], rest: Any) -> None:
        """Take up such a state; ValueError if it is damaged, and then nothing is taken up."""


class PassCheckpoints:
    """Saves and restores the runs of one pass (`calibrate.reference.runs.Run`) and its observers."""

    def __init__(self, work: Work, name: str, observers: Sequence[Any], device: torch.device) -> None:
        self._work, self._observers, self._device = work, observers, device
        self._steps: Steps = work.sequence(name)
        self._resumable = all(isinstance(observer, Resumable) for observer in observers)
        self._written = False

    def restore(self, runs: Sequence[Any]) -> int:
        """Bring runs and observers to the latest checkpoint; gives the number of layers that are done."""
        latest = self._steps.latest() if self._resumable else None
        if latest is None:
            return 0
        pool = _Loaded(latest.tensors, self._device, self._work)
        try:
            states = [_run_fields(pool, part) for part in latest.meta["runs"]]
            for observer, part in zip(self._observers, latest.meta["observers"], strict=True):
                observer.restore({name: pool.tensor(ref) for name, ref in part["tensors"].items()}, part["rest"])
        except (OSError, KeyError, ValueError, TypeError) as error:
            self._work.note(f"a checkpoint of an interrupted run is damaged ({error}) and is not used")
            return 0
        for run, state in zip(runs, states, strict=True):
            for name, value in state.items():
                setattr(run, name, value)
        self._work.note(f"resumed after layer {latest.number - 1} of an interrupted run")
        self._written = True
        return latest.number

    def save(self, done: int, runs: Sequence[Any], *, last: bool) -> None:
        """Write a checkpoint if one is due, and at the end if there was one before: a later pass may be interrupted."""
        if not self._resumable or not (self._steps.due or (last and self._written)):
            return
        pool = _Pool()
        meta = {"runs": [_run_state(pool, run) for run in runs], "observers": []}
        for observer in self._observers:
            tensors, rest = observer.state()
            named = {name: pool.add(tensor) for name, tensor in tensors.items()}
            meta["observers"].append({"tensors": named, "rest": rest})
        self._steps.save(done, pool.arrays, meta)
        self._written = True


class _Pool:
    """Tensors under made-up names, each once: runs with the same past share theirs."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self._names: dict[int, str] = {}
        self._alive: list[Any] = []  # an id belongs to its object only while that lives

    def add(self, value: torch.Tensor | Kept) -> Any:
        if isinstance(value, KeptArray):
            return value.reference
        if id(value) not in self._names:
            name = f"t{len(self._names)}"
            self._names[id(value)] = name
            self._alive.append(value)
            self.arrays[name] = value if isinstance(value, np.ndarray) else dtypes.numpy_of_torch(value)
        return self._names[id(value)]


class _Loaded:
    """The other way."""

    def __init__(self, arrays: Mapping[str, np.ndarray], device: torch.device, work: Work) -> None:
        self._arrays, self._device, self._work = arrays, device, work
        self._tensors: dict[str, torch.Tensor] = {}
        self._copies: dict[str, np.ndarray] = {}

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            self._tensors[name] = dtypes.torch_of_numpy(self._arrays[name]).to(self._device)
        return self._tensors[name]

    def array(self, name: str) -> np.ndarray:
        if name not in self._copies:
            self._copies[name] = np.array(self._arrays[name])
        return self._copies[name]

    def kept(self, ref: Any) -> Kept:
        if isinstance(ref, str):
            return self.array(ref)
        return self._work.kept(ref)


def _run_state(pool: _Pool, run: Any) -> dict[str, Any]:
    state: dict[str, Any] = {name: pool.add(getattr(run, name)) for name in ("hidden", "cos", "sin", "kept")}
    state |= {name: None if getattr(run, name) is None else pool.add(getattr(run, name)) for name in ("query", "key")}
    state["stages"] = [
        {"number": stage.number, "margin": stage.margin, "last": stage.last}
        | {name: pool.add(getattr(stage, name)) for name in STAGE_ARRAYS}
        for stage in run.stages
    ]
    state["segments"] = [
        {"start": part.start, "stop": part.stop, "last": part.last, "arrays": _added(pool, segment_arrays(part))}
        for part in run.segments
    ]
    part: OpenSegment | None = run.open_segment
    state["open_segment"] = part and {
        "start": part.start, "stop": part.stop, "query": pool.add(part.query), "arrays": _added(pool, part.arrays),
    }  # fmt: skip
    record: EmbeddedRecord | None = run.embedded
    state["embedded"] = record and {
        "last": record.last,
        **{name: pool.add(getattr(record, name)) for name in ("hidden", "cos", "sin")},
    }
    return state


def _added(pool: _Pool, arrays: Mapping[str, Kept]) -> dict[str, Any]:
    return {name: pool.add(array) for name, array in arrays.items()}


def _run_fields(pool: _Loaded, state: Mapping[str, Any]) -> dict[str, Any]:
    """What `_run_state` took down, by the run's fields."""
    fields: dict[str, Any] = {name: pool.tensor(state[name]) for name in ("hidden", "cos", "sin", "kept")}
    fields |= {name: None if state[name] is None else pool.tensor(state[name]) for name in ("query", "key")}
    fields["stages"] = [
        StageRecord(
            number=stage["number"],
            margin=stage["margin"],
            last=stage["last"],
            **{name: pool.array(stage[name]) for name in STAGE_ARRAYS},
        )
        for stage in state["stages"]
    ]
    fields["segments"] = [
        make_segment(part["start"], part["stop"], part["last"], _taken(pool, part["arrays"]))
        for part in state["segments"]
    ]
    part = state["open_segment"]
    fields["open_segment"] = part and OpenSegment(
        part["start"], part["stop"], pool.tensor(part["query"]), _taken(pool, part["arrays"])
    )
    record = state["embedded"]
    fields["embedded"] = record and EmbeddedRecord(
        last=record["last"], **{name: pool.array(record[name]) for name in ("hidden", "cos", "sin")}
    )
    return fields


def _taken(pool: _Loaded, arrays: Mapping[str, Any]) -> dict[str, Kept]:
    return {name: pool.kept(ref) for name, ref in arrays.items()}
