"""How far plans move a model's answers: KL divergence of the next token from the unpruned model's.

The divergence has a long tail: most pictures lose nothing, and the few whose answer turns decide the mean. So all
candidates run on some of the samples, and the best few then on all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from calibrate.measure.divergence import divergence
from calibrate.place.candidates import Candidate
from calibrate.reference.records import ReferenceInput, RunRecord
from calibrate.reference.streamed_model import StreamedReference
from graphs.records.plan import PruningPlan
from graphs.records.progress import Report, part_of

JUDGED_SAMPLES = 24  # on which every candidate is run
FINALISTS = 3  # candidates that are then run on all samples
PASS_BYTES = 3 * 2**29  # of hidden states, queries and keys that one streamed pass may hold
_ROWS_A_TOKEN = 3  # hidden state, query and key


def judge(
    reference: StreamedReference,
    inputs: Sequence[ReferenceInput],
    groups: Sequence[Sequence[Candidate]],
    logits: np.ndarray,
    *,
    progress: Report | None = None,
) -> list[list[Candidate]]:
    """The candidates with their divergence and agreement, in groups of which one will be chosen each.

    `logits` [n, vocabulary] are the unpruned model's on `inputs`. Every candidate runs on the first JUDGED_SAMPLES, the
    best FINALISTS of each group then on all. Groups share the streamed passes.
    """
    few = min(JUDGED_SAMPLES, len(inputs))
    rounds = 2 if few < len(inputs) else 1
    judged = _run(reference, inputs[:few], groups, logits[:few], part_of(progress, 0, rounds))
    if rounds == 1:
        return judged
    finalists = [sorted(group, key=lambda candidate: candidate.mean)[:FINALISTS] for group in judged]
    rest = _run(reference, inputs[few:], finalists, logits[few:], part_of(progress, 1, rounds))
    for group, best, more in zip(judged, finalists, rest, strict=True):
        for candidate, seen in zip(best, more, strict=True):
            group[group.index(candidate)] = replace(
                candidate,
                divergence=np.concatenate([candidate.divergence, seen.divergence]),
                agreement=np.concatenate([candidate.agreement, seen.agreement]),
            )
    return judged


def _run(
    reference: StreamedReference,
    inputs: Sequence[ReferenceInput],
    groups: Sequence[Sequence[Candidate]],
    logits: np.ndarray,
    progress: Report | None,
) -> list[list[Candidate]]:
    """Every candidate on every input, in as few streamed passes as memory allows."""
    parts = passes([candidate.plan for group in groups for candidate in group], inputs)
    runs: list[RunRecord] = []
    for number, plans in enumerate(parts):
        runs += reference.run(inputs, plans, progress=part_of(progress, number, len(parts)))
    each = iter([runs[first : first + len(inputs)] for first in range(0, len(runs), len(inputs))])
    return [[_judged(candidate, next(each), logits) for candidate in group] for group in groups]


def _judged(candidate: Candidate, runs: Sequence[RunRecord], logits: np.ndarray) -> Candidate:
    kl = [divergence(full, run.logits[0]) for full, run in zip(logits, runs, strict=True)]
    same = [int(full.argmax()) == run.next_tokens[0] for full, run in zip(logits, runs, strict=True)]
    return replace(candidate, divergence=np.array(kl), agreement=np.array(same, dtype=np.float64))


def passes(plans: Sequence[PruningPlan], inputs: Sequence[ReferenceInput]) -> list[Sequence[PruningPlan]]:
    """The plans in groups whose runs fit into PASS_BYTES each, as far as one plan's do."""
    if not inputs or not plans:
        return [plans]
    hidden = inputs[0].image_features.shape[1]
    text = max(len(sample.input_ids) for sample in inputs) - plans[0].image_tokens
    kept = max((plan.stages[0].keep for plan in plans if plan.stages), default=0)
    each = len(inputs) * (text + kept) * hidden * 4 * _ROWS_A_TOKEN
    room = max(1, PASS_BYTES // max(1, each))
    return [plans[first : first + room] for first in range(0, len(plans), room)]
