"""Several plans at once: the best one found for each of some budgets, and which of them another one makes needless."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from calibrate.calibrate import Study, planned
from calibrate.place.candidates import Budget, Request, propose
from calibrate.place.cost import PrefillCost
from calibrate.place.counts import Shape
from calibrate.place.rank_by_divergence import judge
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan
from graphs.records.progress import Report, labelled

DEFAULT_BUDGETS = (0.5, 0.6, 0.7, 0.78, 0.85, 0.9)


@dataclass(frozen=True)
class Point:
    """The plan of one budget: what it is predicted to do to the answers, and what it costs.

    `divergence` is the mean KL in nats of the next token on the calibration samples, `agreement` the share of equal
    next tokens, `share` the prefill's cost as a share of the unpruned model's. `dominated`: another plan of the front
    costs no more and is no further from the full model's answers.
    """

    requested: float
    plan: PruningPlan
    divergence: float
    agreement: float
    share: float
    dominated: bool = False

    def summary(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "requested_compression": self.requested,
            "compression": self.plan.compression,
            "average_tokens": self.plan.average_tokens,
            "layers": [stage.layer for stage in self.plan.stages],
            "keep": [stage.keep for stage in self.plan.stages],
            "divergence": round(self.divergence, 6),
            "agreement": round(self.agreement, 6),
            "cost_share": round(self.share, 6),
            "dominated": self.dominated,
        }


def front(
    study: Study, request: Request, budgets: Sequence[float] | None = None, *, progress: Report | None = None
) -> list[Point]:
    """A point for each of `budgets` (compressions, rising), all candidates judged together.

    Without `budgets` those of the default ones that the model can reach. Raises InputError as `requests`, and if the
    study has no cost.
    """
    if study.cost is None:
        raise InputError("a front without a cost", wanted="the cost of the model's layers")
    asked = requests(request, study.shape, study.cost, budgets)
    proposed = [propose(study.evidence, study.shape, budgeted, study.cost) for budgeted in asked]
    report = labelled(progress, "trying placements")
    groups = judge(study.reference, study.inputs, proposed, study.statistics.logits_of(), progress=report)
    points = []
    for budgeted, group in zip(asked, groups, strict=True):
        plan, best = planned(study, budgeted, group)
        chosen, share = group[best], study.cost.share(plan)
        points.append(Point(budgeted.budget.requested, plan, chosen.mean, float(chosen.agreement.mean()), share))
    return [replace(point, dominated=is_dominated(point, points)) for point in points]


def requests(
    request: Request, shape: Shape, cost: PrefillCost, budgets: Sequence[float] | None = None
) -> list[Request]:
    """The request with each budget, in rising order; `budgets` None: those of the default ones the model can reach.

    Raises InputError for a budget given twice or out of the model's reach, and as `Request.check`.
    """
    if budgets is None:
        budgets = [budget for budget in DEFAULT_BUDGETS if budget <= 1.0 - 1.0 / shape.num_layers]
    if len(set(budgets)) < len(budgets) or not budgets:
        raise InputError(
            f"--budgets {','.join(f'{budget:g}' for budget in budgets)}",
            wanted="different compressions",
            do="--budgets 0.6,0.78,0.9",
        )
    asked = [replace(request, budget=Budget(compression=budget)) for budget in sorted(budgets)]
    for budgeted in asked:
        budgeted.check(shape, cost)
    return asked


def is_dominated(point: Point, points: Sequence[Point]) -> bool:
    """Whether another of `points` costs no more and is no further from the full model's answers."""
    return any(
        other.share <= point.share
        and other.divergence <= point.divergence
        and (other.share, other.divergence) != (point.share, point.divergence)
        for other in points
    )
