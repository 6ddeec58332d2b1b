"""`btp-export --model NAME`: "btp-job/1"."""

from pathlib import Path
from typing import Literal

from btp_export.results.base import Result
from btp_export.results.engines import BuildResult
from btp_export.results.evaluation import Evaluation
from btp_export.results.timing import Bench
from btp_export.results.verification import Verification
from graphs.records.plan import PruningPlan


class JobResult(Result):
    """All of the job. `eval` and `bench` are null where they were left out, `engines` without a target."""

    format: Literal["btp-job/1"] = "btp-job/1"
    bundle: Path
    plan: PruningPlan
    average_tokens: float
    compression: float
    verify: Verification
    eval: Evaluation | None
    bench: Bench | None
    report: Path
    engines: BuildResult | None
    dummy_weights: bool
    seconds: dict[str, float]  # by phase
