"""Accuracy of plans through the exported graphs: one derived bundle for each plan, the same questions for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btp_export.exporting import vision_with_attention
from btp_export.model.pictures import fitted
from btp_export.planning.plan_files import CALIBRATED, plan_for
from btp_export.results.evaluation import EvaluatedPlan, Evaluation, WeightsCost
from graphs.building.derived_bundles import derive, scratch_folder
from graphs.files.bundle import Bundle
from graphs.records.errors import InputError
from graphs.records.match_plan import plan_for_profile, spec_at
from graphs.records.plan import PruningPlan
from graphs.records.progress import Report
from graphs.records.quantization import Activations

if TYPE_CHECKING:
    from btp_export.model.prompting import Encoded
    from btp_export.running.runtime import BundleModel, Prefill
    from calibrate.data.samples import Sample, SampleSet
    from calibrate.measure.accuracy import Score

FULL = "none"
DEFAULT_PLANS = (FULL, CALIBRATED, "btp-paper", "fastv", "pyramiddrop", "divprune", "scope", "vtw", "random", "dart")
DEFAULT_SAMPLES = 200


@dataclass(frozen=True)
class ScoredEvaluation:
    """The evaluation, and row by row which samples were answered right."""

    evaluation: Evaluation
    hits: list[list[bool]]


@dataclass(frozen=True)
class Answers:
    """What one plan answered to every sample.

    attention_kept: for each stage, each sample's share of the scores that the kept tokens hold; see `_row`.
    """

    plan: PruningPlan
    texts: list[str]
    attention_kept: Mapping[int, list[float]] = field(default_factory=dict)


def evaluate_bundle(
    bundle: Bundle,
    *,
    plans: Sequence[str] = DEFAULT_PLANS,
    compression: float | Sequence[float] | None = None,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    data: Path | None = None,
    full_weights: Bundle | None = None,
    threads: int | None = None,
    activations: Activations = "int8",
    report: Report | None = None,
) -> Evaluation:
    """Accuracy: a row for each of `plans` and budgets.

    `btp` is the bundle's own plan, `none` the unpruned model, which is always run because accuracy is held against
    it; the other presets get `compression` (several budgets: a row for each), or the same average tokens as the
    bundle's own plan. Questions are held-out scenes, or the lines of the JSONL file `data`; `full_weights`, a bundle of
    the same model before its weights became four bits, is asked them too. Raises InputError for unknown plans, unusable
    data or a bundle of something else before any long work.
    """
    budgets = [compression] if compression is None or isinstance(compression, float) else list(compression)
    planned = resolve_budgets(bundle, plans, budgets)
    if full_weights is not None:
        check_full_weights(bundle, full_weights)
    own = [(FULL, bundle.plan.without_stages()), (CALIBRATED, bundle.plan)]

    def evaluated(asked: Bundle, chosen: Sequence[tuple[str, PruningPlan]]) -> ScoredEvaluation:
        return evaluate_plans(
            asked,
            chosen,
            samples=samples,
            seed=seed,
            data=data,
            threads=threads,
            activations=activations,
            report=report,
        )

    if full_weights is None:
        return evaluated(bundle, planned).evaluation
    evaluation = evaluated(bundle, [*planned, *own]).evaluation
    four_bits, both = (row.accuracy for row in evaluation.rows[-2:])
    full, pruned = (row.accuracy for row in evaluated(full_weights, own).evaluation.rows)
    cost = WeightsCost(weights=_weights_text(bundle), full=full, pruned=pruned, four_bits=four_bits, both=both)
    return evaluation.model_copy(update={"rows": evaluation.rows[:-2], "weights_cost": cost})


def check_full_weights(bundle: Bundle, full_weights: Bundle) -> None:
    """Raise InputError unless the second is the first one's model and shape with its own weights."""
    if bundle.manifest.quantization is None:
        raise InputError(
            f"{bundle.root} has the model's own weights", wanted="a bundle in four bits", do="leave it out"
        )
    profiles = [each.profile() for each in (bundle, full_weights)]
    shapes = [profile.model_copy(update={"name": ""}) for profile in profiles]
    sizes = [each.spec.decoder for each in (bundle, full_weights)]
    if full_weights.manifest.quantization is not None or sizes[0] != sizes[1] or shapes[0] != shapes[1]:
        raise InputError(
            f"{full_weights.root} is not {bundle.spec.name} with its own weights in the shape {profiles[0].name}",
            wanted="the same model, exported without --weights",
            do="btp-export export --model NAME with the same options but --weights",
        )


def _weights_text(bundle: Bundle) -> str:
    made = bundle.manifest.quantization
    assert made is not None, "check_full_weights"
    return f"{made.source if made.method == 'read' else made.method}, groups of {made.group_text}"


