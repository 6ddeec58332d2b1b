"""Calibration: measure the unpruned model on a small set, and make the balanced plan for a budget.

1. One pass of the streamed reference counts changed image tokens per layer and measures what dropping every image
   token before each layer does to the answer (calibrate/measure/statistics.py). Its result can be kept and used
   again.
2. The counts propose a few placements of the stages for the budget (calibrate/place/candidates.py), for two bounds on
   the drop, with token counts that fall like the released ones and with flat ones.
3. Plans of other kinds join them where only a budget is asked for (calibrate/place/alternatives.py): before layer 0,
   mixtures, remainders and every baseline.
4. All run on a few of the samples, the better ones on more, the best few on all. The one that stays nearest to the full
   model's own answers, token by token (mean KL divergence), becomes the plan. One that loses a kind of picture is
   refused, however good its mean.
5. If it is asked for, counts and balance are then searched by the real objective (calibrate/place/search.py).

The plan's `calibration` record holds what all this was computed from. Same inputs, same settings, same plan.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from calibrate.measure.answered import measure_answers
from calibrate.measure.statistics import Statistics, bootstrap_spread, measure, rounded
from calibrate.place.bootstrap import stage_spread
from calibrate.place.candidates import STAGES, Budget, Candidate, Evidence, Request, propose
from calibrate.place.cost import PrefillCost
from calibrate.place.counts import Shape
from calibrate.place.rank_by_divergence import judge
from calibrate.place.search import check_tuning, tune
from calibrate.place.stages import is_dead
from calibrate.reference.records import ReferenceInput
from calibrate.reference.streamed_model import StreamedReference
from graphs.records.errors import CheckError, InputError
from graphs.records.plan import PruningPlan
from graphs.records.progress import Report, labelled

DROPPED_SAMPLES = 24  # at most so many samples measure what dropping does
_BOOTSTRAP = 1000  # a share is then known to 0.016 or better
KIND_BOUND = 1.0  # nats a token, mean over a kind of picture: beyond it the answers are no longer the model's
TAU_LADDER = (0.95, 0.97, 0.98, 0.99)  # tried where the model's own threshold finds nothing


@dataclass(frozen=True)
class Threshold:
    """tau and why it is what it is."""

    value: float
    reason: str


@dataclass(frozen=True)
class Study:
    """A model on its calibration samples, `inputs`, with what was measured on them.

    `kinds` say for each what kind of picture it is, `source` where they came from; it goes into every plan's record.
    A plan may move the answers on no kind by more than `kind_bound` nats a token.
    """

    reference: StreamedReference
    inputs: Sequence[ReferenceInput]
    shape: Shape
    statistics: Statistics
    threshold: Threshold
    cost: PrefillCost | None = None
    seed: int = 0
    source: dict[str, Any] = field(default_factory=dict)
    kinds: Sequence[str] = ()
    kind_bound: float = KIND_BOUND

    @property
    def dead(self) -> bool:
        """Whether the counts are too small to tell layers apart."""
        return is_dead(self.counts, self.shape.image_tokens)

    @property
    def counts(self) -> np.ndarray:
        """Mean changed tokens, [L]."""
        mean: np.ndarray = self.statistics.counts_at(self.threshold.value).mean(axis=0)
        return mean

    @property
    def evidence(self) -> Evidence:
        """What proposals go by."""
        return Evidence.of(self.statistics, self.threshold.value, flat=self.dead)


def taus_for(tau: float | None, model_tau: float) -> tuple[float, ...]:
    """The thresholds that are counted at: the given one, or the model's and the higher ones of the ladder."""
    return (tau,) if tau is not None else tuple(dict.fromkeys((model_tau, *(t for t in TAU_LADDER if t > model_tau))))


def measure_statistics(
    reference: StreamedReference,
    inputs: Sequence[ReferenceInput],
    shape: Shape,
    *,
    tau: float | None = None,
    model_tau: float = 0.93,
    answer_tokens: int = 1,
    ends: Sequence[int] = (),
    dropped: int = DROPPED_SAMPLES,
    progress: Report | None = None,
) -> Statistics:
    """The first passes. `tau` is the threshold the user asked for, `model_tau` the model's own.

    `answer_tokens` of the model's own answer are looked at, at most, until one of the ids `ends`. Inputs that carry an
    answer already keep it. What dropping does is measured on the first `dropped` inputs.
    """
    unpruned, taus = shape.unpruned, taus_for(tau, model_tau)
    if answer_tokens > 1 and not any(prompt.new_tokens for prompt in inputs):
        return measure_answers(
            reference, inputs, unpruned, taus=taus, dropped=dropped, tokens=answer_tokens, ends=ends, progress=progress
        )
    report = labelled(progress, "measuring the layers")
    return measure(reference, inputs, unpruned, taus=taus, dropped=dropped, progress=report)


