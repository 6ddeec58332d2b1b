"""What four-bit weights cost the demo: divergence from the full model on held-out pictures, plain rounding beside AWQ.

    python -m benchmarks.quantisation [--samples 96] [--calibration 32] > benchmarks/results/quantisation.md

KL(full, unpruned || pruned, four bits) in nats at every token of the full model's own answers, as the calibration
measures plans. The pictures that scales were searched on have another seed. Plans are calibrated on full weights.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from btp_export.model.defaults import default_profile, fitted_samples
from btp_export.model.open_model import Model, open_model
from btp_export.model.prompting import Prompter
from btp_export.planning.choose_plan import choose_plan
from btp_export.planning.study import CalibrationSettings, calibration_samples, model_inputs
from btp_export.quantising import quantise_model
from calibrate.measure.divergence import change
from calibrate.reference.answers import greedy_answers
from calibrate.reference.records import ReferenceInput
from calibrate.reference.streamed_model import StreamedReference
from graphs.records.plan import PruningPlan
from graphs.records.shapes import ShapeProfile

HELD_OUT = 5_000_011  # seed of pictures that no calibration draws
BUDGETS = {"22 %": 0.78, "11 %": 0.89}
WEIGHTS = (("int4", "rtn"), ("int4", "awq"), ("int4-g32", "rtn"), ("int4-g32", "awq"))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--calibration", type=int, default=64)
    options = parser.parse_args()
    model = open_model("demo")
    profile = default_profile(model)
    settings = CalibrationSettings(samples=options.calibration)
    plans = {"100 %": choose_plan(model, "none", settings, profile=profile)} | {
        name: choose_plan(model, "btp", replace(settings, compression=budget), profile=profile)
        for name, budget in BUDGETS.items()
    }
    held_out = _inputs(model, profile, options.samples)
    reference = StreamedReference(model.checkpoint)
    answers = greedy_answers(reference, held_out, plans["100 %"], tokens=8, ends=model.spec.eos_token_ids)
    answered = [
        replace(sample, new_tokens=tuple(answer[:-1])) for sample, answer in zip(held_out, answers, strict=True)
    ]
    full = [run.logits for run in reference.run(answered, plans["100 %"])]
    tokens = sum(map(len, answers))
    print(f"{len(answered)} held-out pictures, {tokens} tokens of answers; {options.calibration} others for plans.\n")
    print("| image tokens | weights | KL, nats a token | median picture | same token | whole answers |")
    print("|---|---|---|---|---|---|")
    for name, plan in plans.items():
        for label, weights in _weights(model, plan, settings, profile):
            runs = StreamedReference(weights.checkpoint).run(answered, plan)
            found = [change(logits, run.logits) for logits, run in zip(full, runs, strict=True)]
            kl = np.array([one.divergence for one in found])
            same, exact = (np.mean([getattr(one, key) for one in found]) for key in ("agreement", "exact"))
            print(
                f"| {name} | {label} | {kl.mean():.4f} | {np.median(kl):.5f} | {same:.1%} | {exact:.1%} |", flush=True
            )


def _inputs(model: Model, profile: ShapeProfile, count: int) -> list[ReferenceInput]:
    prompter = Prompter(model.source.folder, model.spec)
    chosen = calibration_samples(CalibrationSettings(samples=count, seed=HELD_OUT), prompter, None, profile.image_size)
    samples, _ = fitted_samples(chosen.samples, model.spec, profile)
    return model_inputs(model, prompter, profile, samples, None)


def _weights(
    model: Model, plan: PruningPlan, settings: CalibrationSettings, profile: ShapeProfile
) -> Iterator[tuple[str, Model]]:
    yield "the model's", model
    for weights, method in WEIGHTS:
        made = quantise_model(model, plan, settings, weights, profile=profile, method=method)
        print(f"{weights} {method}: {made.checkpoint.quantization}", file=sys.stderr)
        yield f"{weights}, {method}", made


if __name__ == "__main__":
    main()
