"""What a report is made of. Everything but the plan may be missing; the page then says which command measures it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from btp_export.report.machine import machine
from btp_export.results.evaluation import Evaluation
from btp_export.results.profile import Profile
from btp_export.results.report import Machine
from btp_export.results.timing import Bench
from btp_export.results.verification import Verification
from graphs.records.manifest import Manifest
from graphs.records.plan import PruningPlan
from graphs.records.token_layout import Blocks

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Picture:
    """One picture as the model saw it, and the image tokens kept at each stage.

    `grid` is (rows, columns). `kept[j]` are the tokens that stage j leaves, as indices into the grid, ascending.
    `full_answer` is that of the model without pruning. `divergence` is how far the plan moves the picture's answer, in
    nats a token, where it is the calibration's picture of its `kind` that is moved the most.
    """

    image: "Image.Image"
    prompt: str
    answer: str
    grid: tuple[int, int]
    kept: Sequence[Sequence[int]]
    expected: str | None = None
    blocks: Blocks = ()  # of the tokens that `kept` counts, where they are not the grid
    kind: str = ""
    full_answer: str | None = None
    divergence: float | None = None


@dataclass(frozen=True)
class ReportData:
    """All parts of a report.

    `calibration` is the plan's calibration record unless another one is given. `plan_name` is the name of the bundle's
    own plan among the evaluation's rows.
    """

    plan: PruningPlan
    manifest: Manifest | None = None
    plan_name: str = "btp"
    calibration: Mapping[str, Any] | None = None
    verification: Verification | None = None
    evaluation: Evaluation | None = None
    bench: Bench | None = None
    engines: Sequence[Profile] = ()  # one for each device and kind of weights
    pictures: Sequence[Picture] = ()
    machine: Machine | None = field(default_factory=machine)
