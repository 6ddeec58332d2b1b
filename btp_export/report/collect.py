"""Measuring what a report of an existing bundle shows, through the same functions as the commands of those names."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from btp_export.console import note
from btp_export.report.data import Picture, ReportData
from btp_export.report.kind_pictures import kind_pictures
from btp_export.results.evaluation import Evaluation
from btp_export.results.timing import Bench
from btp_export.results.verification import Verification
from graphs.files.bundle import Bundle
from graphs.records.errors import CheckError, InputError
from graphs.records.progress import Report

DEMO = "demo"  # the model whose own kind of picture the generated scenes are
EVAL_SAMPLES = 100

Made = TypeVar("Made")
Phase = Callable[[str], AbstractContextManager[Report]]


@dataclass(frozen=True)
class Settings:
    """How much to measure. `questions` is a JSONL of image, prompt, answer instead of generated scenes.

    `smaller` evaluates every plan at half the bundle's tokens too, for the plot of accuracy against tokens.
    """

    samples: int = EVAL_SAMPLES
    seed: int = 0
    questions: Path | None = None
    threads: int | None = None
    smaller: bool = True


def collect(
    bundle: Bundle,
    settings: Settings,
    phase: Phase,
    *,
    check: Callable[[Verification], None] | None = None,
    full_weights: Bundle | None = None,
) -> ReportData:
    """Verify, evaluate, time and draw. `phase(name)` is opened around each part and gives its progress.

    `check` sees the verification before anything else is measured and may raise. `full_weights` is the bundle of the
    same model before its weights became four bits, whose accuracy is told too.
    Accuracy on generated scenes says something about the demo model only; another model is evaluated if `questions`
    are given. The page says so where they are not.
    A bundle that fails verification and computes no answers, as one whose graphs overflow, has a page all the same.
    Raises InputError for settings that cannot be used and for a saved profile that is damaged, before anything is
    measured, and as the parts do.
    """
    check_settings(bundle, settings)
    from btp_export.measuring.verify import verify_profiles
    from btp_export.profiling.profile import saved_profiles

    engines = saved_profiles(bundle)  # before anything is measured: one that is damaged is refused
    with phase("verify") as report:
        verification = verify_profiles(bundle, threads=settings.threads, device="auto", report=report, note=note)
    if check is not None:
        check(verification)
    evaluation = _evaluated(bundle, settings, phase, verification, full_weights)
    bench, pictures = _timed_and_drawn(bundle, settings, phase, verification)
    return ReportData(
        bundle.plan,
        bundle.manifest,
        verification=verification,
        evaluation=evaluation,
        bench=bench,
        engines=engines,
        pictures=pictures,
    )


def _evaluated(
    bundle: Bundle, settings: Settings, phase: Phase, verification: Verification, full_weights: Bundle | None
) -> Evaluation | None:
    """Accuracy, None where there are no questions for the model."""
    from btp_export.measuring.evaluate import evaluate_bundle

    if settings.questions is None and bundle.manifest.model.name != DEMO:
        return None
    with phase("eval") as report:
        evaluate = partial(
            evaluate_bundle,
            bundle,
            compression=budgets(bundle) if settings.smaller else None,
            samples=settings.samples,
            seed=settings.seed,
            data=settings.questions,
            full_weights=full_weights,
            threads=settings.threads,
            report=report,
        )
        return _unless_broken(evaluate, verification, "not evaluated")


def _timed_and_drawn(
    bundle: Bundle, settings: Settings, phase: Phase, verification: Verification
) -> tuple[Bench | None, Sequence[Picture]]:
    """Times, and pictures with their kept tokens; nothing of a bundle that is too large for this machine."""
    from btp_export.measuring.bench import measure
    from btp_export.running.memory_fit import too_large

    reason = too_large(bundle, models=2)
    if reason is not None:
        note(f"not timed and not drawn: {reason}")
        return None, ()
    with phase("bench") as report:
        timed = partial(measure, bundle, threads=settings.threads, report=report)
        bench = _unless_broken(timed, verification, "not timed")
    with phase("pictures"):
        drawn = partial(kind_pictures, bundle, threads=settings.threads)
        return bench, _unless_broken(drawn, verification, "not drawn") or ()


def _unless_broken(measure: Callable[[], Made], verification: Verification, words: str) -> Made | None:
    """What is measured. None, and why, where a bundle that has failed verification computes no answer."""
    try:
        return measure()
    except CheckError as error:
        if verification.passed:
            raise
        note(f"{words}: {error.got}")
        return None


def budgets(bundle: Bundle) -> list[float] | None:
    """The bundle's own budget and half its tokens, for the plot of accuracy against tokens.

    None, which is the bundle's own budget alone, if nothing is pruned or some plan cannot meet the smaller one.
    """
    from btp_export.measuring.evaluate import DEFAULT_PLANS, resolve_budgets

    own = bundle.plan.compression
    wanted = [own, 1 - (1 - own) / 2]
    try:
        return list(wanted) if bundle.plan.stages and resolve_budgets(bundle, DEFAULT_PLANS, wanted) else None
    except InputError:
        return None


def check_settings(bundle: Bundle, settings: Settings) -> None:
    """Raise InputError for what would only fail after long work: no samples, questions that the bundle cannot take."""
    if settings.samples < 1:
        raise InputError(f"--samples {settings.samples}", wanted="1 or more", do=f"--samples {EVAL_SAMPLES}")
    if settings.questions is not None:
        from btp_export.measuring.answering import encoded_samples
        from btp_export.model.prompting import Prompter
        from calibrate.data.samples import jsonl_samples

        chosen = jsonl_samples(settings.questions, count=settings.samples)
        encoded_samples(Prompter(bundle.processor, bundle.spec), bundle.profile(), chosen)
