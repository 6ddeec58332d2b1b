"""How good answers are: exact match with an interval, in all and by kind of question."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass

from calibrate.data import Sample


@dataclass(frozen=True)
class Score:
    """Exact match over a set: `correct` of `count`."""

    correct: int
    count: int

    @property
    def accuracy(self) -> float:
        """Share of exact answers."""
        return self.correct / self.count if self.count else 0.0

    def interval(self, z: float = 1.959964) -> tuple[float, float]:
        """Wilson's score interval for the accuracy, 95 % unless told otherwise (E. B. Wilson, JASA 22, 1927)."""
        if self.count == 0:
            return 0.0, 1.0
        n, p = self.count, self.accuracy
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)


def normalised(text: str) -> str:
    """Text as it is compared: lower case, single spaces, no punctuation around it."""
    return " ".join(text.lower().split()).strip(string.punctuation + " ")


def exact(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one, compared as `normalised`."""
    return normalised(answer) == normalised(expected)


def score(samples: Sequence[Sample], answers: Sequence[str]) -> Score:
    """Exact match of `answers` with the samples' own answers; a sample without one never matches."""
    hits = [one.answer is not None and exact(text, one.answer) for one, text in zip(samples, answers, strict=True)]
    return Score(sum(hits), len(hits))


def scores_by_kind(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, Score]:
    """The same for each kind of question, in the order in which the kinds first occur."""
    kinds = dict.fromkeys(sample.kind for sample in samples)
    pairs = list(zip(samples, answers, strict=True))
    return {kind: score(*zip(*[pair for pair in pairs if pair[0].kind == kind], strict=True)) for kind in kinds}
