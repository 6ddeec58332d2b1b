"""`btp-export eval`: "btp-eval/1"."""

from typing import Literal

from pydantic import Field

from btp_export.results.base import Result
from graphs.records.record import Record
from graphs.records.stored_weights import Activations


class EvaluatedPlan(Record):
    """One plan's answers. `interval` is Wilson's at the document's confidence.

    `attention_kept`: by stage, the mean share of the stage's attention on the image that the kept tokens hold; null
    for a stage that drops everything or whose scores are not attention. `kinds`: accuracy by kind of question.
    """

    plan: str
    average_tokens: float
    compression: float
    accuracy: float
    kept_accuracy: float | None  # of the unpruned model's; null where that answers nothing right
    flops_ratio: float
    interval: tuple[float, float]
    attention_kept: tuple[float | None, ...]
    kinds: dict[str, float]


class WeightsCost(Record):
    """What pruning costs and what four bits cost: accuracy with the model's own weights and with those in four bits,
    without pruning and with the bundle's own plan.
    """

    weights: str  # the four-bit ones, such as "awq, groups of 32"
    full: float
    pruned: float
    four_bits: float
    both: float


class Evaluation(Result):
    """Accuracy of plans through the exported graphs, the same questions for all.

    `image_size` and `resized` (how many pictures were scaled to it) are there for models that take any size,
    `weights_cost` where the same questions were asked of the model with its own weights.
    """

    format: Literal["btp-eval/1"] = "btp-eval/1"
    samples: int
    source: str
    image_size: tuple[int, int] | None = None
    resized: int | None = None
    confidence: float = 0.95
    full_accuracy: float
    rows: tuple[EvaluatedPlan, ...]
    activations: Activations | None = None  # what four-bit weights were multiplied with; null where there are none
    weights_cost: WeightsCost | None = Field(default=None, exclude_if=lambda cost: cost is None)
