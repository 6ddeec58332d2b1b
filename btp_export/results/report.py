"""report.json and `btp-export report`: "btp-report/1"."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from btp_export.results.base import Result
from btp_export.results.evaluation import Evaluation
from btp_export.results.profile import Profile
from btp_export.results.timing import Bench, CacheBytes, Operations
from btp_export.results.verification import Verification
from graphs.records.manifest import BuildRecord, ModelRecord
from graphs.records.plan import PruningPlan
from graphs.records.record import Record
from graphs.records.shapes import ShapeProfile
from graphs.records.token_layout import Blocks, Grid, blocks_field


class Machine(Record):
    """The machine that measured. It has no name on purpose: a report is passed around."""

    cpu: str
    cores: int = Field(ge=1)
    system: str
    versions: dict[str, str]


class TokensPerLayer(Record):
    """Image tokens that each decoder layer sees."""

    full: tuple[int, ...]
    pruned: tuple[int, ...]


class Costs(Record):
    """Prefill operations and cache bytes of the first profile, by arithmetic."""

    operations: Operations
    cache_bytes: CacheBytes


class PictureRecord(Record):
    """A picture that was asked about; `kept` are the tokens of each stage as indices into the grid.

    `full_answer` is the unpruned model's, `divergence` what the plan changes (btp_export/report/data.py).
    """

    prompt: str
    answer: str
    expected: str | None
    grid: Grid
    blocks: Blocks = blocks_field()
    kept: tuple[tuple[int, ...], ...]
    kind: str = ""
    full_answer: str | None = None
    divergence: float | None = None


class ReportDocument(Result):
    """Everything the page shows. A part that was not measured is null."""

    format: Literal["btp-report/1"] = "btp-report/1"
    plan_name: str  # the name of the bundle's own plan among the evaluation's rows
    plan: PruningPlan  # its record is under `calibration`
    average_tokens: float
    compression: float
    tokens_per_layer: TokensPerLayer
    model: ModelRecord | None
    build: BuildRecord | None
    profiles: tuple[ShapeProfile, ...] | None
    costs: Costs | None
    calibration: dict[str, Any] | None
    verification: Verification | None
    evaluation: Evaluation | None
    bench: Bench | None
    engines: tuple[Profile, ...]
    pictures: tuple[PictureRecord, ...]
    tools: dict[str, str] | None
    machine: Machine | None


class ReportResult(ReportDocument):
    """What `btp-export report` prints: report.json, where the page is, and whether verification passed."""

    report: Path
    passed: bool