def threshold_of(statistics: Statistics, shape: Shape, *, tau: float | None, model_tau: float) -> Threshold:
    """The first of the counted thresholds at which the counts say something."""
    if tau is not None:
        return Threshold(tau, "given")
    for value in statistics.taus:
        if not is_dead(statistics.counts_at(value).mean(axis=0), shape.image_tokens):
            if value == model_tau:
                return Threshold(value, "the model's setting")
            return Threshold(value, f"raised from {model_tau}, at which hardly any image token counts as changed")
    return Threshold(model_tau, "the model's setting; no threshold up to the highest tried finds changed tokens")


def calibrate(
    study: Study, request: Request | None = None, *, tuned: bool = False, progress: Report | None = None
) -> PruningPlan:
    """The balanced plan for the request (a compression of 0.78 unless it says otherwise), its record filled in.

    With `tuned` counts and balance are searched afterwards. Raises InputError for a budget that cannot be reached, and
    as `check_tuning`.
    """
    request = request or Request()
    request.check(study.shape, study.cost)
    if tuned:
        check_tuning(study.statistics.samples, counts=request.budget.keep is None, shares=_free_balance(request))
    candidates = propose(study.evidence, study.shape, request, study.cost)
    report = labelled(progress, "trying placements")
    (candidates,) = judge(study.reference, study.inputs, [candidates], study.statistics.logits_of(), progress=report)
    plan, best = planned(study, request, candidates)
    if not tuned:
        return plan
    if candidates[best].method != STAGES:
        reason = f"the best plan is of another kind ({candidates[best].method}): the search is for balanced stages"
        return plan.model_copy(
            update={"calibration": plan.calibration | {"tuning": {"taken": False, "reason": reason}}}
        )
    return _tuned(study, request, plan, progress)


def _tuned(study: Study, request: Request, plan: PruningPlan, progress: Report | None) -> PruningPlan:
    """The plan after the search, whichever it is, with the search in its record."""
    if study.cost is None:
        raise InputError("tuning without a cost", wanted="the cost of the model's layers")
    tuned, record = tune(
        study.reference,
        study.inputs,
        plan,
        request.recipe,
        study.cost,
        counts=request.budget.keep is None,
        shares=_free_balance(request),
        seed=study.seed,
        progress=labelled(progress, "tuning"),
    )
    return tuned.model_copy(update={"calibration": plan.calibration | {"tuning": record}})


def planned(study: Study, request: Request, candidates: Sequence[Candidate]) -> tuple[PruningPlan, int]:
    """The best of the judged candidates with its record, and its number."""
    best, notes = choose(candidates, study.kinds, study.kind_bound)
    if study.dead:
        notes.insert(0, "hardly any image token changes at this threshold: all layers were taken to change alike")
    record = _record(study, request, candidates, best, notes)
    return candidates[best].plan.model_copy(update={"calibration": record}), best


def choose(
    candidates: Sequence[Candidate], kinds: Sequence[str] = (), kind_bound: float = KIND_BOUND
) -> tuple[int, list[str]]:
    """The number of the judged candidate whose answers are nearest to the full model's, and notes on the choice.

    It is one of those that were judged on the most samples. Raises CheckError if each of those moves the answers on
    some kind of picture by more than `kind_bound`.
    """
    if len(candidates) > 1 and not np.ptp([candidate.mean for candidate in candidates]) > 1e-6:
        return 0, ["no candidate changes the model's answers: the cheapest placement by the counts was taken"]
    most = max(len(candidate.divergence) for candidate in candidates)
    finalists = [number for number, candidate in enumerate(candidates) if len(candidate.divergence) == most]
    held = [number for number in finalists if not _lost(candidates[number], kinds, kind_bound)]
    notes = [
        f"{candidates[number].method} was refused: {_lost(candidates[number], kinds, kind_bound)}"
        for number in finalists
        if number not in held
    ]
    if not held:
        best = min(finalists, key=lambda number: candidates[number].mean)
        raise CheckError(
            f"no plan within the budget keeps the answers; the best loses {_lost(candidates[best], kinds, kind_bound)}",
            wanted=f"at most {kind_bound:g} nats a token on every kind of picture",
            do=f"less --compression, or --kind-bound {_worst(candidates[best], kinds)[1] * 1.1:.2g} to accept the loss",
        )
    return min(held, key=lambda number: candidates[number].mean), notes


def _worst(candidate: Candidate, kinds: Sequence[str]) -> tuple[str, float]:
    """The kind of picture on which the answers move most, and by how much."""
    by_kind = candidate.by_kind(kinds or [""] * len(candidate.divergence))
    return max(by_kind.items(), key=lambda item: item[1])


