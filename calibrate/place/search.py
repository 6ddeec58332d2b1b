"""Search of counts and balance by the real objective, on the calibration set, at no more cost than the default plan.

The objective of a plan has two parts, each divided by what the default plan has on the same samples, and their mean is
taken, so that the default scores 1:

- **error**: sum over the stages of how far the hidden states are from the unpruned model's at the end of the layers the
  stage feeds, mean over the image and text rows still there of |pruned - full| / |full|;
- **divergence**: KL from the unpruned model's distribution, mean over the tokens of its answer.

Coordinates are each stage's count and lambda. A round polls every coordinate in both directions, and some seeded random
combinations, in one streamed pass; the next pass tries the moves that helped together. Steps halve when nothing helps.
Whatever the counts, they are scaled until the plan costs as much as the default one, never more, nor has more tokens.

The winner is then measured on samples that the search has not seen. It is taken only if it is better there in 95 % of
bootstrap samples and its answers are no further from the full model's than the default's; otherwise the default stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from calibrate.measure.divergence import divergence
from calibrate.place.balance import Recipe
from calibrate.place.candidates import largest_within
from calibrate.place.cost import PrefillCost
from calibrate.place.counts import Shape
from calibrate.place.rank_by_divergence import passes
from calibrate.place.stages import Placement
from calibrate.reference.observers import LayerView
from calibrate.reference.records import ReferenceInput
from calibrate.reference.streamed_model import StreamedReference
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan, Stage
from graphs.records.progress import Report, part_of

LEAST_SAMPLES = 12  # two thirds of them to search on, the others to hold the result against
SEARCHED_SAMPLES = 64  # at most
PASSES = 8  # streamed passes of the search; one more holds the result against unseen samples
SURE = 0.95  # of the bootstrap samples must find the tuned plan better
_RANDOM = 3  # combinations a round
_TOGETHER = 5  # moves that helped, at most, are tried together
_COUNT_STEP, _SHARE_STEP = 1.3, 0.2
_SMALLEST = 0.2  # of the first step
_BOOTSTRAP = 1000  # SURE is then known to 0.007
_STEPS = 1000  # a pass in the progress bar
_TINY = 1e-6  # a part of the objective below this counts as nothing

Measure = Callable[..., "list[Measurement]"]
Key = tuple[int, tuple[Stage, ...], int]


@dataclass(frozen=True)
class Setting:
    """A point of the search: what each stage that keeps tokens keeps, and lambda."""

    keeps: tuple[int, ...]
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Measurement:
    """Both parts of the objective on each sample, [m]."""

    error: np.ndarray
    divergence: np.ndarray

    def scores(self, default: Measurement) -> np.ndarray:
        """The objective on each sample, [m]; its mean is 1 for the default itself."""
        parts = ((self.error, default.error), (self.divergence, default.divergence))
        scores: np.ndarray = sum((own / max(float(other.mean()), _TINY) for own, other in parts), np.zeros(1)) / 2
        return scores

    def summary(self, default: Measurement) -> dict[str, float]:
        """Means, as a record holds them."""
        return {
            "objective": round(float(self.scores(default).mean()), 6),
            "error": round(float(self.error.mean()), 6),
            "divergence": round(float(self.divergence.mean()), 6),
        }


@dataclass
class ErrorProbe:
    """How far hidden states [rows, C] are from the unpruned ones, for every past, at the layers that end a segment.

    The unpruned plan must be the first of the pass: its states of the layer are there when the others come.
    """

    ends: frozenset[int]
    full: dict[int, torch.Tensor] = field(default_factory=dict)  # by sample, of the present layer
    errors: dict[Key, float] = field(default_factory=dict)

    def see(self, view: LayerView) -> None:
        """Compare one layer's output, if a segment ends there."""
        if view.layer not in self.ends:
            return
        past = tuple(stage for stage in view.plan.stages if stage.layer <= view.layer)
        if not past:
            self.full[view.sample] = view.hidden_out[0]
            return
        full, start = self.full[view.sample], view.image_start
        tokens = view.plan.image_tokens
        wanted = torch.cat([full[start : start + tokens][view.kept], full[start + tokens :]]).double()
        got = view.hidden_out[0, start:].double()
        relative = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(_TINY)
        self.errors[view.sample, past, view.layer] = float(relative.mean())

    def finish(self, head: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Nothing is left to do after the last layer."""
        self.full.clear()

    def state(self) -> tuple[dict[str, torch.Tensor], Any]:
        """What was compared so far, see calibrate/reference/pass_checkpoints.py; the next layer brings its own unpruned
        states.
        """
        errors = [
            [sample, [stage.model_dump() for stage in past], layer, error]
            for (sample, past, layer), error in self.errors.items()
        ]
        return {}, errors

    def restore(self, tensors: Mapping[str, torch.Tensor], rest: Any) -> None:
        """Take up such a state."""
        for sample, past, layer, error in rest:
            self.errors[sample, tuple(Stage.model_validate(stage) for stage in past), layer] = error

    def total(self, plan: PruningPlan, sample: int) -> float:
        """The sum over the plan's stages."""
        stops = [*(stage.layer for stage in plan.stages[1:]), plan.num_layers]
        keys = [(sample, plan.stages[: n + 1], stop - 1) for n, stop in enumerate(stops[: len(plan.stages)])]
        return sum(self.errors[key] for key in keys)


def measure_plans(
    reference: StreamedReference,
    inputs: Sequence[ReferenceInput],
    plans: Sequence[PruningPlan],
    *,
    progress: Report | None = None,
) -> list[Measurement]:
    """Both parts of the objective of every plan on every input, in one streamed pass where memory allows it."""
    unpruned = plans[0].without_stages()
    parts, measured = passes(plans, inputs, reference.vocab_size), []
    for number, part in enumerate(parts):
        probe = ErrorProbe(frozenset(segment.stop - 1 for plan in part for segment in plan.segments()))
        report = part_of(progress, number, len(parts))
        runs = reference.run(inputs, [unpruned, *part], probes=(probe,), progress=report)
        full = [run.logits for run in runs[: len(inputs)]]
        for n, plan in enumerate(part, 1):
            logits = [run.logits for run in runs[n * len(inputs) : (n + 1) * len(inputs)]]
            error = np.array([probe.total(plan, sample) for sample in range(len(inputs))])
            measured.append(Measurement(error, np.array(list(map(divergence, full, logits)))))
    return measured


@dataclass(frozen=True)
class Space:
    """What may be searched around a default plan: the same layers, no more cost and tokens. Makes plans of settings."""

    default: PruningPlan
    recipe: Recipe
    cost: PrefillCost
    counts: bool
    shares: bool

    @property
    def start(self) -> Setting:
        """The default plan's setting."""
        keeping = [stage for stage in self.default.stages if stage.keep]
        shares = self.recipe.shares(len(keeping))
        return Setting(tuple(stage.keep for stage in keeping), shares)

    def plan(self, setting: Setting) -> PruningPlan | None:
        """The plan of a setting, its counts scaled to the default's cost; None if there is none at that cost."""
        shape, recipe = Shape.of(self.default), replace(self.recipe, balance=setting.shares)
        layers = [stage.layer for stage in self.default.stages]
        drops = [0] * (len(layers) - len(setting.keeps))
        placement: Placement | None = Placement(tuple(layers), (*setting.keeps, *drops), 0.0)
        ceiling, tokens = self.cost.of(self.default), sum(self.default.tokens_per_layer())
        if self.counts and placement is not None:
            placement = largest_within(placement, shape, recipe, self.cost, ceiling, tokens)
        if placement is None:
            return None
        plan = recipe.plan(shape, placement.layers, placement.keeps)
        return plan if self.cost.of(plan) <= ceiling * (1 + 1e-12) else None

    def polls(self, at: Setting, step: float, rng: np.random.Generator) -> list[Setting]:
        """One step along each coordinate both ways, then random combinations of steps."""
        moves = [move for move in np.eye(2 * len(at.keeps)) for move in (move, -move)]
        moves += [rng.integers(-1, 2, size=2 * len(at.keeps)).astype(float) for _ in range(_RANDOM)]
        return [self.moved(at, move * step) for move in moves]

    def moved(self, at: Setting, move: np.ndarray) -> Setting:
        """`move` [2 n]: by how many steps each count and each lambda is changed."""
        n = len(at.keeps)
        factors = _COUNT_STEP ** (move[:n] * self.counts)
        shares = np.clip(np.array(at.shares) + _SHARE_STEP * move[n:] * self.shares, 0.0, 1.0)
        keeps, above = [], self.default.image_tokens
        for number, keep in enumerate(at.keeps):
            wanted = max(round(keep * float(factors[number])), n - number)
            above = min(wanted, above - 1)
            keeps.append(above)
        return Setting(tuple(keeps), tuple(round(float(share), 4) for share in shares))


@dataclass
class Search:
    """The rounds of the search; `measure` runs plans on the searched samples, one streamed pass a call."""

    space: Space
    measure: Callable[[Sequence[PruningPlan]], list[Measurement]]
    seed: int
    tried: int = 0
    passes: int = 0

    def run(self, default: PruningPlan) -> tuple[PruningPlan, Measurement, Measurement]:
        """The best plan found and its measurement, and the default's."""
        rng, step = np.random.default_rng(self.seed), 1.0
        at, best = self.space.start, default
        (base,) = self._measure([default])
        reached = base
        while self.passes < PASSES and step >= _SMALLEST:
            polled = self._score(self.space.polls(at, step, rng), base)
            better = [row for row in polled if row[0] < self._of(reached, base)]
            if not better:
                step /= 2
                continue
            if len(better) > 1 and self.passes < PASSES:
                most = min(len(better), _TOGETHER)
                together = [combined(at, [row[1] for row in better[:count]]) for count in range(2, most + 1)]
                better += self._score(together, base)
            _, at, best, reached = min(better, key=lambda row: row[0])
        return best, reached, base

    def _score(
        self, settings: Sequence[Setting], base: Measurement
    ) -> list[tuple[float, Setting, PruningPlan, Measurement]]:
        """Objective, setting, plan and measurement of each different plan among the settings, best first."""
        plans: dict[tuple[Stage, ...], tuple[Setting, PruningPlan]] = {}
        for setting in settings:
            plan = self.space.plan(setting)
            if plan is not None:
                plans.setdefault(plan.stages, (setting, plan))
        if not plans:
            return []
        measured = self._measure([plan for _, plan in plans.values()])
        scored = [
            (self._of(measurement, base), setting, plan, measurement)
            for (setting, plan), measurement in zip(plans.values(), measured, strict=True)
        ]
        return sorted(scored, key=lambda row: row[0])

    def _measure(self, plans: Sequence[PruningPlan]) -> list[Measurement]:
        self.tried, self.passes = self.tried + len(plans), self.passes + 1
        return self.measure(plans)

    @staticmethod
    def _of(measurement: Measurement, base: Measurement) -> float:
        return float(measurement.scores(base).mean())


def combined(at: Setting, settings: Sequence[Setting]) -> Setting:
    """All the changes from `at` to each of the settings, made together; counts fall at least by one each."""
    factors = np.prod([np.divide(setting.keeps, at.keeps) for setting in settings], axis=0)
    shares = np.sum([np.subtract(setting.shares, at.shares) for setting in settings], axis=0) + at.shares
    keeps: list[int] = []
    for number, keep in enumerate(at.keeps):
        wanted = max(round(keep * float(factors[number])), len(at.keeps) - number)
        keeps.append(min(wanted, keeps[-1] - 1) if keeps else wanted)
    return Setting(tuple(keeps), tuple(round(float(share), 4) for share in np.clip(shares, 0.0, 1.0)))


def tune(
    reference: StreamedReference,
    inputs: Sequence[ReferenceInput],
    default: PruningPlan,
    recipe: Recipe,
    cost: PrefillCost,
    *,
    counts: bool = True,
    shares: bool = True,
    seed: int = 0,
    progress: Report | None = None,
    measure: Measure = measure_plans,
) -> tuple[PruningPlan, dict[str, Any]]:
    """The tuned plan, or the default where nothing beats it on unseen samples, and the record of the search.

    `counts` and `shares` say what may be changed. `progress(done, all)` counts layers over all passes there may be;
    `measure` runs plans. Raises InputError as `check_tuning`.
    """
    check_tuning(len(inputs), counts=counts, shares=shares)
    if not any(stage.keep for stage in default.stages):
        return default, {"taken": False, "reason": "no stage keeps tokens: there is nothing to search"}
    searched = min(SEARCHED_SAMPLES, 2 * len(inputs) // 3)
    seen, unseen = inputs[:searched], inputs[searched:]
    search = Search(Space(default, recipe, cost, counts, shares), lambda plans: [], seed)

    def step(done: int, total: int, text: str = "") -> None:
        if progress is not None:  # passes are of different lengths
            progress(round(_STEPS * (search.passes - 1 + done / total)), _STEPS * (PASSES + 1))

    search.measure = lambda plans: measure(reference, seen, plans, progress=step)
    best, measured, base = search.run(default)
    record: dict[str, Any] = {
        "searched": [name for name, wanted in (("counts", counts), ("balance", shares)) if wanted],
        "plans": search.tried,
        "passes": search.passes,
        "samples": searched,
        "held_out": len(unseen),
        "cost": {"unit": cost.unit, "default": cost.of(default), "tuned": cost.of(best)},
        "default": {"searched_on": base.summary(base)},
        "tuned": {"searched_on": measured.summary(base), **_setting(best)},
    }
    if best.stages == default.stages:
        return default, record | {"taken": False, "reason": "no plan was better on the samples searched on"}
    search.passes = PASSES + 1
    old, new = measure(reference, unseen, [default, best], progress=step)
    record["default"]["held_out"], record["tuned"]["held_out"] = old.summary(old), new.summary(old)
    record["better_in"] = round(_better_in(new.scores(old) - old.scores(old), seed), 4)
    taken = record["better_in"] >= SURE and new.divergence.mean() <= old.divergence.mean()
    reason = _reason(taken, record["better_in"], float(new.divergence.mean()), float(old.divergence.mean()))
    return best if taken else default, record | {"taken": bool(taken), "reason": reason}


def check_tuning(samples: int, *, counts: bool, shares: bool) -> None:
    """Raise InputError if there are too few samples, or nothing to change."""
    if samples < LEAST_SAMPLES:
        raise InputError(
            f"--tune with {samples} samples",
            wanted=f"at least {LEAST_SAMPLES}, a third of them unseen",
            do="--samples 64",
        )
    if not counts and not shares:
        raise InputError("--tune with --keep and --balance", wanted="something to search", do="leave one of them out")


def _better_in(difference: np.ndarray, seed: int) -> float:
    """Share of bootstrap samples of `difference` [m] (tuned - default) whose mean is below 0."""
    draws = np.random.default_rng(seed).integers(len(difference), size=(_BOOTSTRAP, len(difference)))
    return float((difference[draws].mean(axis=1) < 0).mean())


def _setting(plan: PruningPlan) -> dict[str, Any]:
    keeping = [stage for stage in plan.stages if stage.keep]
    return {
        "keep": [stage.keep for stage in plan.stages],
        "balance": [round(stage.attention_quota / stage.keep, 4) for stage in keeping],
    }


def _reason(taken: bool, better_in: float, own: float, other: float) -> str:
    if taken:
        return f"better on the held-out samples, in {better_in:.1%} of bootstrap samples"
    if own > other:
        return f"its answers are further from the full model's on the held-out samples: {own:.4f} nats to {other:.4f}"
    return f"better on the held-out samples in only {better_in:.1%} of bootstrap samples; more --samples tell more"
