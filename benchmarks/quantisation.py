"""What four-bit weights cost the demo, plain rounding beside AWQ: divergence on held-out pictures, and accuracy.

    python -m benchmarks.quantisation [--samples 96] [--of 960] [--calibration 64] [--plan btp] > divergence.md
    python -m benchmarks.quantisation --questions 1000 > accuracy.md
    python -m benchmarks.quantisation --full-size 3 > cost.md

benchmarks/results/quantisation.md holds them. Divergence is KL in nats at every token of the full model's own answers,
as the calibration measures plans; pictures have another seed than those that scales were searched on. Nearly all of a
mean comes from the few pictures whose answer is near a turn, so `--of` draws so many and takes those of whose answers
the full model is least sure: a mean says something then. Its interval is of 4,000 draws with repetition. Accuracy is
exact match through the exported graphs. Plans are calibrated on full weights. The last is what searching the codes of
LLaVA-1.5-7B's shapes costs: each layer's seconds and the highest memory so far, for as many layers of dummy weights.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.memory import memory
from btp_export.dummy.checkpoints import dummy_checkpoint
from btp_export.exporting import Options, export_bundle
from btp_export.measuring.evaluate import ScoredEvaluation, evaluate_plans
from btp_export.model.defaults import default_profile, fitted_samples
from btp_export.model.open_model import Model, open_model
from btp_export.model.prompting import Prompter
from btp_export.planning.calibration_settings import CalibrationSettings
from btp_export.planning.choose_plan import choose_plan
from btp_export.planning.study import calibration_samples, model_inputs
from btp_export.quantising import quantise_model
from calibrate.measure.accuracy import paired
from calibrate.measure.divergence import divergence
from calibrate.reference.answers import greedy_answers
from calibrate.reference.records import ReferenceInput
from calibrate.reference.streamed_model import StreamedReference
from graphs.records.plan import PruningPlan
from graphs.records.shapes import ShapeProfile

HELD_OUT = 5_000_011  # seed of pictures that no calibration draws
BUDGETS = {"22 %": 0.78, "11 %": 0.89}
ALL = "100 %"
WEIGHTS = (("int4", "rtn"), ("int4", "awq"), ("int4-g32", "rtn"), ("int4-g32", "awq"))


def main() -> None:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=96, help="held-out pictures")
    parser.add_argument("--of", type=int, help="draw so many, and measure on the samples that are the least sure")
    parser.add_argument("--calibration", type=int, default=64, help="pictures of plans and, up to 32, of scales")
    parser.add_argument("--plan", default="btp", help="btp, or a preset, which is calibrated on nothing")
    parser.add_argument("--questions", type=int, help="measure accuracy on so many questions instead")
    parser.add_argument("--full-size", type=int, help="measure time and memory of the search on so many layers instead")
    options = parser.parse_args()
    if options.full_size is not None:
        _full_size(options.full_size)
        return
    model = open_model("demo")
    profile = default_profile(model)
    settings = CalibrationSettings(samples=options.calibration)
    plans = {ALL: choose_plan(model, "none", settings, profile=profile)} | {
        name: choose_plan(model, options.plan, replace(settings, compression=budget), profile=profile)
        for name, budget in BUDGETS.items()
    }
    print(f"Plans: {options.plan}, calibrated on {options.calibration} pictures. ", end="")
    if options.questions is None:
        _divergence(model, plans, settings, profile, options.samples, options.of or options.samples)
    else:
        _accuracy(model, plans, settings, profile, options.questions)


def _divergence(
    model: Model,
    plans: Mapping[str, PruningPlan],
    settings: CalibrationSettings,
    profile: ShapeProfile,
    samples: int,
    drawn: int,
) -> None:
    """Means over pictures; the last columns hold the search against rounding: the share of pictures on which it is
    nearer, and its mean as a share of rounding's.
    """
    answered = _answered(model, plans[ALL], profile, drawn)
    full = _logits(model, answered, plans[ALL])
    chosen = sorted(np.argsort([_surest(logits) for logits in full], kind="stable")[:samples])
    answered, full = [answered[place] for place in chosen], [full[place] for place in chosen]
    kind = f", of {drawn} those of whose answers the model is least sure" if drawn > samples else ""
    print(f"{samples} held-out pictures{kind}, {sum(map(len, full))} tokens of answers; {settings.samples} others.\n")
    print(
        "| tokens | weights | KL to the full model | KL to the same plan with full weights | median | nearer | mean |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    for name, plan in plans.items():
        own = _logits(model, answered, plan)
        print(f"| {name} | the model's | {_mean(_divergences(full, own)):.2e} | 0 | 0 | | |", flush=True)
        plain: list[float] = []
        for label, made in _weights(model, plan, settings, profile):
            logits = _logits(made, answered, plan)
            added = _divergences(own, logits)
            against = _against(added, plain) if plain else " | "
            plain = [] if plain else added
            numbers = f"{_mean(_divergences(full, logits)):.2e} | {_mean(added):.2e} | {np.median(added):.1e}"
            print(f"| {name} | {label} | {numbers} | {against} |", flush=True)


def _surest(logits: np.ndarray) -> float:
    """How sure a model is of the token of an answer [n,vocab] that it is least sure of."""
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return float((shares.max(-1) / shares.sum(-1)).min())


def _against(added: Sequence[float], plain: Sequence[float]) -> str:
    """On how many pictures the first are less than the second, and the ratio of the means with its interval of 95 %."""
    first, second = np.array(added), np.array(plain)
    drawn = np.random.default_rng(0).integers(0, len(first), (4000, len(first)))
    low, high = np.percentile(first[drawn].mean(1) / second[drawn].mean(1), [2.5, 97.5])
    return f"{np.mean(first < second):.0%} | {first.mean() / second.mean():.2f} ({low:.2f} to {high:.2f})"


def _answered(model: Model, unpruned: PruningPlan, profile: ShapeProfile, count: int) -> list[ReferenceInput]:
    """Held-out prompts with the full model's own answers."""
    prompter = Prompter(model.source.folder, model.spec)
    chosen = calibration_samples(CalibrationSettings(samples=count, seed=HELD_OUT), prompter, None, profile.image_size)
    samples, _ = fitted_samples(chosen.samples, model.spec, profile)
    inputs = model_inputs(model, prompter, profile, samples, None)
    answers = greedy_answers(
        StreamedReference(model.checkpoint), inputs, unpruned, tokens=8, ends=model.spec.eos_token_ids
    )
    return [replace(sample, new_tokens=tuple(answer[:-1])) for sample, answer in zip(inputs, answers, strict=True)]


