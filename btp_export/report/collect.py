"""Measuring what a report of an existing bundle shows, through the same functions as the commands of those names."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btp_export.console import Report
from btp_export.report.data import Picture, ReportData
from graphs.bundle import Bundle
from graphs.errors import InputError

DEMO = "demo"  # the model whose own kind of picture the generated scenes are
EVAL_SAMPLES = 100
PICTURES = 5  # one for each kind of question

Phase = Callable[[str], AbstractContextManager[Report]]


@dataclass(frozen=True)
class Settings:
    """How much to measure. `questions` is a JSONL of image, prompt, answer instead of generated scenes."""

    samples: int = EVAL_SAMPLES
    seed: int = 0
    questions: Path | None = None
    threads: int | None = None


def collect(
    bundle: Bundle, settings: Settings, phase: Phase, *, check: Callable[[Mapping[str, Any]], None] | None = None
) -> ReportData:
    """Verify, evaluate, time and draw. `phase(name)` is opened around each part and gives its progress.

    `check` sees the verification before anything else is measured and may raise.
    Accuracy on generated scenes says something about the demo model only; another model is evaluated if `questions`
    are given. The page says so where they are not.
    Raises InputError for settings that cannot be used, as the parts do.
    """
    check_settings(settings)
    from btp_export.bench import measure
    from btp_export.evaluate import evaluate_bundle
    from btp_export.verify import verify_bundle

    with phase("verify") as report:
        verification = verify_bundle(bundle, threads=settings.threads, report=report)
    if check is not None:
        check(verification)
    evaluation: dict[str, Any] | None = None
    if settings.questions is not None or bundle.manifest.model.name == DEMO:
        with phase("eval") as report:
            evaluation = evaluate_bundle(
                bundle,
                samples=settings.samples,
                seed=settings.seed,
                data=settings.questions,
                threads=settings.threads,
                report=report,
            )
    with phase("bench") as report:
        bench = measure(bundle, threads=settings.threads, report=report)
    with phase("pictures"):
        pictures = scene_pictures(bundle, threads=settings.threads)
    return ReportData(
        bundle.plan, bundle.manifest, verification=verification, evaluation=evaluation, bench=bench, pictures=pictures
    )


def check_settings(settings: Settings) -> None:
    """Raise InputError for what would only fail after long work: no samples, questions that cannot be read."""
    if settings.samples < 1:
        raise InputError(f"--samples {settings.samples}", wanted="1 or more", do=f"--samples {EVAL_SAMPLES}")
    if settings.questions is not None:
        from calibrate.data import jsonl_samples

        jsonl_samples(settings.questions, count=settings.samples)


def scene_pictures(
    bundle: Bundle, *, count: int = PICTURES, seed: int = 0, threads: int | None = None
) -> list[Picture]:
    """Scenes of the calibration split with the bundle's answers and the tokens that each stage kept."""
    from btp_export.runtime import load
    from calibrate.data import scene_samples

    chosen = scene_samples(count, seed=seed, split="calibration").samples
    model = load(bundle, threads=threads)
    answers = model.generate([one.image for one in chosen], [one.prompt for one in chosen])
    pictures = []
    for one, answer in zip(chosen, answers, strict=True):
        found = iter(answer.kept)  # the graphs give indices only for stages that keep tokens
        kept = [[int(index) for index in next(found)] if stage.keep else [] for stage in bundle.plan.stages]
        pictures.append(Picture(one.image, one.prompt, answer.text, model.profile.grid, kept, one.answer))
    return pictures
