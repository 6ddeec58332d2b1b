"""Accuracy of plans through the exported graphs: one derived bundle for each plan, the same questions for all."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btp_export.exporting import vision_with_attention
from btp_export.measuring.answering import Answers, answer, ask, joined
from btp_export.planning.plan_files import CALIBRATED, plan_for
from btp_export.results.evaluation import EvaluatedPlan, Evaluation, WeightsCost
from btp_export.spreading import Cluster, connected
from graphs.building.derived_bundles import derive
from graphs.files.bundle import Bundle
from graphs.files.cores import SMALL_WEIGHTS, available_cores
from graphs.files.folders import scratch_beside
from graphs.files.memory import check_memory
from graphs.names import VISION
from graphs.records.errors import InputError
from graphs.records.match_plan import plan_for_profile, spec_at
from graphs.records.plan import PruningPlan
from graphs.records.progress import Note, Report
from graphs.records.stored_weights import Activations

if TYPE_CHECKING:
    from btp_export.running.runtime import BundleModel
    from calibrate.data.samples import SampleSet
    from calibrate.measure.accuracy import Score

FULL = "none"
DEFAULT_PLANS = (FULL, CALIBRATED, "btp-paper", "fastv", "pyramiddrop", "divprune", "scope", "vtw", "random", "dart")
DEFAULT_SAMPLES = 200  # an accuracy of 0.9 is then known to about 4 %


@dataclass(frozen=True)
class ScoredEvaluation:
    """The evaluation, and row by row which samples were answered right."""

    evaluation: Evaluation
    hits: list[list[bool]]


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
    ray: str | None = None,
    report: Report | None = None,
    note: Note = lambda text: None,
) -> Evaluation:
    """Accuracy: a row for each of `plans` and budgets.

    `btp` is the bundle's own plan, `none` the unpruned model, which is always run because accuracy is held against
    it; the other presets get `compression` (several budgets: a row for each), or the same average tokens as the
    bundle's own plan. Questions are held-out scenes, or the lines of the JSONL file `data`; `full_weights`, a bundle of
    the same model before its weights became four bits, is asked them too. Raises InputError for unknown plans, unusable
    data or a bundle of something else before any long work.

    `ray` is the address of a cluster that the samples are spread over; such a run goes on where an earlier one was
    interrupted, of which `note` tells.
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
            ray=ray,
            report=report,
            note=note,
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
    quantization = bundle.manifest.quantization
    assert quantization is not None, "check_full_weights"
    origin = quantization.source if quantization.method == "read" else quantization.method
    return f"{origin}, groups of {quantization.group_text}"


def evaluate_plans(
    bundle: Bundle,
    planned: Sequence[tuple[str, PruningPlan]],
    *,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    data: Path | None = None,
    threads: int | None = None,
    activations: Activations = "int8",
    ray: str | None = None,
    report: Report | None = None,
    note: Note = lambda text: None,
) -> ScoredEvaluation:
    """The same for named plans; plans that give the same graphs are run once."""
    from btp_export.running.opening import activations_in
    from btp_export.running.runtime import load
    from calibrate.measure.accuracy import hits
    from graphs.pruning.operations import cost

    chosen = _samples(bundle, samples, seed, data, spread=ray is not None)
    full = bundle.plan.without_stages()
    digests = [plan.digest() for _, plan in planned]
    unpruned = full.digest()
    different = {unpruned: (FULL, full)}
    for digest, entry in zip(digests, planned, strict=True):
        different.setdefault(digest, entry)
    with scratch_beside(bundle.root) as folder, connected(ray) as cluster:
        derived = {bundle.plan.digest(): bundle} | {
            digest: derive(bundle, plan, folder / digest, vision=vision_with_attention, sync=False)
            for digest, (_, plan) in different.items()
            if digest != bundle.plan.digest()
        }
        asked = {digest: (name, derived[digest]) for digest, (name, _) in different.items()}
        opens = partial(load, threads=threads, activations=activations)
        if cluster is None:
            answers, resized = _answers(asked, chosen, opens, report)
        else:
            answers, resized = _spread_answers(cluster, asked, chosen, opens, report, note)
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
        **_resizing(bundle, resized),
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
    """Plans by name, at one budget; see `evaluate_bundle`. Raises InputError for an unknown, repeated or empty name."""
    if len(set(names)) < len(names) or not names or not all(names):
        raise InputError(f"--plans {','.join(names)}", wanted="names of different plans", do="name each once")
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


