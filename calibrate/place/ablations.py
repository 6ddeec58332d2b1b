"""Ablations of a plan, the paper's and ours: one switch turned each, all else and the average tokens as they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError

from calibrate.place.balance import IMPORTANCES, Recipe, stage_of
from calibrate.place.counts import Shape, counts_for, exponents_of
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan, Stage, with_keep
from graphs.records.record import first_error


@dataclass(frozen=True)
class Ablation:
    """A variant of a plan under the name that tables show, and what is different."""

    name: str
    summary: str
    plan: PruningPlan


def ablations(plan: PruningPlan) -> list[Ablation]:
    """The plan itself, named "full", and every variant that is different from it.

    All have the plan's average tokens within half a token or 1 %. Variants that come out the same as the plan (a plan
    of one stage has no order of balance to turn around) are left out, and those it cannot have (attention at layer 0).
    """
    shares, has_seeds = balance_of(plan), any(stage.seeds for stage in plan.stages)
    mean = round(sum(shares) / len(shares), 4) if shares else 0.0
    switches: list[tuple[str, str, Callable[[], PruningPlan | None]]] = [
        ("no-rebalance", "attention takes the best tokens wherever they lie", lambda: without_rebalance(plan)),
        ("no-spatial", "no fixed spatial set, diversity picks all", lambda: without_spatial(plan)),
        ("manhattan", "the spatial set by Manhattan distance", lambda: with_metric(plan) if has_seeds else None),
        ("equal-stages", "stages at equal distances", lambda: with_equal_stages(plan)),
        ("constant-balance", f"lambda {mean:g} in every stage", lambda: with_balance(plan, [mean] * len(shares))),
        ("falling-balance", "lambda falls instead of rising", lambda: with_balance(plan, shares[::-1])),
        ("attention-only", "lambda 1 in every stage", lambda: with_balance(plan, [1.0] * len(shares))),
        ("diversity-only", "lambda 0 in every stage", lambda: with_balance(plan, [0.0] * len(shares))),
        ("farthest", "farthest points in place of coverage", lambda: with_rules(plan, diversity="farthest")),
        (
            "raw-features",
            "similarity of the features as they are, not centred",
            lambda: with_rules(plan, features="raw"),
        ),
        ("unweighted", "coverage gains not weighed by the scores", lambda: with_rules(plan, weights="none")),
        ("before-the-decoder", "all of it before layer 0", lambda: only_before_the_decoder(plan)),
        ("inside-the-decoder", "the best of the paper's stages at this budget", lambda: best_stages(plan)),
        *((rule, f"importance by {rule}", lambda rule=rule: with_importance(plan, rule)) for rule in IMPORTANCES),
    ]
    plain = plan.model_copy(update={"calibration": {}})
    variants = [Ablation("full", "the plan itself", plan)]
    seen = {plain.digest()}
    for name, summary, make in switches:
        try:
            variant = make()
        except ValueError:  # no valid plan
            continue
        if variant is not None and (digest := variant.digest()) not in seen:
            seen.add(digest)
            variants.append(Ablation(name, summary, variant.model_copy(update={"calibration": {}})))
    return variants


def balance_of(plan: PruningPlan) -> tuple[float, ...]:
    """Attention's share of the places, for each stage that keeps tokens."""
    return tuple(stage.attention_quota / stage.keep for stage in plan.stages if stage.keep)


def without_rebalance(plan: PruningPlan) -> PruningPlan:
    """No over-selection: the pool is the quota, so that position decides nothing."""
    return _with_stages(plan, [stage.model_copy(update={"pool": stage.attention_quota}) for stage in plan.stages])


def without_spatial(plan: PruningPlan) -> PruningPlan:
    """The places of the spatial set go to diversity."""
    return _with_stages(
        plan,
        [
            stage.model_copy(
                update={"seeds": 0, "diversity_quota": min(stage.keep, stage.diversity_quota + stage.seeds)}
            )
            for stage in plan.stages
        ],
    )


def with_importance(plan: PruningPlan, rule: str) -> PruningPlan:
    """Another rule of importance. Raises ValueError if the plan cannot have it."""
    return Shape.of(plan).plan(plan.stages, **(_settings(plan) | {"importance": rule}))


def with_metric(plan: PruningPlan) -> PruningPlan:
    """The spatial set by the other metric."""
    other = "euclidean" if plan.spatial_metric == "manhattan" else "manhattan"
    return plan.model_copy(update={"spatial_metric": other})


def with_rules(plan: PruningPlan, **rules: str) -> PruningPlan:
    """Other rules of format 2 in the stages that have any; farthest points have no gains to weigh."""
    changes = dict(rules) | ({"weights": "none"} if rules.get("diversity") == "farthest" else {})
    return _with_stages(plan, [stage.model_copy(update=changes) if stage.extends else stage for stage in plan.stages])


def only_before_the_decoder(plan: PruningPlan) -> PruningPlan | None:
    """The plan's first stage alone, with the plan's average tokens; None if it has none before layer 0, or no other."""
    if len(plan.stages) < 2 or plan.stages[0].layer > 0:
        return None
    return _with_stages(plan, [with_keep(plan.stages[0], round(plan.average_tokens), plan.image_tokens)])


