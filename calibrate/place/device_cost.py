"""What a plan costs on a device: each layer takes max(weight bytes / bandwidth, operations / peak).

A device reads a layer's weights once a pass, whatever the number of rows. Below the corner, the number of rows at which
arithmetic catches up with that, fewer tokens are not faster: a plan for the device keeps what costs it nothing.
Bandwidth and peak are data sheet numbers (engines/targets), so times are bounds from below, not measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from calibrate.place.cost import PrefillCost
from graphs import dtypes
from graphs.pruning import operations
from graphs.records.plan import PruningPlan, Stage, with_keep
from graphs.records.spec import DecoderSpec

INT4 = "int4"
GROUP = 128  # weights that share a float16 scale and a four-bit zero


@dataclass(frozen=True)
class Device:
    """A device's limits: `bandwidth` in bytes/s, `peak` and `peak_float32` in operations/s."""

    name: str
    bandwidth: float
    peak: float
    peak_float32: float
    weights: str = "float16"


@dataclass(frozen=True)
class DeviceCost(PrefillCost):
    """The prefill's time on a device in milliseconds, for one sample."""

    device: Device | None = None
    unit: str = "milliseconds"

    def of(self, plan: PruningPlan) -> float:
        """The cost in milliseconds."""
        device = self._device
        layers = sum(
            (segment.stop - segment.start) * self.layer_seconds(self.profile.tokens_with(segment.image_tokens))
            for segment in plan.segments()
        )
        decoder = self.decoder
        selection = sum(operations.selection(decoder, plan, n, self.profile) for n in range(len(plan.stages)))
        matrix = decoder.hidden_size * decoder.vocab_size
        # Four bits are the layers' matrices' only: the output matrix keeps 16.
        head = max(matrix * weight_bytes("float16") / device.bandwidth, 2 * matrix / device.peak)
        return 1e3 * (layers + head + selection / device.peak_float32)

    def layer_seconds(self, rows: int) -> float:
        """The least time of one layer on so many rows of the batch's samples, for one of them."""
        device, batch = self._device, self.profile.batch
        read = layer_weights(self.decoder) * weight_bytes(device.weights) / device.bandwidth
        return max(read, batch * operations.layer(self.decoder, rows) / device.peak) / batch

    @property
    def corner(self) -> int:
        """The most rows of a sample that take no longer than reading the weights."""
        low, high = 0, self.decoder.max_positions
        floor = self.layer_seconds(1)
        while low < high:
            middle = (low + high + 1) // 2
            # Where reading decides, both are the same time; the slack is for the last digit.
            low, high = (middle, high) if self.layer_seconds(middle) <= floor * (1 + 1e-12) else (low, middle - 1)
        return low

    @property
    def free_tokens(self) -> int:
        """Image tokens that a layer can see beside the text at no cost."""
        return max(0, self.corner - self.profile.tokens_with(0))

    def summary(self) -> dict[str, Any]:
        """As a plan's record holds it, with what pruning everything, beyond the corner, could buy at most."""
        device = self._device
        whole = self.layer_seconds(self.profile.tokens_with(self.profile.image_tokens))
        return {
            "unit": self.unit,
            "source": self.source,
            "target": device.name,
            "weights": device.weights,
            "corner_rows": self.corner,
            "free_tokens": self.free_tokens,
            "most_speedup": round(whole / self.layer_seconds(1), 4),
        }

    @property
    def _device(self) -> Device:
        assert self.device is not None, "a device cost is made with a device"
        return self.device


def device_cost(cost: PrefillCost, device: Device) -> DeviceCost:
    """The cost of the same model and shape on that device."""
    source = f"data sheet of {device.name}, {device.weights} weights: max(weight bytes / bandwidth, operations / peak)"
    return DeviceCost(cost.decoder, cost.profile, source=source, device=device)


def weight_bytes(weights: str) -> float:
    """Bytes a weight: an element type's, or of four bits with scales and zeros. Raises KeyError for other words."""
    return (0.5 * GROUP + 2.0 + 0.5) / GROUP if weights == INT4 else dtypes.BY_NAME[weights].nbytes


def layer_weights(decoder: DecoderSpec) -> int:
    """Weights in the matrices of one layer."""
    width, keys = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    return decoder.hidden_size * (2 * width + 2 * keys + 3 * decoder.intermediate_size)


def spend_what_is_free(plan: PruningPlan, free: int) -> PruningPlan:
    """The plan with every count raised to `free` tokens, as far as counts still fall; the plan itself if none rises.

    A stage that would no longer drop anything goes, and one that dropped everything keeps by attention what is free.
    """
    stages: list[Stage] = []
    tokens = plan.image_tokens
    for stage in plan.stages:
        keep = max(stage.keep, min(free, tokens))
        if keep == tokens:
            continue
        if keep == stage.keep:
            stages.append(stage)
        elif stage.keep:
            stages.append(with_keep(stage, keep, tokens))
        else:
            stages.append(Stage(layer=stage.layer, keep=keep, attention_quota=keep, pool=keep, boundary=keep))
        tokens = keep
    if stages == list(plan.stages):
        return plan
    return PruningPlan.model_validate(plan.model_dump() | {"stages": tuple(stages)})