def _samples(bundle: Bundle, count: int, seed: int, data: Path | None, *, spread: bool) -> SampleSet:
    """Raises InputError for none, and for more than memory holds of what is kept of each for the next plan."""
    from calibrate.data.samples import jsonl_samples, scene_samples

    if count < 1:
        raise InputError(f"--samples {count}", wanted="1 or more", do=f"--samples {DEFAULT_SAMPLES}")
    read = None if data is None else jsonl_samples(data, count=count)
    asked = count if read is None else len(read.samples)
    if not spread:
        check_memory(asked * _kept_bytes(bundle), f"{asked} samples", do=f"--samples {DEFAULT_SAMPLES}")
    return read or scene_samples(count, seed=seed, split="eval")


def _kept_bytes(bundle: Bundle) -> int:
    """Of each sample: its pixels, and the features that a vision graph of its own makes of them."""
    profile = bundle.profile()
    alone = any(graph.name == VISION for graph in bundle.graphs(profile.name))
    features = profile.image_tokens * bundle.spec.decoder.hidden_size if alone else 0
    return 4 * (math.prod(profile.pixel_input()) // profile.batch + features)


def _resizing(bundle: Bundle, resized: int) -> dict[str, Any]:
    """What is said of a model that takes any picture size, but was exported for one."""
    return {"image_size": bundle.profile().image_size, "resized": resized} if bundle.spec.vision.dynamic else {}


def _answers(
    asked: Mapping[str, tuple[str, Bundle]],
    chosen: SampleSet,
    opens: partial[BundleModel],
    report: Report | None,
) -> tuple[dict[str, Answers], int]:
    """What each (name, bundle) answers, by its key, and how many pictures were scaled.

    Small bundles are asked side by side, with a share of the threads each: small products gain little from a second
    thread. The samples of the first are shared out, which leaves what the vision graph made; then the others come.
    """
    (first, (name, bundle)), *others = asked.items()
    progress = _Progress(report, len(asked) * len(chosen.samples))
    workers, threads = _shares(bundle, len(others), opens.keywords["threads"])
    model = opens(bundle, threads=threads)
    questions = ask(model, chosen)

    def asks_part(samples: range) -> Answers:
        own = model if samples.start == 0 else opens(bundle, threads=threads)
        return answer(own, questions, progress.of(name), samples)

    def asks(entry: tuple[str, tuple[str, Bundle]]) -> tuple[str, Answers]:
        key, (name, bundle) = entry
        # Every picture went through the first one's vision graph by now.
        return key, answer(opens(bundle, threads=threads, beside=model), questions, progress.of(name))

    with ThreadPoolExecutor(workers) as pool:
        try:
            parts = pool.map(asks_part, _parts(len(chosen.samples), model.profile.batch, workers))
            answers = {first: joined(list(parts))}
            answers |= dict(pool.map(asks, others))
        except BaseException:  # Ctrl-C too: nobody waits for the plans that are under way
            progress.stopped = True
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return answers, questions.resized


def _parts(samples: int, batch: int, workers: int) -> list[range]:
    """The samples in whole batches, as evenly as they go among the workers."""
    size = -(-samples // (batch * workers)) * batch
    return [range(begin, min(begin + size, samples)) for begin in range(0, samples, size)]


def _shares(bundle: Bundle, count: int, threads: int | None) -> tuple[int, int | None]:
    """How many of `count` bundles are asked at a time, and with how many threads each."""
    available = threads or available_cores()
    small = sum(file.size for file in bundle.manifest.weights) <= SMALL_WEIGHTS
    workers = max(1, min(count, available)) if small else 1
    return (1, threads) if workers == 1 else (workers, available // workers)


class _Progress:
    """One count of answers for plans that are asked side by side."""

    def __init__(self, report: Report | None, total: int) -> None:
        self._report, self._total, self._done, self._lock = report, total, 0, threading.Lock()
        self.stopped = False  # who reports next ends there

    def of(self, name: str) -> Report:
        """For one plan, which tells how many of its own are answered."""
        before = 0

        def report(done: int, total: int, text: str = "") -> None:
            nonlocal before
            if self.stopped:
                raise CancelledError
            with self._lock:
                self._done += done - before
                before = done
                if self._report is not None:
                    self._report(self._done, self._total, name)

        return report


def _spread_answers(
    cluster: Cluster,
    asked: Mapping[str, tuple[str, Bundle]],
    chosen: SampleSet,
    opens: partial[BundleModel],
    report: Report | None,
    note: Note,
) -> tuple[dict[str, Answers], int]:
    """The same, a few batches at a time on the machines of a cluster."""
    from btp_export.measuring.spread_answers import answered

    bundles = {key: bundle for key, (_, bundle) in asked.items()}
    model = opens(next(iter(bundles.values())))
    questions = ask(model, chosen)
    parts = answered(
        cluster, bundles, questions.encoded, questions.room, batch=model.profile.batch, settings=opens.keywords,
        report=report, note=note,
    )  # fmt: skip
    return {key: Answers(bundles[key].plan, *part) for key, part in parts.items()}, questions.resized


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
