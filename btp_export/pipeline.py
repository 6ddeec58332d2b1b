"""The whole road: calibrate, export, verify, measure, report. The bundle appears when all of it went well."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btp_export import console
from btp_export.calibration import CalibrationSettings
from btp_export.export import Options, check_plan, check_target, export_into
from btp_export.models import open_model
from btp_export.planning import choose_plan
from btp_export.report import write_report
from btp_export.report.collect import Settings, collect
from graphs.bundle import Bundle
from graphs.errors import CheckError
from graphs.staging import staged


@dataclass(frozen=True)
class Job:
    """What the user asked for."""

    model: str
    out: Path
    plan: str
    calibration: CalibrationSettings
    export: Options
    force: bool = False


class Clock:
    """Seconds by phase, in the order they came."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str, *, say: bool = True) -> Iterator[console.Report]:
        """Time one phase, with its progress bar, and `say` on standard error when it is done."""
        start = time.perf_counter()
        with console.progress(name) as bar:
            yield bar
        self.seconds[name] = round(time.perf_counter() - start, 3)
        if say:
            console.note(f"{name}: {self.seconds[name]:.1f} s")


def run_job(job: Job) -> dict[str, Any]:
    """Do it all; gives the contract's document of `btp-export --model`.

    Nothing is at `job.out` unless every phase went well. Raises CheckError naming what failed if the bundle does not
    verify, InputError and UnavailableError as the phases do.
    """
    clock = Clock()
    with clock.phase("open", say=False):  # what fails here should stand alone
        model = open_model(job.model)
        profiles = check_target(model, job.out, job.export, force=job.force)
    with clock.phase("calibrate") as report:
        plan = choose_plan(model, job.plan, job.calibration, report=report)
        check_plan(model, plan, profiles)
    with staged(job.out, force=job.force) as root:
        with clock.phase("export") as report:
            export_into(model, plan, profiles, root, job.export, report=report)
        found = collect(Bundle.open(root), Settings(), clock.phase, check=_require_passed)
        with clock.phase("report"):
            write_report(root / "report", found)
    return {
        "bundle": job.out,
        "plan": json.loads(plan.to_json()),
        "average_tokens": plan.average_tokens,
        "compression": plan.compression,
        "verify": found.verification,
        "eval": found.evaluation,
        "bench": found.bench,
        "report": job.out / "report" / "index.html",
        "seconds": clock.seconds,
    }


def _require_passed(verified: Mapping[str, Any]) -> None:
    if not verified["passed"]:
        raise CheckError(
            f"the exported graphs do not verify: {'; '.join(verified['failures'][:2])}",
            wanted="the same numbers, kept tokens and text as transformers; the bundle was not put in place",
            do="btp-export export and then btp-export verify show all of it",
        )
