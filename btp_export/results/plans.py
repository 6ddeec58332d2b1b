"""`btp-export plan` and `calibrate`: "btp-plan-summary/1", "btp-presets/1", "btp-front/1"; `export`: "btp-export/1"."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from btp_export.results.base import Result
from graphs.records.plan import PruningPlan
from graphs.records.record import Record


class PlanSummary(Result):
    """A plan and what it comes to. `out` is the file it was written to, if it was."""

    format: Literal["btp-plan-summary/1"] = "btp-plan-summary/1"
    plan: PruningPlan
    average_tokens: float
    compression: float
    tokens_per_layer: tuple[int, ...]
    out: Path | None = None

    @staticmethod
    def of(plan: PruningPlan, out: Path | None = None) -> "PlanSummary":
        """The summary of a plan."""
        return PlanSummary(
            plan=plan,
            average_tokens=plan.average_tokens,
            compression=plan.compression,
            tokens_per_layer=tuple(plan.tokens_per_layer()),
            out=out,
        )


class Preset(Record):
    """A plan that has a name."""

    name: str
    summary: str


class Presets(Result):
    """`btp-export plan --list`."""

    format: Literal["btp-presets/1"] = "btp-presets/1"
    presets: tuple[Preset, ...]


class FrontRow(Record):
    """The plan of one budget and what it is predicted to do.

    `divergence` (nats) and `agreement` compare the next token with the full model's; `cost_share` is the prefill's cost
    as a share of the unpruned one's; `dominated`: another plan costs no more and is as near. `file` lies beside
    front.json.
    """

    requested_compression: float
    compression: float
    average_tokens: float
    layers: tuple[int, ...]
    keep: tuple[int, ...]
    divergence: float
    agreement: float
    cost_share: float
    dominated: bool
    file: str


class Front(Result):
    """`btp-export calibrate --pareto`, and front.json in its folder (without `out`)."""

    format: Literal["btp-front/1"] = "btp-front/1"
    rows: tuple[FrontRow, ...]
    out: Path | None = Field(default=None, exclude_if=lambda path: path is None)


class ExportResult(Result):
    """`btp-export export`: where the bundle is and what is in it."""

    format: Literal["btp-export/1"] = "btp-export/1"
    bundle: Path
    plan: PruningPlan
    average_tokens: float
    compression: float
    profiles: tuple[str, ...]
    graphs: tuple[str, ...]  # of the first profile
    dummy_weights: bool