def best_stages(plan: PruningPlan) -> PruningPlan | None:
    """The paper's balanced stages that came nearest when the plan was calibrated, as its record has them."""
    tried = [candidate for candidate in plan.calibration.get("candidates", ()) if candidate.get("method") == "stages"]
    if not tried:
        return None
    best = min(tried, key=lambda candidate: (-candidate["samples"], candidate["divergence"]))
    return Recipe().plan(Shape.of(plan), best["layers"], best["keep"])


def with_balance(plan: PruningPlan, shares: Sequence[float], recipe: Recipe | None = None) -> PruningPlan:
    """Another lambda for each stage that keeps tokens; rebalance and spatial set as the plan has them.

    Raises InputError if there are not as many shares as such stages.
    """
    switches = recipe or Recipe(rebalance=_rebalances(plan), spatial=any(stage.seeds for stage in plan.stages))
    given = iter(replace(switches, balance=tuple(shares)).shares(sum(stage.keep > 0 for stage in plan.stages)))
    shape, stages, tokens = Shape.of(plan), [], plan.image_tokens
    for n, stage in enumerate(plan.stages):
        seeds = shape.most_seeds if n == 0 and switches.spatial else 0
        share = next(given) if stage.keep else 0.0
        stages.append(
            stage_of(stage.layer, stage.keep, share, tokens=tokens, seeds=seeds, rebalance=switches.rebalance)
        )
        tokens = stage.keep
    return _with_stages(plan, stages)


def with_layers(plan: PruningPlan, layers: Sequence[int], importance: str | None = None) -> PruningPlan | None:
    """The same stages at other layers, counts falling alike to the same average tokens; None if none do.

    Quotas, pool and seeds keep their shares of the counts. `importance`: another rule of scoring, as some go with
    layer 0 alone and others with all but it.
    """
    keeping = [stage for stage in plan.stages if stage.keep]
    if not keeping or len(layers) != len(plan.stages):
        return None
    drops = len(plan.stages) > len(keeping)
    keeps = counts_for(
        layers[: len(keeping)],
        exponents_of([stage.keep for stage in keeping], plan.image_tokens),
        budget=sum(plan.tokens_per_layer()),
        num_layers=plan.num_layers,
        image_tokens=plan.image_tokens,
        final=layers[-1] if drops else None,
    )
    if keeps is None:
        return None
    stages, tokens = [], plan.image_tokens
    for stage, layer, keep in zip(keeping, layers, keeps, strict=False):
        stages.append(with_keep(stage, keep, tokens).model_copy(update={"layer": layer}))
        tokens = keep
    last = [Stage(layer=layers[-1], keep=0)] if drops else []
    return _with_stages(plan, [*stages, *last], importance=importance or plan.importance)


def with_equal_stages(plan: PruningPlan) -> PruningPlan | None:
    """Stages one, two, three ... steps deep, with the step at which the counts stay nearest to the plan's."""
    wanted = [stage.keep for stage in plan.stages]
    variants = []
    for step in range(1, (plan.num_layers - 1) // max(1, len(wanted)) + 1):
        variant = with_layers(plan, [step * (n + 1) for n in range(len(wanted))])
        if variant is not None:
            gap = sum(abs(stage.keep - keep) for stage, keep in zip(variant.stages, wanted, strict=True))
            variants.append((gap, step, variant))
    return min(variants, key=lambda variant: variant[:2])[2] if variants else None


def switched(
    plan: PruningPlan,
    *,
    rebalance: bool = True,
    spatial: bool = True,
    metric: str | None = None,
    layers: Sequence[int] | None = None,
    balance: Sequence[float] | None = None,
    importance: str | None = None,
) -> PruningPlan:
    """A plan with switches turned; what is not given stays. Raises InputError for what the plan cannot have."""
    try:
        moved = plan if layers is None else with_layers(plan, layers, importance)
        if moved is None:
            raise InputError(
                f"--stages {','.join(map(str, layers or ()))} for a plan with {len(plan.stages)} stages",
                wanted=f"as many layers, at which {plan.average_tokens:.1f} average tokens can be had",
                do="btp-export plan NAME shows the plan's own",
            )
        plan = moved
        plan = with_balance(plan, balance) if balance is not None else plan
        plan = plan if rebalance else without_rebalance(plan)
        plan = plan if spatial else without_spatial(plan)
        changes = {"spatial_metric": metric, "importance": importance}
        given = {key: value for key, value in changes.items() if value is not None}
        return Shape.of(plan).plan(plan.stages, **(_settings(plan) | given))
    except ValidationError as error:
        raise InputError(
            f"the switches do not fit the plan: {first_error(error)}", wanted="a plan that can have them"
        ) from error


def _settings(plan: PruningPlan) -> dict[str, object]:
    return {
        "importance": plan.importance,
        "spatial_metric": plan.spatial_metric,
        "calibration": plan.calibration,
    }


def _rebalances(plan: PruningPlan) -> bool:
    return any(stage.pool > stage.attention_quota for stage in plan.stages)


def _with_stages(plan: PruningPlan, stages: Sequence[Stage], **changes: object) -> PruningPlan:
    """The plan with other stages, validated as any plan is."""
    return Shape.of(plan).plan(stages, **(_settings(plan) | changes))
