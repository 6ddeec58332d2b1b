"""Questions for a bundle, and its greedy answers to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from btp_export.model.pictures import fitted
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan
from graphs.records.progress import Report
from graphs.records.shapes import ShapeProfile

if TYPE_CHECKING:
    from btp_export.model.prompting import Encoded, Prompter
    from btp_export.running.runtime import BundleModel, Prefill
    from calibrate.data.samples import Sample, SampleSet


@dataclass(frozen=True)
class Answers:
    """What one plan answered to every sample.

    attention_kept: for each stage, each sample's share of the scores that the kept tokens hold; see `_row`.
    """

    plan: PruningPlan
    texts: list[str]
    attention_kept: Mapping[int, list[float]] = field(default_factory=dict)


@dataclass
class Questions:
    """The samples as the graphs take them. Vision is the same for all plans, so the first one leaves what it made."""

    encoded: Encoded
    room: int  # new tokens that are enough to tell a right answer
    vision: dict[int, dict[str, Any]]  # by first sample of a batch: the vision graph's outputs by name
    resized: int  # pictures that were scaled to the profile's size


def ask(model: BundleModel, chosen: SampleSet) -> Questions:
    """The questions for a model. Raises InputError with file and line of the first that it cannot take."""
    encoded, resized = encoded_samples(model.prompter, model.profile, chosen)
    longest = max(len(model.prompter.token_ids(sample.answer or "")) for sample in chosen.samples)
    return Questions(encoded, min(model.profile.new_tokens, longest + 2), {}, resized)


def encoded_samples(prompter: Prompter, profile: ShapeProfile, chosen: SampleSet) -> tuple[Encoded, int]:
    """All samples in one, and how many pictures were scaled for it.

    Raises InputError with file and line of the first that the model cannot take.
    """
    from calibrate.data.text_files import at

    def encode(samples: Sequence[Sample]) -> tuple[Encoded, int]:
        pictures, resized = fitted([sample.image for sample in samples], prompter.spec, profile)
        return prompter.encode(pictures, [sample.prompt for sample in samples], profile=profile), resized

    try:
        return encode(chosen.samples)
    except InputError:
        for sample in chosen.samples:
            try:
                encode([sample])
            except InputError as error:
                raise at(sample.where, error) from error
        raise


def answer(model: BundleModel, questions: Questions, report: Report | None, samples: range | None = None) -> Answers:
    """Greedy answers of one bundle, to some of the samples if they are given: whole batches, in order."""
    texts: list[str] = []
    kept: dict[int, list[float]] = {}
    asked = range(len(questions.encoded)) if samples is None else samples
    for first in asked[:: model.profile.batch]:
        part = questions.encoded.part(range(first, min(first + model.profile.batch, asked.stop)))
        known = questions.vision.setdefault(first, {})
        prefill = model.prefill(part, vision=known)
        if prefill.vision_ms is not None:  # it was run: something was not known yet
            known |= model.chain.vision_outputs
        for stage, shares in _attention_kept(model, prefill).items():
            kept.setdefault(stage, []).extend(shares)
        for greedy in model.greedy(prefill, part, questions.room):
            texts.append(model.prompter.decode(greedy.without_end()))
        if report is not None:
            report(len(texts), len(asked))
    return Answers(model.plan, texts, kept)


def joined(parts: Sequence[Answers]) -> Answers:
    """One plan's answers to parts of the samples, as answers to all."""
    kept: dict[int, list[float]] = {}
    for part in parts:
        for stage, shares in part.attention_kept.items():
            kept.setdefault(stage, []).extend(shares)
    return Answers(parts[0].plan, [text for part in parts for text in part.texts], kept)


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
