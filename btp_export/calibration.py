"""Calibration of one model: pictures and prompts through its own processor and vision tower, then calibrate/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from btp_export.console import Report
from graphs.errors import InputError
from graphs.plan import PruningPlan

if TYPE_CHECKING:
    from btp_export.models import Model
    from calibrate.data import SampleSet

MOST_SAMPLES = 4096


@dataclass(frozen=True)
class CalibrationSettings:
    """What the user may choose. `images` None: generated scenes; `compression` None: 0.78 unless `keep` is given."""

    images: Path | None = None
    prompts: Path | None = None
    samples: int = 64
    compression: float | None = None
    keep: tuple[int, ...] | None = None
    tau: float | None = None
    seed: int = 0


def parse_keep(text: str) -> tuple[int, ...]:
    """ "288,144,48,0" -> (288, 144, 48, 0). Raises InputError if it is not a list of whole numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--keep {text}", wanted="whole numbers with commas", do="--keep 288,144,48,0") from error


def calibrate_model(
    model: Model,
    settings: CalibrationSettings,
    *,
    report: Report | None = None,
    note: Callable[[str], None] | None = None,
) -> PruningPlan:
    """The calibrated plan `btp` for a model at its own image size.

    `note` is told of pictures that are skipped. Raises InputError for settings or pictures that cannot be used,
    before any long work.
    """
    check_settings(settings)
    from btp_export.prompting import Prompter
    from calibrate.budget import Shape
    from calibrate.calibrate import calibrate, check_budget
    from calibrate.data import prepare
    from calibrate.reference import StreamedReference

    spec = model.spec
    shape = Shape(spec.model_type, spec.decoder.num_layers, spec.vision.image_tokens, spec.vision.grid)
    check_budget(shape, settings.compression, settings.keep)
    chosen = calibration_samples(settings, note)
    prompter = Prompter(model.source.folder, spec)
    vision = model.family.vision_module(model.checkpoint)

    def encoding(done: int, total: int) -> None:
        if report is not None:
            report(done, total, "reading the pictures")

    prepared = prepare(chosen.samples, prompter, vision, progress=encoding)
    del vision
    source = {
        "pictures": chosen.source,
        "skipped": list(chosen.skipped),
        "prompts": len({sample.prompt for sample in chosen.samples}),
        "sha256": chosen.digest(),
    }
    return calibrate(
        StreamedReference(model.checkpoint),
        [one.input for one in prepared],
        shape,
        compression=settings.compression,
        keep=settings.keep,
        tau=settings.tau,
        model_tau=spec.change_threshold,
        seed=settings.seed,
        source=source,
        progress=report,
    )


def check_settings(settings: CalibrationSettings) -> None:
    """Raise InputError for settings out of range."""
    if not 1 <= settings.samples <= MOST_SAMPLES:
        raise InputError(f"--samples {settings.samples}", wanted=f"1 to {MOST_SAMPLES}", do="--samples 64")
    if settings.tau is not None and not -1.0 < settings.tau < 1.0:
        raise InputError(f"--tau {settings.tau}", wanted="a cosine between -1 and 1", do="--tau 0.93")
    if settings.compression is not None and not 0.0 <= settings.compression < 1.0:
        raise InputError(
            f"--compression {settings.compression}", wanted="a number from 0 to below 1", do="--compression 0.78"
        )
    if settings.compression is not None and settings.keep is not None:
        raise InputError("both --compression and --keep", wanted="one of them", do="leave one out")
    if settings.prompts is not None and settings.images is None:
        raise InputError("--prompts without --images", wanted="pictures to ask about", do="--images DIR --prompts FILE")
    if not 0 <= settings.seed < 2**24:
        raise InputError(f"--seed {settings.seed}", wanted="0 to 16777215", do="--seed 0")


def calibration_samples(settings: CalibrationSettings, note: Callable[[str], None] | None = None) -> SampleSet:
    """Generated scenes of the calibration split, or the pictures of a folder."""
    from calibrate import data

    if settings.images is None:
        return data.scene_samples(settings.samples, seed=settings.seed, split="calibration")
    prompts: Sequence[str] = data.DEFAULT_PROMPTS if settings.prompts is None else data.read_prompts(settings.prompts)
    return data.folder_samples(settings.images, prompts=prompts, count=settings.samples, seed=settings.seed, note=note)
