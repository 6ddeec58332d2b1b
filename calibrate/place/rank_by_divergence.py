"""How far plans move a model's answers: divergence from the full model's at every token of its own answer.

The divergence has a long tail: most pictures lose nothing, and the few whose answer turns decide the mean. So all
candidates run on a few of the samples, the better ones on more, and the best few on all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from calibrate.measure.divergence import change
from calibrate.place.candidates import Candidate
from calibrate.reference.records import ReferenceInput
from calibrate.reference.streamed_model import StreamedReference
from graphs.records.plan import PruningPlan
from graphs.records.progress import Report, part_of

# (samples, candidates of a group that go on to more of them): sample sets interleave their kinds, so that the first few
# hold each kind.
ROUNDS = ((12, 12), (32, 4))
# Hidden states, queries, keys and logits that one streamed pass may hold: a 7B on 64 samples stays below 4 GB.
PASS_BYTES = 5 * 2**28
_ROWS_A_TOKEN = 3  # hidden state, query and key


def judge(
    reference: StreamedReference,
    inputs: Sequence[ReferenceInput],
    groups: Sequence[Sequence[Candidate]],
    logits: Sequence[np.ndarray],
    *,
    progress: Report | None = None,
) -> list[list[Candidate]]:
    """The candidates with what they do to the answers, in groups of which one will be chosen each.

    `inputs` carry the full model's answers, `logits` [answer, vocabulary] of each are the unpruned model's. Candidates
    run on more and more samples as ROUNDS says; groups share the streamed passes.
    """
    ends = [end for end, _ in ROUNDS if end < len(inputs)] + [len(inputs)]
    judged = [list(group) for group in groups]
    running = [list(range(len(group))) for group in groups]  # of each group, the candidates that are still run
    begin = 0
    for number, end in enumerate(ends):
        part = [[judged[group][place] for place in places] for group, places in enumerate(running)]
        report = part_of(progress, number, len(ends))
        seen = _run(reference, inputs[begin:end], part, logits[begin:end], report)
        for group, places in enumerate(running):
            for place, more in zip(places, seen[group], strict=True):
                judged[group][place] = _joined(judged[group][place], more)
            if number + 1 < len(ends):
                running[group] = sorted(places, key=lambda place: judged[group][place].mean)[: ROUNDS[number][1]]
        begin = end
    return judged


def _joined(before: Candidate, more: Candidate) -> Candidate:
    """The candidate with the samples of both."""
    return replace(
        before,
        divergence=np.concatenate([before.divergence, more.divergence]),
        agreement=np.concatenate([before.agreement, more.agreement]),
        exact=np.concatenate([before.exact, more.exact]),
    )


def _run(
    reference: StreamedReference,
    inputs: Sequence[ReferenceInput],
    groups: Sequence[Sequence[Candidate]],
    logits: Sequence[np.ndarray],
    progress: Report | None,
) -> list[list[Candidate]]:
    """Every candidate on every input, in as few streamed passes as memory allows."""
    candidates = [candidate for group in groups for candidate in group]
    parts = passes([candidate.plan for candidate in candidates], inputs, reference.vocab_size)
    waiting, judged = iter(candidates), []
    for number, plans in enumerate(parts):
        pruned = reference.logits(inputs, plans, progress=part_of(progress, number, len(parts)))
        for first in range(0, len(pruned), len(inputs)):  # now: the logits of one pass are what memory has room for
            judged.append(_judged(next(waiting), pruned[first : first + len(inputs)], logits))
    each = iter(judged)
    return [[next(each) for _ in group] for group in groups]


def _judged(candidate: Candidate, pruned: Sequence[np.ndarray], logits: Sequence[np.ndarray]) -> Candidate:
    changes = [change(full, part) for full, part in zip(logits, pruned, strict=True)]
    return replace(
        candidate,
        divergence=np.array([each.divergence for each in changes]),
        agreement=np.array([each.agreement for each in changes]),
        exact=np.array([float(each.exact) for each in changes]),
    )


def passes(
    plans: Sequence[PruningPlan], inputs: Sequence[ReferenceInput], vocab_size: int
) -> list[Sequence[PruningPlan]]:
    """The plans in groups whose runs fit into PASS_BYTES each, as far as one plan's do."""
    if not inputs or not plans:
        return [plans]
    hidden = inputs[0].image_features.shape[1]
    text = max(len(sample.input_ids) + len(sample.new_tokens) for sample in inputs) - plans[0].image_tokens
    kept = max((plan.stages[0].keep for plan in plans if plan.stages), default=0)
    answer = 1 + max(len(sample.new_tokens) for sample in inputs)
    each = 4 * len(inputs) * ((text + kept) * hidden * _ROWS_A_TOKEN + answer * vocab_size)
    room = max(1, PASS_BYTES // max(1, each))
    return [plans[first : first + room] for first in range(0, len(plans), room)]
