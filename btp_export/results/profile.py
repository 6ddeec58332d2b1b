"""`btp-export profile`: "btp-profile/1", also as a file beside the engines. Keys are described in docs/engines.md."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from btp_export.results.base import Count, Milliseconds, Result
from engines.tensorrt.records import Assemble, EngineWeights
from graphs.dtypes import Precision
from graphs.names import GraphKind
from graphs.records.record import MOST_LAYERS, Record

Kind = GraphKind
Bound = Literal["compute", "memory"]


class LayerMs(Record):
    """One layer of an engine."""

    name: str
    ms: Milliseconds


class ProfiledPart(Record):
    """One engine: what it computes, what it took (medians, milliseconds), and the least the device could need."""

    name: str
    kind: Kind
    layers: tuple[int, int] | None  # decoder layers [start, stop)
    tokens: Count  # of one sample that go in
    flops: Count
    bytes: Count
    ms: Milliseconds
    min_ms: Milliseconds
    p99_ms: Milliseconds
    runs: Count
    variation: float
    floor_ms: Milliseconds
    bound: Bound
    share_of_roofline: float | None
    slowest_layers: tuple[LayerMs, ...]

    @model_validator(mode="after")
    def _check(self) -> "ProfiledPart":
        if self.layers is not None and not 0 <= self.layers[0] < self.layers[1] <= MOST_LAYERS:
            raise ValueError(f"layers {self.layers[0]} to {self.layers[1]} of {self.name}")
        return self


class Totals(Record):
    """Milliseconds by kind; null where a whole engine does not tell. `first_token_ms` is all but decoding."""

    vision_ms: Milliseconds | None
    prefill_ms: Milliseconds | None
    select_ms: Milliseconds | None
    head_ms: Milliseconds | None
    select_share: float | None
    first_token_ms: Milliseconds
    decode_ms: Milliseconds


class UnprunedProfile(Record):
    """The engines without pruning."""

    parts: tuple[ProfiledPart, ...]
    totals: Totals


class DeviceLimits(Record):
    """What the device can do. `measured_target`: whether the target's choices were confirmed on it.

    `device` is the board that was measured, where its marks tell, else the target's. The limits are those of
    its data sheet (`sources`) times the measured clocks, null where they were not recorded.
    """

    device: str = ""
    gpu_clock_hz: float | None = None
    memory_clock_hz: float | None = None
    peak_flops: float
    bandwidth_bytes: float
    sources: tuple[str, ...]
    measured_target: bool


class Speedup(Record):
    """How many times faster than without pruning; `prefill` counts selection and head, and not vision."""

    prefill: float | None
    first_token: float | None
    decode: float | None


class BreakEven(Record):
    """From how many image tokens pruning pays; `reason` where that cannot be stated.

    A layer takes `floor_ms_per_layer` up to `corner_tokens`, `ms_per_token_and_layer` for each token beyond them; null
    on a side that was not measured.
    """

    image_tokens: int | None = None
    pays_here: bool | None = None
    saved_ms: float | None = None
    select_ms: Milliseconds
    ms_per_token_and_layer: float | None = None
    floor_ms_per_layer: float | None = None  # of few rows: what reading a layer's weights takes
    corner_tokens: float | None = None
    fit_error: float | None = None
    extrapolated: bool | None = None
    after_new_tokens: int | None = None
    reason: str | None = None


class WeightsMs(Record):
    """One part with both kinds of weights."""

    name: str
    baked_ms: Milliseconds
    shared_ms: Milliseconds


class ByWeights(Record):
    """A time of either kind of weights."""

    baked: Milliseconds
    shared: Milliseconds


class Faster(Record):
    """Which kind of weights takes less time."""

    first_token: EngineWeights
    decode: EngineWeights


class WeightsComparison(Record):
    """Baked against shared weights, measured with the same shapes and version."""

    parts: tuple[WeightsMs, ...]
    first_token_ms: ByWeights
    decode_ms: ByWeights
    faster: Faster
    target_takes: EngineWeights
    same_system: bool


class Profile(Result):
    """Latency of a target's engines, part by part. `file` and `plot` are there where they were written just now."""

    format: Literal["btp-profile/1"] = "btp-profile/1"
    target: str
    title: str
    tensorrt: str
    weights: EngineWeights
    assemble: Assemble
    precision: Precision
    profile: str
    batch: int = Field(ge=1)
    image_tokens: Count
    roofline: DeviceLimits
    system: dict[str, str]
    parts: tuple[ProfiledPart, ...]
    totals: Totals
    unpruned: UnprunedProfile | None
    speedup: Speedup | None
    break_even: BreakEven
    compare: WeightsComparison | None
    notes: tuple[str, ...]
    file: Path | None = Field(default=None, exclude_if=lambda path: path is None)
    plot: Path | None = Field(default=None, exclude_if=lambda path: path is None)
