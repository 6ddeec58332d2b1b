"""ReportData becomes the document of report.json: everything the page shows, with no path of this machine in it."""

from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

from pydantic_core import to_jsonable_python

from btp_export.report.data import Picture, ReportData
from btp_export.results.base import Result, finite
from btp_export.results.report import Costs, PictureRecord, ReportDocument, TokensPerLayer
from btp_export.results.timing import CacheBytes, Operations
from graphs.pruning.operations import cost
from graphs.records.manifest import Manifest
from graphs.records.plan import PruningPlan
from graphs.records.record import Record

PLACES = frozenset({"bundle", "out", "path", "folder"})  # keys of a record that say where files lie on this machine

Part = TypeVar("Part", bound=Record)


def document(data: ReportData) -> ReportDocument:
    """Everything the page shows: the contents of report.json.

    The same data gives the same document. Paths of this machine do not get in.
    """
    plan, manifest = data.plan, data.manifest
    calibration = data.calibration if data.calibration is not None else plan.calibration
    return ReportDocument(
        plan_name=data.plan_name,
        plan=plan.model_copy(update={"calibration": {}}),
        average_tokens=plan.average_tokens,
        compression=plan.compression,
        tokens_per_layer=TokensPerLayer(
            full=(plan.image_tokens,) * plan.num_layers, pruned=tuple(plan.tokens_per_layer())
        ),
        model=_portable(manifest.model) if manifest else None,
        build=manifest.build if manifest else None,
        profiles=manifest.profiles if manifest else None,
        costs=costs(plan, manifest) if manifest else None,
        calibration=_without_places(finite(to_jsonable_python(calibration))) or None,
        verification=_portable(data.verification) if data.verification else None,
        evaluation=_portable(data.evaluation) if data.evaluation else None,
        bench=_portable(data.bench) if data.bench else None,
        engines=tuple(_portable(profile) for profile in data.engines),
        pictures=tuple(_picture_record(picture) for picture in data.pictures),
        tools=dict(manifest.tools) if manifest else None,
        machine=data.machine,
    )


def costs(plan: PruningPlan, manifest: Manifest) -> Costs:
    """Prefill operations and cache bytes of the first profile without and with pruning, by
    graphs/pruning/operations.py.
    """
    profile, decoder, precision = manifest.profiles[0], manifest.spec.decoder, manifest.build.precision
    full = cost(decoder, plan.without_stages(), profile, precision)
    pruned = cost(decoder, plan, profile, precision)
    return Costs(
        operations=Operations(full=full.decoder, pruned=pruned.decoder, selection=sum(pruned.selection)),
        cache_bytes=CacheBytes(full=full.cache_bytes, pruned=pruned.cache_bytes),
    )


def _picture_record(picture: Picture) -> PictureRecord:
    return PictureRecord(
        prompt=picture.prompt,
        answer=picture.answer,
        expected=picture.expected,
        grid=picture.grid,
        blocks=picture.blocks,
        kept=tuple(tuple(int(index) for index in stage) for stage in picture.kept),
        kind=picture.kind,
        full_answer=picture.full_answer,
        divergence=picture.divergence,
    )


def _portable(part: Part) -> Part:
    """The part without where things lie on this machine: of an absolute path only the last name stays."""
    fields = part.document() if isinstance(part, Result) else part.model_dump(mode="json")
    return type(part).model_validate(_without_places(fields))


def _without_places(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_places(item) for key, item in value.items() if key not in PLACES}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    if isinstance(value, str) and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()):
        return PurePosixPath(value.replace("\\", "/")).name
    return value