def _logits(model: Model, inputs: Sequence[ReferenceInput], plan: PruningPlan) -> list[np.ndarray]:
    return [run.logits for run in StreamedReference(model.checkpoint).run(inputs, plan)]


def _divergences(full: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> list[float]:
    return [divergence(one, two) for one, two in zip(full, other, strict=True)]


def _mean(numbers: Sequence[float]) -> float:
    return float(np.mean(numbers))


def _weights(
    model: Model, plan: PruningPlan, settings: CalibrationSettings, profile: ShapeProfile
) -> Iterator[tuple[str, Model]]:
    """Rounding and AWQ in turn."""
    for weights, method in WEIGHTS:
        made = quantise_model(model, plan, settings, weights, profile=profile, method=method)
        print(f"{weights} {method}: {made.checkpoint.quantization}", file=sys.stderr)
        yield f"{weights}, {method}", made


def _accuracy(
    model: Model, plans: Mapping[str, PruningPlan], settings: CalibrationSettings, profile: ShapeProfile, count: int
) -> None:
    """float32 beside int4-g32, each plan with the weights that were searched for it."""
    print(f"{count} held-out questions; `--weights int4-g32`, rows rounded to int8, beside float32.\n")
    print("| tokens | float32 | kept | int4-g32 | kept | right only in float32, only in int4 | p |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        full = _evaluated(model, list(plans.items()), Path(folder) / "full", count)
        best = full.evaluation.full_accuracy
        for number, (name, plan) in enumerate(plans.items()):
            made = quantise_model(model, plan, settings, "int4-g32", profile=profile)
            packed = _evaluated(made, [(name, plan)], Path(folder) / f"int4-{number}", count)
            against = paired(full.hits[number], packed.hits[0])
            accuracies = [full.evaluation.rows[number].accuracy, packed.evaluation.rows[0].accuracy]
            columns = " | ".join(f"{accuracy:.3f} | {accuracy / best:.1%}" for accuracy in accuracies)
            only = f"{against.first_only}, {against.second_only}"
            print(f"| {name} | {columns} | {only} | {against.p_value:.2f} |", flush=True)


def _full_size(layers: int) -> None:
    """The search as for published weights, which dummy weights are spared otherwise, with a plan that prunes first."""
    model = open_model(str(dummy_checkpoint("llava-1.5-7b", layers=layers)))
    profile = default_profile(model)
    plan = choose_plan(model, "scope", CalibrationSettings(), profile=profile)
    print("| layer | s since the last | peak, GB | processor time, s |\n|---|---|---|---|", flush=True)
    ends: list[tuple[float, float]] = [(time.perf_counter(), time.process_time())]

    def report(done: int, total: int, doing: str) -> None:
        wall, busy = time.perf_counter(), time.process_time()
        peak = memory()["VmHWM"] * 2**20 / 1e9
        seconds = f"{wall - ends[-1][0]:.0f} | {peak:.2f} | {busy - ends[-1][1]:.0f}"
        print(f"| {doing}, {done} of {total} | {seconds} |", flush=True)
        ends.append((wall, busy))

    quantise_model(model, plan, CalibrationSettings(), "int4", profile=profile, method="awq", report=report)
    report(layers, layers, "done")


def _evaluated(model: Model, planned: Sequence[tuple[str, PruningPlan]], out: Path, count: int) -> ScoredEvaluation:
    bundle = export_bundle(model, planned[-1][1], out, Options())
    return evaluate_plans(bundle, planned, samples=count, seed=1)


if __name__ == "__main__":
    main()
