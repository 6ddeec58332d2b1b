"""What a report is made of. Everything but the plan may be missing; the page then says which command measures it."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from pydantic import Field

from btp_export.console import plain
from graphs.pruning.operations import cost
from graphs.records.manifest import Manifest
from graphs.records.plan import PruningPlan
from graphs.records.record import Strict
from graphs.records.token_layout import Blocks

if TYPE_CHECKING:
    from PIL import Image

FORMAT = "btp-report/1"
PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "numpy")
PLACES = frozenset({"bundle", "out", "path", "folder"})  # keys of results that say where files lie on this machine


class Machine(Strict):
    """The machine that measured. It has no name on purpose: a report is passed around."""

    cpu: str
    cores: int = Field(ge=1)
    system: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Picture:
    """One picture as the model saw it, and the image tokens kept at each stage.

    `grid` is (rows, columns). `kept[j]` are the tokens that stage j leaves, as indices into the grid, ascending.
    """

    image: "Image.Image"
    prompt: str
    answer: str
    grid: tuple[int, int]
    kept: Sequence[Sequence[int]]
    expected: str | None = None
    blocks: Blocks = ()  # of the tokens that `kept` counts, where they are not the grid


@dataclass(frozen=True)
class ReportData:
    """All parts of a report.

    `verification`, `evaluation` and `bench` are the JSON documents of `btp-export verify`, `eval` and `bench`;
    `calibration` is the plan's calibration record unless another one is given. `plan_name` is the name of the
    bundle's own plan among the evaluation's rows.
    """

    plan: PruningPlan
    manifest: Manifest | None = None
    plan_name: str = "btp"
    calibration: Mapping[str, Any] | None = None
    verification: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    bench: Mapping[str, Any] | None = None
    engines: Sequence[Mapping[str, Any]] = ()  # documents of `btp-export profile`, one for each device
    pictures: Sequence[Picture] = ()
    machine: Machine | None = field(default_factory=lambda: machine())


def machine() -> Machine:
    """This machine: processor, cores that this process may use, system and versions of what runs the graphs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # not needed for every step; the page lists what there is
    return Machine(cpu=_processor(), cores=cores, system=f"{platform.system()} {platform.machine()}", versions=versions)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    # "model name" on x86; many ARM boards have only "Model" or "Hardware".
    for key in ("model name", "Model", "Hardware"):
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == key and value.strip():
                return " ".join(value.split())
    return platform.processor() or platform.machine() or "unknown"


def document(data: ReportData) -> dict[str, Any]:
    """Everything the page shows, as JSON types: the contents of report.json.

    The same data gives the same document. Paths of this machine do not get in.
    """
    plan = data.plan
    calibration = data.calibration if data.calibration is not None else plan.calibration
    return {
        "format": FORMAT,
        "plan_name": data.plan_name,
        "plan": plan.model_dump(mode="json", exclude={"calibration"}),
        "average_tokens": plan.average_tokens,
        "compression": plan.compression,
        "tokens_per_layer": {"full": [plan.image_tokens] * plan.num_layers, "pruned": plan.tokens_per_layer()},
        "model": _portable(data.manifest.model) if data.manifest else None,
        "build": data.manifest.build.model_dump(mode="json") if data.manifest else None,
        "profiles": [profile.model_dump(mode="json") for profile in data.manifest.profiles] if data.manifest else None,
        "costs": costs(plan, data.manifest) if data.manifest else None,
        "calibration": _portable(calibration) or None,
        "verification": _portable(data.verification),
        "evaluation": _portable(data.evaluation),
        "bench": _portable(data.bench),
        "engines": [_portable(profile) for profile in data.engines],
        "pictures": [_picture_record(picture) for picture in data.pictures],
        "tools": dict(data.manifest.tools) if data.manifest else None,
        "machine": data.machine.model_dump(mode="json") if data.machine else None,
    }


def costs(plan: PruningPlan, manifest: Manifest) -> dict[str, dict[str, int]]:
    """Prefill operations and cache bytes of the first profile without and with pruning, by
    graphs/pruning/operations.py.
    """
    profile, decoder, precision = manifest.profiles[0], manifest.spec.decoder, manifest.build.precision
    full = cost(decoder, plan.without_stages(), profile, precision)
    pruned = cost(decoder, plan, profile, precision)
    return {
        "operations": {"full": full.decoder, "pruned": pruned.decoder, "selection": sum(pruned.selection)},
        "cache_bytes": {"full": full.cache_bytes, "pruned": pruned.cache_bytes},
    }


def _picture_record(picture: Picture) -> dict[str, Any]:
    return {
        "prompt": picture.prompt,
        "answer": picture.answer,
        "expected": picture.expected,
        "grid": list(picture.grid),
        **({"blocks": [list(block) for block in picture.blocks]} if picture.blocks else {}),
        "kept": [[int(index) for index in stage] for stage in picture.kept],
    }


def _portable(value: Any) -> Any:
    """`value` as JSON types, without where things lie on this machine: of an absolute path only the last name stays."""
    return _without_places(plain(value))


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items() if key not in PLACES}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    if isinstance(value, str) and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()):
        return PurePosixPath(value.replace("\\", "/")).name
    return value
