"""Which plan a model gets: calibrated, a preset by name, or a file."""

from pathlib import Path

from btp_export import console
from btp_export.model.open_model import Model
from btp_export.planning.calibration_settings import CalibrationSettings, check_settings
from btp_export.planning.plan_files import CALIBRATED, plan_for
from btp_export.planning.study import calibrate_model
from calibrate.place.presets import PRESETS
from graphs.files.paths import expanded
from graphs.records.errors import InputError
from graphs.records.match_plan import spec_at
from graphs.records.plan import PruningPlan
from graphs.records.progress import Note, Report
from graphs.records.shapes import ShapeProfile
from graphs.records.stored_weights import Weights


def choose_plan(
    model: Model,
    choice: str,
    settings: CalibrationSettings,
    *,
    profile: ShapeProfile | None = None,
    report: Report | None = None,
    note: Note = console.note,
) -> PruningPlan:
    """The plan that `choice` names: `btp` calibrates on the model, a preset follows the compression, a file is read.

    The first two are made for the profile's image tokens, or the model's own; a file may be for others.

    Raises InputError for an unknown name, a file for another model, and settings the choice cannot follow.
    """
    if choice == CALIBRATED:
        return calibrate_model(model, settings, profile=profile, report=report, note=note)
    check_settings(settings)
    if settings.keep is not None:
        raise InputError(
            f"--keep with --plan {choice}", wanted="--keep only with the calibrated plan", do="leave --keep out"
        )
    released = model.family.released
    if choice == "btp-paper" and released is not None and released.caution:
        note(f"btp-paper on {model.spec.name}: {released.caution}")
    spec = model.spec if profile is None else spec_at(model.spec, profile)
    return plan_for(choice, spec, compression=settings.compression)


def check_pictures_are_used(choice: str, settings: CalibrationSettings, weights: Weights) -> None:
    """Raise InputError for calibration pictures where nothing is calibrated on them, neither a plan nor weights."""
    given = {"--images": settings.images, "--mix": settings.mix}
    option = next((name for name, value in given.items() if value is not None), None)
    if option is not None and choice != CALIBRATED and weights == "model":
        raise InputError(
            f"{option} with --plan {choice}",
            wanted=f"{option} only with the calibrated plan, or with four-bit weights",
            do=f"leave {option} out",
        )


def files_read(choice: str, settings: CalibrationSettings) -> list[Path]:
    """The files and folders of the user's that choosing a plan reads, pictures that a JSONL file names among them."""
    named: list[str | Path | None] = [choice if choice != CALIBRATED and choice not in PRESETS else None]
    named += [settings.images, settings.prompts, settings.latency_from]
    paths = [expanded(name) for name in named if name is not None]
    pictures: list[Path] = []
    if settings.images is not None:
        from calibrate.data.samples import pictures_named  # loads torch

        pictures = pictures_named(expanded(settings.images))
    return [path for path in (*paths, *pictures) if path.exists()]


def plan_name(choice: str) -> str:
    """What the plan is called in tables: the preset's name, or the file's."""
    return choice if choice == CALIBRATED or choice in PRESETS else Path(choice).stem