def evaluate_plans(
    bundle: Bundle,
    planned: Sequence[tuple[str, PruningPlan]],
    *,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    data: Path | None = None,
    threads: int | None = None,
    activations: Activations = "int8",
    report: Report | None = None,
) -> ScoredEvaluation:
    """The same for named plans; plans that give the same graphs are run once."""
    from btp_export.running.runtime import activations_in, load
    from calibrate.measure.accuracy import hits
    from graphs.pruning.operations import cost

    chosen = _samples(samples, seed, data)
    full = bundle.plan.without_stages()
    digests = [plan.digest() for _, plan in planned]
    unpruned = full.digest()
    different = {unpruned: (FULL, full)}
    for digest, entry in zip(digests, planned, strict=True):
        different.setdefault(digest, entry)
    answers: dict[str, Answers] = {}
    questions: _Questions | None = None
    total = len(different) * len(chosen.samples)
    with scratch_folder(bundle) as folder:
        for digest, (name, plan) in different.items():
            derived = bundle
            if digest != bundle.plan.digest():
                derived = derive(bundle, plan, folder / digest, vision=vision_with_attention)
            start = len(answers) * len(chosen.samples)
            model = load(derived, threads=threads, activations=activations)
            questions = questions or _ask(model, chosen)
            answers[digest] = _answer(model, questions, _offset(report, start, total, name))
    profile = bundle.profile()
    flops = {digest: cost(bundle.spec.decoder, each.plan, profile).prefill for digest, each in answers.items()}
    best, every = _score(chosen, answers[unpruned]), flops[unpruned]
    rows = [
        _row(name, answers[digest], chosen, best, flops[digest] / every)
        for digest, (name, _) in zip(digests, planned, strict=True)
    ]
    evaluation = Evaluation(
        samples=len(chosen.samples),
        source=chosen.source,
        **_resizing(bundle, questions.resized if questions else 0),
        full_accuracy=best.accuracy,
        rows=tuple(rows),
        activations=activations_in(bundle, activations),
    )
    return ScoredEvaluation(evaluation, [hits(chosen.samples, answers[digest].texts) for digest in digests])


def resolve_budgets(
    bundle: Bundle, names: Sequence[str], budgets: Sequence[float | None]
) -> list[tuple[str, PruningPlan]]:
    """Plans by name at each budget, None for the bundle's own; what no budget changes is there once."""
    planned: dict[tuple[str, str], tuple[str, PruningPlan]] = {}
    if not budgets:
        raise InputError("no budget", wanted="at least one", do="--compression 0.78,0.89")
    for budget in budgets:
        for name, plan in resolve_plans(bundle, names, budget).items():
            planned.setdefault((name, plan.digest()), (name, plan))
    return list(planned.values())


def parse_budgets(text: str) -> tuple[float, ...]:
    """ "0.78,0.89" -> (0.78, 0.89). Raises InputError if it is not a list of different numbers."""
    try:
        budgets = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--compression {text}", wanted="numbers with commas", do="--compression 0.78,0.89") from error
    if len(set(budgets)) < len(budgets):
        raise InputError(f"--compression {text}", wanted="different budgets", do="name each once")
    return budgets


def resolve_plans(bundle: Bundle, names: Sequence[str], compression: float | None) -> dict[str, PruningPlan]:
    """Plans by name, at one budget; see `evaluate_bundle`. Raises InputError for an unknown or repeated name."""
    if len(set(names)) < len(names) or not names:
        raise InputError(f"--plans {','.join(names)}", wanted="different plans", do="name each once")
    if compression is not None and not 0.0 <= compression < 1.0:
        raise InputError(f"compression {compression}", wanted="a number from 0 to below 1", do="--compression 0.78")
    own, spec = bundle.plan, spec_at(bundle.spec, bundle.profile())
    if compression is not None and own.stages:
        from calibrate.place.counts import refitted

        own = refitted(own, compression)
    average = own.average_tokens if compression is None else (1.0 - compression) * own.image_tokens
    resolved: dict[str, PruningPlan] = {}
    for name in names:
        if name == CALIBRATED:
            resolved[name] = own
        elif name.endswith(".json"):
            resolved[name] = plan_for_profile(plan_for(name, spec), bundle.profile())
        else:
            budget = average if average < own.image_tokens else None  # an unpruned bundle asks for nothing
            resolved[name] = plan_for(name, spec, average_tokens=budget)
    return resolved


def _samples(count: int, seed: int, data: Path | None) -> SampleSet:
    from calibrate.data.samples import jsonl_samples, scene_samples

    if count < 1:
        raise InputError(f"--samples {count}", wanted="1 or more", do=f"--samples {DEFAULT_SAMPLES}")
    return scene_samples(count, seed=seed, split="eval") if data is None else jsonl_samples(data, count=count)


