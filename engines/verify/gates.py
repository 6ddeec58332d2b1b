"""How verification compares, what must hold, and what it found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from engines.verify.protocol import Array
from graphs.dtypes import Precision


@dataclass(frozen=True)
class Gates:
    """What must hold: least cosine, how far the norm ratio may be from 1, least share of equal kept tokens.

    `logit_gap` is what counts as a tie of two tokens, relative to the spread of the logits.
    """

    cosine: float
    norm: float
    agreement: float
    logit_gap: float


# float32: two correct programs differ by rounding, seen at 1 - cosine below 1e-11. One row of one matrix that is off by
# 5 % moves it by 1e-7; a wrong constant, position or mask by far more. Half precision: one rounding is 2^-11 (float16)
# or 2^-8 (bfloat16) of a value and grows with the layers; greedy selection turns one flipped near-tie into several
# other tokens.
GATES: dict[Precision, Gates] = {
    "float32": Gates(cosine=1 - 1e-9, norm=1e-4, agreement=0.99, logit_gap=1e-4),
    "float16": Gates(cosine=0.9995, norm=1e-2, agreement=0.90, logit_gap=1e-2),
    "bfloat16": Gates(cosine=0.995, norm=3e-2, agreement=0.80, logit_gap=5e-2),
}


@dataclass
class GraphCheck:
    """The worst over samples and outputs of one graph; `worst` names where the cosine was lowest.

    `fault` is what is said of a graph whose numbers mean nothing: its first output that is not finite, why it does not
    run, or that it is not given what the reference had.
    """

    name: str
    cosine: float = 1.0
    norm_ratio: float = 1.0
    max_abs: float = 0.0
    worst: str = ""
    gates: Gates = GATES["float32"]  # by which it is judged
    fault: str = ""

    def add(self, tensor: str, wanted: Array, got: Array) -> None:
        """Compare one tensor of one sample."""
        cosine, ratio, gap = compare(wanted, got)
        if not np.isfinite(gap):
            self.must_be_finite(tensor, got)
        if cosine < self.cosine or (np.isfinite(self.cosine) and not np.isfinite(cosine)):
            self.cosine, self.worst = cosine, tensor
        if abs(ratio - 1) > abs(self.norm_ratio - 1) or not np.isfinite(ratio):
            self.norm_ratio = ratio
        self.max_abs = max(self.max_abs, gap) if np.isfinite(gap) else float("inf")

    def must_be_finite(self, tensor: str, got: Array) -> None:
        """Look at one tensor of one sample that cannot be compared."""
        if not (self.fault or np.isfinite(np.asarray(got, np.float64)).all()):
            self.worst = tensor
            self.fails(f"{tensor} has numbers that are not finite")

    def fails(self, reason: str) -> None:
        """Its numbers mean nothing, whatever was compared before. The first reason stays."""
        self.cosine, self.norm_ratio, self.max_abs = float("nan"), float("nan"), float("inf")
        self.fault = self.fault or reason

    def holds(self) -> bool:
        """Whether it is within its gates."""
        within = self.cosine >= self.gates.cosine and abs(self.norm_ratio - 1) <= self.gates.norm
        return within and not self.fault

    def failure(self) -> str:
        """What is said of a graph that does not hold."""
        if self.fault:
            return f"{self.name}: {self.fault}"
        found = f"cosine {self.cosine:.10g} and norm ratio {self.norm_ratio:.7g} ({self.worst})"
        return f"{self.name}: {found}; wanted at least {self.gates.cosine:.10g} and 1 within {self.gates.norm:g}"


@dataclass
class CheckResults:
    """What verification found so far; `failures` are sentences, empty if everything held.

    `gates` are the decoder's, by which the kept tokens of its graphs are judged too; a graph has its own. `free` are
    those of free runs, which begin with the vision graph: what rounds there may turn near-ties behind it.
    """

    gates: Gates = GATES["float32"]
    free: Gates = GATES["float32"]
    graphs: list[GraphCheck] = field(default_factory=list)
    kept: list[list[float]] = field(default_factory=list)  # per stage: agreement of each sample, 1.0 for keep 0
    near_ties: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return asdict(self)

    @staticmethod
    def restored(state: dict[str, Any]) -> CheckResults:
        """The findings that `state` was taken of."""
        graphs = [GraphCheck(**{**check, "gates": Gates(**check["gates"])}) for check in state["graphs"]]
        gates = {name: Gates(**state[name]) for name in ("gates", "free")}
        return CheckResults(**{**state, **gates, "graphs": graphs})

    def kept_agreement(self) -> list[float]:
        """Mean agreement per stage; 0 for a stage whose graph did not run."""
        return [float(np.mean(stage)) if stage else 0.0 for stage in self.kept]


def compare(wanted: Array, got: Array) -> tuple[float, float, float]:
    """Cosine, ratio of norms (got / wanted) and largest absolute difference, in float64 over all elements."""
    a, b = np.asarray(wanted, np.float64).ravel(), np.asarray(got, np.float64).ravel()
    if a.shape != b.shape:
        return float("nan"), float("nan"), float("inf")
    with np.errstate(invalid="ignore"):  # infinite numbers give NaN, which holds in no gate
        return _compared(a, b)


def _compared(a: Array, b: Array) -> tuple[float, float, float]:
    norm_a, norm_b = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    gap = float(np.abs(a - b).max(initial=0.0))
    if norm_a == 0.0 or norm_b == 0.0:
        return (1.0, 1.0, gap) if norm_a == norm_b else (0.0, float("inf") if norm_a == 0 else 0.0, gap)
    cosine = float(a @ b) / (norm_a * norm_b)
    return (1.0 if cosine > 1.0 else cosine), norm_b / norm_a, gap  # min() would turn NaN into 1


def agreement(wanted: Sequence[int] | Array, got: Sequence[int] | Array) -> float:
    """Share of `wanted` that `got` holds too; 1.0 if both are empty."""
    if len(wanted) == 0:
        return 1.0 if len(got) == 0 else 0.0
    return len({int(i) for i in wanted} & {int(i) for i in got}) / len(wanted)
