"""Accuracy of plans through the exported graphs: one derived bundle for each plan, the same questions for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btp_export.console import Report
from btp_export.plans import CALIBRATED, plan_for
from graphs.bundle import Bundle, derive, scratch_folder
from graphs.errors import InputError
from graphs.plan import PruningPlan

if TYPE_CHECKING:
    from btp_export.prompting import Encoded
    from btp_export.runtime import BundleModel, Prefill
    from calibrate.data import SampleSet
    from calibrate.evaluation import Score

FULL = "none"
DEFAULT_PLANS = (FULL, CALIBRATED, "btp-paper", "fastv", "pyramiddrop", "divprune", "vtw", "random", "dart")
DEFAULT_SAMPLES = 200


@dataclass(frozen=True)
class Answers:
    """What one plan answered to every sample."""

    plan: PruningPlan
    texts: list[str]


def evaluate_bundle(
    bundle: Bundle,
    *,
    plans: Sequence[str] = DEFAULT_PLANS,
    compression: float | None = None,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    data: Path | None = None,
    threads: int | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """The contract's document: `samples` and `rows`, one for each of `plans`.

    `btp` is the bundle's own plan, `none` the unpruned model, which is always run because accuracy is held against
    it; the other presets get `compression`, or the same average tokens as the bundle's own plan. Questions are
    held-out scenes, or the lines of the JSONL file `data`. Raises InputError for unknown plans or unusable data before
    any long work.
    """
    from btp_export.runtime import load
    from graphs.flops import cost

    chosen = _samples(samples, seed, data)
    planned = resolve_plans(bundle, plans, compression)
    everything = {FULL: _full(bundle), **planned}
    answers: dict[str, Answers] = {}
    questions: _Questions | None = None
    total = len(everything) * len(chosen.samples)
    with scratch_folder(bundle) as folder:
        for name, plan in everything.items():
            made = bundle if plan == bundle.plan else derive(bundle, plan, folder / name.replace("/", "_"))
            start = len(answers) * len(chosen.samples)
            model = load(made, threads=threads)
            questions = questions or _ask(model, chosen)
            answers[name] = Answers(plan, _answer(model, questions, _offset(report, start, total, name)))
    profile = bundle.profile()
    flops = {name: cost(bundle.spec.decoder, plan, profile).prefill for name, plan in everything.items()}
    full = _score(chosen, answers[FULL])
    rows = [_row(name, answers[name], chosen, full, flops[name] / flops[FULL]) for name in planned]
    return {
        "samples": len(chosen.samples),
        "source": chosen.source,
        "full_accuracy": full.accuracy,
        "rows": rows,
    }


def resolve_plans(bundle: Bundle, names: Sequence[str], compression: float | None) -> dict[str, PruningPlan]:
    """Plans by name, at one budget; see `evaluate_bundle`. Raises InputError for an unknown or repeated name."""
    if len(set(names)) < len(names) or not names:
        raise InputError(f"--plans {','.join(names)}", wanted="different plans", do="name each once")
    if compression is not None and not 0.0 <= compression < 1.0:
        raise InputError(f"compression {compression}", wanted="a number from 0 to below 1", do="--compression 0.78")
    own = bundle.plan
    if compression is not None and own.stages:
        from calibrate.budget import refitted

        own = refitted(own, compression)
    average = own.average_tokens if compression is None else (1.0 - compression) * own.image_tokens
    resolved: dict[str, PruningPlan] = {}
    for name in names:
        if name == CALIBRATED:
            resolved[name] = own
        elif name.endswith(".json"):
            resolved[name] = plan_for(name, bundle.spec)
        else:
            budget = average if average < own.image_tokens else None  # an unpruned bundle asks for nothing
            resolved[name] = plan_for(name, bundle.spec, average_tokens=budget)
    return resolved


def _full(bundle: Bundle) -> PruningPlan:
    return bundle.plan.model_copy(update={"stages": (), "importance": "last-token", "calibration": {}})


def _samples(count: int, seed: int, data: Path | None) -> SampleSet:
    from calibrate.data import jsonl_samples, scene_samples

    if count < 1:
        raise InputError(f"--samples {count}", wanted="1 or more", do=f"--samples {DEFAULT_SAMPLES}")
    return scene_samples(count, seed=seed, split="eval") if data is None else jsonl_samples(data, count=count)


@dataclass
class _Questions:
    """The samples as the graphs take them. Vision is the same for all plans, so the first one leaves its features."""

    encoded: Encoded
    room: int  # new tokens that are enough to tell a right answer
    features: dict[int, Any]  # by first sample of a batch: [B,V,C]


def _ask(model: BundleModel, chosen: SampleSet) -> _Questions:
    encoded = model.encode([one.image for one in chosen.samples], [one.prompt for one in chosen.samples])
    tokenizer = model.prompter.tokenizer
    longest = max(len(tokenizer(one.answer or "", add_special_tokens=False)["input_ids"]) for one in chosen.samples)
    return _Questions(encoded, min(model.profile.new_tokens, longest + 2), {})


def _answer(model: BundleModel, questions: _Questions, report: Report | None) -> list[str]:
    """Greedy answers of one bundle."""
    texts: list[str] = []
    total = len(questions.encoded)
    for first in range(0, total, model.profile.batch):
        part = questions.encoded.part(range(first, min(first + model.profile.batch, total)))
        prefill = model.prefill(part, features=questions.features.get(first))
        if first not in questions.features and "prefill" not in {graph.name for graph in model.bundle.graphs()}:
            questions.features[first] = model.chain.image_features
        for ids in _greedy(model, prefill, questions.room):
            texts.append(model.prompter.tokenizer.decode(ids, skip_special_tokens=True))
        if report is not None:
            report(len(texts), total)
    return texts


def _greedy(model: BundleModel, prefill: Prefill, room: int) -> list[list[int]]:
    """Likeliest tokens of each sample until its end token, at most `room`."""
    logits, ends = prefill.logits, set(model.spec.eos_token_ids)
    ids: list[list[int]] = [[] for _ in logits]
    done = [False] * len(ids)
    for step in range(room):
        tokens = [int(row.argmax()) for row in logits]
        for sample, token in enumerate(tokens):
            done[sample] = done[sample] or token in ends
            if not done[sample]:
                ids[sample].append(token)
        if all(done) or step == room - 1:
            break
        logits = model.decode_step(prefill, tokens)
    return ids


def _score(chosen: SampleSet, answers: Answers) -> Score:
    from calibrate.evaluation import score

    return score(chosen.samples, answers.texts)


def _row(name: str, answers: Answers, chosen: SampleSet, full: Score, flops_ratio: float) -> dict[str, Any]:
    from calibrate.evaluation import scores_by_kind

    mine, plan = _score(chosen, answers), answers.plan
    kinds = scores_by_kind(chosen.samples, answers.texts)
    return {
        "plan": name,
        "average_tokens": plan.average_tokens,
        "compression": plan.compression,
        "accuracy": mine.accuracy,
        "kept_accuracy": mine.accuracy / full.accuracy if full.accuracy else None,
        "flops_ratio": flops_ratio,
        "interval": list(mine.interval()),
        "kinds": {kind: one.accuracy for kind, one in kinds.items()},
    }


def _offset(report: Report | None, start: int, total: int, text: str) -> Report | None:
    if report is None:
        return None
    return lambda done, _, __="": report(start + done, total, text)
