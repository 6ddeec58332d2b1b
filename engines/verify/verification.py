"""Verification: every graph of a bundle against a reference run, then the free run.

Teacher-forced: each graph gets the reference's own inputs, so an error shows in the graph that makes it and nowhere
else. Only real tokens are compared; padding is computed and never looked at. Cosine and norm ratio are taken per
output tensor and sample in float64, and a graph is as good as its worst. The reference comes as an argument
(calibrate/reference/streamed_model.py makes it): the two packages do not know each other.

Free: the bundle generates on its own; its kept sets and tokens are held against the reference's.

Pruning that did not happen is a failure: kept indices must be as many as the plan says, distinct, ascending, and the
rows that come out must be the rows at those indices, with their own positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engines.runners.cuda import CudaError
from engines.runners.interface import Runner
from engines.verify.gates import GATES, CheckResults, Gates, agreement
from engines.verify.graph_checks import GraphVerifier
from engines.verify.protocol import Array, ReferenceRun, VerifySample
from graphs import names
from graphs.dtypes import Precision
from graphs.files.resume import Sequence as Steps
from graphs.records.errors import CheckError
from graphs.records.plan import PruningPlan
from graphs.records.progress import Report
from graphs.records.shapes import ShapeProfile

__all__ = ["GATES", "CheckResults", "FreeRun", "VerifySample", "same_kept", "verify_free", "verify_graphs"]

GraphOpener = Callable[[], Runner]
LogitRule = Callable[
    [Sequence[int], Array], Array
]  # tokens so far, logits [vocab] -> logits that the choice is made by


def verify_graphs(
    graphs: Mapping[str, GraphOpener],
    plan: PruningPlan,
    profile: ShapeProfile,
    precision: Precision,
    samples: Sequence[VerifySample],
    *,
    computed: Precision | None = None,
    steps: Steps | None = None,
    progress: Report | None = None,
) -> CheckResults:
    """Run every graph on the reference's inputs, one graph open at a time, and compare.

    `graphs` opens graphs by name, in the order in which they run; the samples are taken in batches of the profile's
    size, the last one filled up with its last sample. `precision` is the graphs' own, `computed` what the runner makes
    of it in the decoder (None: the same). Graphs that `steps` knows to be checked are not run again.
    """
    # What has the vision graph in it is held to the graphs' own type, as free runs are.
    gates, own, whole = GATES[computed or precision], GATES[precision], names.WHOLE in graphs
    latest = steps.resume("the check of the graphs") if steps is not None else None
    if latest is not None:
        findings, checked = CheckResults.restored(latest.meta), latest.number
    else:
        findings, checked = CheckResults(own if whole else gates, own, kept=[[] for _ in plan.stages]), 0
    wanted = [*names.prefill_graphs(plan, whole=whole), names.DECODE]
    missing = [name for name in wanted if name not in graphs]
    if missing and not checked:
        findings.failures.append(f"the bundle lacks the graphs {', '.join(missing)}")
    for number, (name, opener) in enumerate(graphs.items()):
        if number < checked:
            continue
        if progress is not None:
            progress(number - checked, len(graphs) - checked, name)
        verifier = GraphVerifier(name, opener(), plan, profile, findings)
        check = verifier.result
        check.gates = own if name in (names.VISION, names.WHOLE) else gates
        try:
            verifier.check(samples)
        except CudaError:  # the GPU's fault, and no graph runs on it any more
            raise
        except CheckError as error:
            check.fails(error.got)
        if not check.holds():
            findings.failures.append(check.failure())
        if steps is not None and steps.due:
            steps.save(number + 1, {}, findings.state())
    _judge_agreement(findings)
    return findings


def _judge_agreement(findings: CheckResults) -> None:
    for number, share in enumerate(findings.kept_agreement()):
        if findings.kept[number] and share < findings.gates.agreement:
            findings.failures.append(
                f"stage {number} keeps {share:.4f} of the reference's tokens; wanted at least "
                f"{findings.gates.agreement}"
            )


@dataclass(frozen=True)
class FreeRun:
    """What the bundle did on its own: generated ids, and the kept tokens of each stage as indices into all V."""

    tokens: Sequence[int]
    kept: Sequence[Sequence[int] | Array]


def same_kept(run: ReferenceRun, free: FreeRun) -> bool:
    """Whether every stage of a free run kept what the reference kept."""
    return all(agreement(stage.absolute, kept) == 1.0 for stage, kept in zip(run.stages, free.kept, strict=True))


def verify_free(
    findings: CheckResults,
    plan: PruningPlan,
    runs: Sequence[ReferenceRun],
    free: Sequence[FreeRun],
    tokens_from: Sequence[ReferenceRun] | None = None,
    rules: Sequence[LogitRule] | None = None,
) -> bool:
    """Hold free runs against the reference, which got their tokens appended; whether all tokens are equal.

    A token is equal if it is the reference's argmax at its place, or ties with it within the gate: such near-ties are
    named. Where a near-tie made the bundle keep another token, `tokens_from` are reference runs forced to the bundle's
    kept sets, so that the tokens are still compared like with like. `rules` are, for each sample, what the model's
    generation settings do to logits. Failures are added to `findings`, whose gates of free runs hold.
    """
    gates, equal = findings.free, True
    for number, (run, own) in enumerate(zip(runs, free, strict=True)):
        for stage, record in enumerate(run.stages):
            kept = own.kept[stage]
            share = agreement(record.absolute, kept)
            text = f"free run of sample {number}: stage {stage} keeps"
            if len(kept) != plan.stages[stage].keep:
                findings.failures.append(f"{text} {len(kept)} tokens, the plan says {plan.stages[stage].keep}")
            elif share < gates.agreement:
                findings.failures.append(f"{text} {share:.4f} of the reference's tokens; wanted {gates.agreement}")
            elif share < 1.0:
                findings.near_ties.append(f"{text} {share:.4f} of the reference's tokens (cut {record.margin:.2g})")
        logits = (tokens_from or runs)[number].logits
        if rules is not None:
            logits = np.stack([rules[number](own.tokens[:place], logits[place]) for place in range(len(own.tokens))])
        equal = _tokens_hold(findings, number, logits, own.tokens, gates) and equal
    return equal


def _tokens_hold(findings: CheckResults, number: int, logits: Array, tokens: Sequence[int], gates: Gates) -> bool:
    for place, token in enumerate(tokens):
        row = logits[place].astype(np.float64)
        best = int(row.argmax())
        if best == token:
            continue
        possible = row[np.isfinite(row)]  # a generation setting may forbid tokens
        gap = float(row[best] - row[token]) / max(float(possible.max() - possible.min()), 1e-30)
        text = f"sample {number}, token {place}: the bundle gives {token}, the reference {best}, logit gap {gap:.2g}"
        if gap > gates.logit_gap:
            findings.failures.append(text)
            return False
        findings.near_ties.append(text)
    return True
