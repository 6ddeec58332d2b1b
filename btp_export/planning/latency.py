"""What a plan's prefill costs: operations, times read back (`--latency-from`), or a device's limits (`--target`)."""

import math
from pathlib import Path

from btp_export.results.job import JobResult
from btp_export.results.profile import Profile
from btp_export.results.timing import Bench
from calibrate.place.cost import MeasuredParts, MeasuredPrefills, MeasuredSegment, PrefillCost, measured_cost
from calibrate.place.device_cost import Device, device_cost
from engines.targets import find_target
from graphs.records.errors import InputError
from graphs.records.reading import read_object
from graphs.records.record import read_record
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import ModelSpec


def prefill_cost(
    measured: Path | None, target: str | None, weights: str, spec: ModelSpec, profile: ShapeProfile
) -> PrefillCost:
    """The cost of plans for a model and a shape; at most one of `measured` and `target` is given.

    `weights` are the device's: the model's own, or int4. Raises InputError as read_latency, and for an unknown target.
    """
    operations = PrefillCost(spec.decoder, profile)
    if target is not None:
        device = find_target(target)
        precision = device.precision if weights == "model" else weights
        limits = Device(device.name, device.bandwidth, device.peak[device.precision], device.peak["float32"], precision)
        return device_cost(operations, limits)
    return operations if measured is None else measured_cost(read_latency(measured), measured, spec.decoder, profile)


def read_latency(path: Path) -> MeasuredPrefills | MeasuredParts:
    """The times in a document of `btp-export bench`, `profile` or `--model`.

    Raises InputError for a file that is not there, that is another document, or that is not whole.
    """
    document = read_object(path, noun="JSON document of a bench or profile", do="--latency-from FILE")
    kind = document.get("format")
    if kind == _format(Profile):
        return _of_profile(read_record(Profile, path, noun="profile"))
    if kind == _format(Bench):
        return _of_bench(read_record(Bench, path, noun="bench"))
    bench = read_record(JobResult, path, noun="result").bench if kind == _format(JobResult) else None
    if bench is None:
        raise InputError(
            f"{path} holds no prefill times with their operations",
            wanted="what `btp-export bench --json` or `btp-export profile --json` printed",
            do="btp-export bench BUNDLE --json > bench.json",
        )
    return _of_bench(bench)


def _format(kind: type[Bench] | type[Profile] | type[JobResult]) -> str:
    return str(kind.model_fields["format"].default)


def _of_bench(bench: Bench) -> MeasuredPrefills:
    return MeasuredPrefills(
        full_ms=bench.prefill.full_ms,
        pruned_ms=bench.prefill.pruned_ms,
        select_ms=math.fsum(bench.select_ms),
        full=bench.flops.full,
        pruned=bench.flops.pruned,
        selection=bench.flops.selection,
        batch=bench.batch,
        machine=f"{bench.engine or bench.device}, {bench.precision}",
    )


def _of_profile(profile: Profile) -> MeasuredParts:
    parts = [*profile.parts, *(profile.unpruned.parts if profile.unpruned else ())]
    selects = [part for part in profile.parts if part.kind == "select"]
    return MeasuredParts(
        segments=[
            MeasuredSegment(*part.layers, part.tokens, part.ms)
            for part in parts
            if part.kind == "prefill" and part.layers is not None
        ],
        head_ms=[part.ms for part in parts if part.kind == "head"],
        select_ms=math.fsum(part.ms for part in selects),
        selection=sum(part.flops for part in selects),
        image_tokens=profile.image_tokens,
        batch=profile.batch,
        machine=f"{profile.target}, {profile.precision}",
    )
