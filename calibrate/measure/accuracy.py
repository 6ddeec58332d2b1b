"""How good answers are: exact match with an interval, in all and by kind of question."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass

from calibrate.data.samples import Sample


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


def hits(samples: Sequence[Sample], answers: Sequence[str]) -> list[bool]:
    """Which answers are exactly the samples' own; a sample without one never matches."""
    return [
        sample.answer is not None and exact(text, sample.answer) for sample, text in zip(samples, answers, strict=True)
    ]


def score(samples: Sequence[Sample], answers: Sequence[str]) -> Score:
    """Exact match of `answers` with the samples' own answers."""
    right = hits(samples, answers)
    return Score(sum(right), len(right))


@dataclass(frozen=True)
class Paired:
    """Two sets of answers to the same questions: how many only the first got right, and only the second."""

    first_only: int
    second_only: int
    count: int

    @property
    def difference(self) -> float:
        """Accuracy of the first minus that of the second."""
        return (self.first_only - self.second_only) / self.count if self.count else 0.0

    @property
    def p_value(self) -> float:
        """Two-sided exact test of McNemar (Psychometrika 12, 1947): 1 if nothing tells the two apart."""
        different, fewer = self.first_only + self.second_only, min(self.first_only, self.second_only)
        # Whole numbers: the powers of two of a thousand questions do not fit a float.
        tail = sum(math.comb(different, successes) for successes in range(fewer + 1))
        return min(1.0, 2 * tail / (1 << different))


def paired(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Compare two rows of hits on the same questions."""
    pairs = list(zip(first, second, strict=True))
    return Paired(sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs), len(pairs))


def scores_by_kind(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, Score]:
    """The same for each kind of question, in the order in which the kinds first occur."""
    kinds = dict.fromkeys(sample.kind for sample in samples)
    pairs = list(zip(samples, answers, strict=True))
    return {kind: score(*zip(*[pair for pair in pairs if pair[0].kind == kind], strict=True)) for kind in kinds}
