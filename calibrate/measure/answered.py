"""Samples measured with the model's own answers behind them, which are asked for only where nobody knows them.

Drawn pictures come with their right answers. Tokens behind a prompt change no row before them, so one pass over prompt
and right answer shows whether the model gives that answer, and if it does, the pass is the one that measures: the same
rows as after asking, and so the same numbers. A few samples show first whether trying is worth a pass over all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from calibrate.measure.statistics import Statistics, measure
from calibrate.reference.answers import greedy_answers
from calibrate.reference.records import ReferenceInput
from calibrate.reference.streamed_model import StreamedReference
from graphs.records.plan import PruningPlan
from graphs.records.progress import Report, labelled

FIRST = 4  # samples whose expected answers are tried before the others'


def measure_answers(
    reference: StreamedReference,
    inputs: Sequence[ReferenceInput],
    unpruned: PruningPlan,
    *,
    taus: tuple[float, ...],
    dropped: int,
    tokens: int,
    ends: Sequence[int],
    progress: Report | None = None,
) -> Statistics:
    """`measure` with at most `tokens` of each answer, until one of `ends`; dropping is measured on the first `dropped`.

    What the samples expect decides how long this takes, not what comes out.
    """
    report, asked = labelled(progress, "measuring the layers"), labelled(progress, "asking the model")

    def measured(numbers: Sequence[int], answers: Sequence[tuple[int, ...]]) -> Statistics:
        pairs = zip(numbers, answers, strict=True)
        some = [replace(inputs[number], new_tokens=answer[:-1]) for number, answer in pairs]
        count = sum(number < dropped for number in numbers)
        return measure(reference, some, unpruned, taus=taus, dropped=count, progress=report)

    known: dict[int, Statistics] = {}
    for numbers, guesses in _guesses(inputs, tokens, ends, reference.vocab_size):
        found = zip(numbers, guesses, measured(numbers, guesses).each(), strict=True)
        right = {number: part for number, guess, part in found if tuple(part.logits.argmax(axis=1)) == guess}
        known |= right
        if 2 * len(right) < len(numbers):
            break
    left = [number for number in range(len(inputs)) if number not in known]
    if left:
        unknown = [inputs[number] for number in left]
        answers = greedy_answers(reference, unknown, unpruned, tokens=tokens, ends=ends, progress=asked)
        known |= zip(left, measured(left, answers).each(), strict=True)
    return Statistics.joined([known[number] for number in range(len(inputs))])


def _guesses(
    inputs: Sequence[ReferenceInput], tokens: int, ends: Sequence[int], vocabulary: int
) -> Iterator[tuple[list[int], list[tuple[int, ...]]]]:
    """Numbers of samples with the answers that are expected of them: of a few, then of all others."""
    guesses = {}
    for number, sample in enumerate(inputs):
        guess = sample.expected[:tokens]
        end = next((place for place, token in enumerate(guess, 1) if token in ends), tokens)
        # An answer ends there and nowhere before, in words that the model has.
        if guess and len(guess) == end and max(guess) < vocabulary:
            guesses[number] = guess
    numbers = list(guesses)
    for some in (numbers[:FIRST], numbers[FIRST:]):
        if some:
            yield some, [guesses[number] for number in some]