def _lost(candidate: Candidate, kinds: Sequence[str], bound: float) -> str:
    """What the candidate loses beyond the bound, in words; empty if it loses nothing."""
    kind, divergence = _worst(candidate, kinds)
    return f"{kind or 'pictures'}, {divergence:.3g} nats a token" if divergence > bound else ""


def _free_balance(request: Request) -> bool:
    return request.recipe.balance is None


def _record(
    study: Study, request: Request, candidates: Sequence[Candidate], best: int, notes: Sequence[str]
) -> dict[str, Any]:
    """What the plan was computed from; the same calibration gives the same record."""
    statistics, tau, seed = study.statistics, study.threshold, study.seed
    budget = request.budget
    plan = candidates[best].plan
    return {
        "samples": statistics.samples,
        "source": study.source,
        "seed": seed,
        "threshold": {"value": tau.value, "reason": tau.reason},
        "changed_tokens": rounded(study.counts),
        "changed_tokens_spread": bootstrap_spread(statistics.counts_at(tau.value), seed=seed),
        "attention_mass": rounded(statistics.attention.mean(axis=0)),
        "attention_top_shares": statistics.mean_top_shares(),
        "drop_divergence": rounded(statistics.divergence.mean(axis=0)),
        "drop_divergence_spread": bootstrap_spread(statistics.divergence, seed=seed),
        "drop_agreement": rounded(statistics.agreement.mean(axis=0)),
        "drop_bounds": list(request.drop_bounds),
        "requested_compression": budget.requested if budget.keep is None and budget.share is None else None,
        "requested_share": budget.share,
        "cost": None if study.cost is None else study.cost.summary() | {"share": round(study.cost.share(plan), 6)},
        "switches": request.recipe.switches() | {"stages": None if request.layers is None else list(request.layers)},
        "balance": list(request.recipe.shares(sum(stage.keep > 0 for stage in plan.stages))),
        "candidates": [candidate.summary() for candidate in candidates],
        "chosen": best,
        "answers": _answers(study, candidates[best]),
        "beaten": _beaten(candidates, best),
        "stage_spread": _spread(study, request, candidates, plan),
        "notes": list(notes),
        "tools": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")},
        },
    }


def _answers(study: Study, chosen: Candidate) -> dict[str, Any]:
    """What the chosen plan does to the model's answers: the mean, the tail, and each kind of picture."""
    lengths, values, summary = study.statistics.lengths, chosen.divergence, chosen.summary()
    rng = np.random.default_rng(study.seed)
    means = values[rng.integers(len(values), size=(_BOOTSTRAP, len(values)))].mean(axis=1)
    kinds = study.kinds or [""] * len(values)
    return {
        "tokens": int(lengths.sum()),
        "longest": int(lengths.max()),
        "divergence": summary["divergence"],
        "interval": rounded(np.quantile(means, (0.025, 0.975))),
        **{key: summary[key] for key in ("divergence_90", "divergence_worst", "agreement", "exact")},
        "kind_bound": study.kind_bound,
        "by_kind": {kind: round(value, 6) for kind, value in chosen.by_kind(kinds).items()},
        "worst_by_kind": {
            kind: {"sample": number, "divergence": round(float(values[number]), 6)}
            for kind, number in chosen.worst_by_kind(kinds).items()
        },
    }


def _beaten(candidates: Sequence[Candidate], best: int) -> list[dict[str, Any]]:
    """The best plan of every other method, and by how much it is further from the model's answers.

    On the samples that both ran on: a method that was left early ran on few.
    """
    chosen, rows = candidates[best], []
    for method in dict.fromkeys(candidate.method for candidate in candidates):
        if method == chosen.method:
            continue
        ranked = [candidate for candidate in candidates if candidate.method == method]
        most = max(len(candidate.divergence) for candidate in ranked)
        other = min(
            (candidate for candidate in ranked if len(candidate.divergence) == most),
            key=lambda candidate: candidate.mean,
        )
        further = other.mean - float(chosen.divergence[:most].mean())
        rows.append({"method": method, "samples": most, "further": round(further, 6)})
    return sorted(rows, key=lambda row: row["further"])


def _spread(
    study: Study, request: Request, candidates: Sequence[Candidate], chosen: PruningPlan
) -> dict[str, dict[str, Any]]:
    """The same choice on bootstrap samples. For a share the compression that the choice came to stands for it."""
    if request.before_the_decoder(study.shape):
        return {}  # nothing inside the decoder was proposed
    if request.budget.share is not None and chosen.compression < 1.0 - 1.0 / chosen.num_layers:
        request = replace(request, budget=Budget(compression=chosen.compression))
    request = replace(request, drop_bounds=request.drop_bounds[:1])

    def place(evidence: Evidence) -> tuple[int, ...]:
        first, *_ = propose(evidence, study.shape, request, limit=1)
        return tuple(stage.layer for stage in first.plan.stages)

    return stage_spread(study.statistics, study.threshold.value, place, candidates, seed=study.seed)