def _resizing(bundle: Bundle, resized: int) -> dict[str, Any]:
    """What is said of a model that takes any picture size, but was exported for one."""
    return {"image_size": bundle.profile().image_size, "resized": resized} if bundle.spec.vision.dynamic else {}


@dataclass
class _Questions:
    """The samples as the graphs take them. Vision is the same for all plans, so the first one leaves what it made."""

    encoded: Encoded
    room: int  # new tokens that are enough to tell a right answer
    vision: dict[int, dict[str, Any]]  # by first sample of a batch: the vision graph's outputs by name
    resized: int  # pictures that were scaled to the profile's size


def _ask(model: BundleModel, chosen: SampleSet) -> _Questions:
    encoded, resized = _encode(model, chosen)
    longest = max(len(model.prompter.token_ids(sample.answer or "")) for sample in chosen.samples)
    return _Questions(encoded, min(model.profile.new_tokens, longest + 2), {}, resized)


def _encode(model: BundleModel, chosen: SampleSet) -> tuple[Encoded, int]:
    """All samples in one, and how many pictures were scaled for it.

    Raises InputError with file and line of the first that the model cannot take.
    """
    from calibrate.data.text_files import at

    def encode(samples: Sequence[Sample]) -> tuple[Encoded, int]:
        pictures, resized = fitted([sample.image for sample in samples], model.spec, model.profile)
        prompts = [sample.prompt for sample in samples]
        return model.prompter.encode(pictures, prompts, profile=model.profile), resized

    try:
        return encode(chosen.samples)
    except InputError:
        for sample in chosen.samples:
            try:
                encode([sample])
            except InputError as error:
                raise at(sample.where, error) from error
        raise


def _answer(model: BundleModel, questions: _Questions, report: Report | None) -> Answers:
    """Greedy answers of one bundle."""
    texts: list[str] = []
    kept: dict[int, list[float]] = {}
    total = len(questions.encoded)
    for first in range(0, total, model.profile.batch):
        part = questions.encoded.part(range(first, min(first + model.profile.batch, total)))
        known = questions.vision.setdefault(first, {})
        prefill = model.prefill(part, vision=known)
        if prefill.vision_ms is not None:  # it was run: something was not known yet
            known |= model.chain.vision_outputs
        for stage, shares in _attention_kept(model, prefill).items():
            kept.setdefault(stage, []).extend(shares)
        for answer in model.greedy(prefill, part, questions.room):
            texts.append(model.prompter.decode(answer.without_end()))
        if report is not None:
            report(len(texts), total)
    return Answers(model.plan, texts, kept)


def _attention_kept(model: BundleModel, prefill: Prefill) -> dict[int, list[float]]:
    """For each stage, each sample's scores of the kept tokens over the scores of all tokens it chose from.

    Only where the scores are attention, so not at layer 0 and not for `random` and `dart`.
    """
    from graphs.pruning.torch_scores import uses_attention

    scored = model.chain.stage_scores
    shares: dict[int, list[float]] = {}
    for number, indices in enumerate(prefill.kept_relative):
        if number in scored and uses_attention(model.plan, number):
            scores = scored[number][: len(indices)].astype(np.float64)
            held = np.take_along_axis(scores, indices, axis=1).sum(axis=1)
            shares[number] = (held / np.maximum(scores.sum(axis=1), np.finfo(np.float64).tiny)).tolist()
    return shares


def _score(chosen: SampleSet, answers: Answers) -> Score:
    from calibrate.measure.accuracy import score

    return score(chosen.samples, answers.texts)


def _row(name: str, answers: Answers, chosen: SampleSet, full: Score, flops_ratio: float) -> EvaluatedPlan:
    from calibrate.measure.accuracy import scores_by_kind

    score, plan = _score(chosen, answers), answers.plan
    kinds = scores_by_kind(chosen.samples, answers.texts)
    return EvaluatedPlan(
        plan=name,
        average_tokens=plan.average_tokens,
        compression=plan.compression,
        accuracy=score.accuracy,
        kept_accuracy=score.accuracy / full.accuracy if full.accuracy else None,
        flops_ratio=flops_ratio,
        interval=score.interval(),
        attention_kept=tuple(_mean(answers.attention_kept.get(stage)) for stage in range(len(plan.stages))),
        kinds={kind: score_of_kind.accuracy for kind, score_of_kind in kinds.items()},
    )


def _mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def _offset(report: Report | None, start: int, total: int, text: str) -> Report | None:
    if report is None:
        return None
    return lambda done, _, __="": report(start + done, total, text)
