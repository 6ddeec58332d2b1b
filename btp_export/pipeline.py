"""The whole road: calibrate, quantise if asked, export, verify, measure, report. The bundle appears when all went well.

Engines for a target come after that, in the bundle's place: what they need is checked first, and a bundle that is
verified stays if they fail.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from btp_export import console
from btp_export.exporting import Options, check_plan, check_target, export_into, note_generation, note_links
from btp_export.model.open_model import DummyWeights, Model, open_model
from btp_export.planning.calibration_settings import CalibrationSettings
from btp_export.planning.choose_plan import check_pictures_are_used, choose_plan, files_read
from btp_export.quantising import check_weights, quantise_model
from btp_export.report.collect import Settings, collect
from btp_export.report.write import write_report
from btp_export.results.engines import BuildResult
from btp_export.results.job import JobResult
from btp_export.results.verification import Verification
from engines.targets import Target, find_target
from engines.tensorrt.build.machine import BuildMachine, machine_for
from engines.tensorrt.prepare.build_plan import Wishes, plan_build
from graphs.files.atomic import staged
from graphs.files.bundle import Bundle
from graphs.files.folders import scratch
from graphs.records.errors import BtpError, CheckError
from graphs.records.plan import PruningPlan
from graphs.records.progress import Report
from graphs.records.shapes import ShapeProfile
from graphs.records.stored_weights import Weights


@dataclass(frozen=True)
class Job:
    """What the user asked for."""

    model: str
    out: Path
    plan: str
    calibration: CalibrationSettings
    export: Options
    force: bool = False
    target: str | None = None  # the device for which engines are built
    dummy: DummyWeights | None = None
    system: str | None = None  # message that every prompt begins with
    weights: Weights = "model"


class Clock:
    """Seconds by phase, in the order they came."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str, *, say: bool = True) -> Iterator[Report]:
        """Time one phase, with its progress bar, and `say` on standard error when it is done."""
        start = time.perf_counter()
        with console.progress(name) as bar:
            yield bar
        self.seconds[name] = round(time.perf_counter() - start, 3)
        if say:
            console.note(f"{name}: {self.seconds[name]:.1f} s")


def run_job(job: Job) -> JobResult:
    """Do it all.

    Nothing is at `job.out` unless every phase up to the report went well. Raises CheckError naming what failed if the
    bundle does not verify, InputError and UnavailableError as the phases do.
    """
    clock = Clock()
    check_pictures_are_used(job.plan, job.calibration, job.weights)
    with clock.phase("open", say=False) as report:  # what fails here should stand alone
        engines = None if job.target is None else Engines.check(job.target)
        model = open_model(job.model, job.dummy, system=job.system, weights=job.weights, report=report)
        reads = files_read(job.plan, job.calibration)
        profiles = check_target(model, job.out, job.export, force=job.force, reads=reads)
        check_weights(model, job.weights)
    for line in console.dummy_lines(model.source.is_dummy):
        console.note(line)
    with clock.phase("calibrate") as report:
        plan = choose_plan(model, job.plan, job.calibration, profile=profiles[0], report=report)
        plans = check_plan(model, plan, profiles, note=console.note)
    full = model
    if job.weights != "model":
        with clock.phase("quantise") as report:
            model = quantise_model(
                model, plans[0], job.calibration, job.weights, profile=profiles[0], report=report, note=console.note
            )
    note_generation(model, console.note)
    note_links(model, job.out, job.export, console.note)
    with staged(job.out, force=job.force) as root:
        with clock.phase("export") as report:
            export_into(model, plans, profiles, root, job.export, report=report)
        with _full_weights(full, plans, profiles, root, job) as unquantised:
            measured = collect(
                Bundle.open(root),
                Settings(smaller=False),
                clock.phase,
                check=_require_passed,
                full_weights=unquantised,
            )
        with clock.phase("report"):
            write_report(root / "report", measured)
    built = None
    if engines is not None:
        with clock.phase("engines") as report:
            built = engines.build(job.out, report)
    assert measured.verification is not None, "collect verifies first"
    return JobResult(
        bundle=job.out,
        plan=plans[0],
        average_tokens=plans[0].average_tokens,
        compression=plans[0].compression,
        verify=measured.verification,
        eval=measured.evaluation,
        bench=measured.bench,
        report=job.out / "report" / "index.html",
        engines=built,
        dummy_weights=model.source.is_dummy,
        seconds=clock.seconds,
    )


@contextlib.contextmanager
def _full_weights(
    model: Model, plans: Sequence[PruningPlan], profiles: Sequence[ShapeProfile], root: Path, job: Job
) -> Iterator[Bundle | None]:
    """The demo exported with its own weights too, as long as its accuracy is measured; other models' is not, here."""
    if job.weights == "model" or not model.source.is_demo:
        yield None
        return
    with scratch(root.parent) as folder:
        export_into(model, plans, profiles, folder, job.export)
        yield Bundle.open(folder)


@dataclass(frozen=True)
class Engines:
    """Engines of a bundle for a target, with the target's own choices."""

    target: Target
    machine: BuildMachine

    @staticmethod
    def check(name: str) -> "Engines":
        """What can be known to be wrong before there is a bundle. Raises InputError or UnavailableError."""
        target = find_target(name)
        return Engines(target, machine_for(target, Wishes()))

    def build(self, out: Path, report: Report) -> BuildResult:
        """Build them in the bundle at `out`."""
        from btp_export.engine_inputs import build_engines

        try:
            plan = plan_build(Bundle.open(out), self.target, self.machine.wishes)
            built = build_engines(plan, self.machine, force=False, report=report)
            return BuildResult.of(plan.summary(), built)
        except BtpError:
            remedy = f"btp-export build {out} --target {self.target.name}"
            console.note(f"bundle written to {out}; building engines failed; to go on: {remedy}")
            raise


def _require_passed(verification: Verification) -> None:
    if not verification.passed:
        raise CheckError(
            f"the exported graphs do not verify: {'; '.join(verification.failures[:2])}",
            wanted="the numbers, kept tokens and text of transformers; no bundle was written",
            do="btp-export export, then btp-export verify, which lists every difference",
        )
