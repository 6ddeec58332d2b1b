"""Verification of a bundle: its graphs and its free run against transformers' own modelling code, streamed by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from btp_export.console import Report
from graphs.bundle import Bundle
from graphs.errors import InputError

if TYPE_CHECKING:
    from btp_export.runtime import BundleModel
    from calibrate.data import Prepared
    from calibrate.records import RunRecord
    from calibrate.reference import StreamedReference
    from engines.verification import FreeRun

DEFAULT_SAMPLES = 4
CHECKED_TOKENS = 8  # generated tokens of each sample that are compared


def verify_bundle(
    bundle: Bundle,
    *,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    profile: str | None = None,
    threads: int | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """The contract's document: `passed`, `graphs`, `kept_agreement`, `tokens_equal`, and what did not hold.

    Samples are generated scenes. Everything the reference needs lies in the bundle. Raises InputError for a bundle
    that cannot be opened or run; what merely does not hold is in the document.
    """
    if samples < 1:
        raise InputError(f"--samples {samples}", wanted="1 or more", do="--samples 4")
    from btp_export.runtime import load
    from calibrate.reference import StreamedReference
    from engines.runners.onnxruntime import OrtLoader
    from engines.verification import GATES, verify_free, verify_graphs

    chosen = bundle.profile(profile)
    precision, loader = bundle.manifest.build.precision, OrtLoader(threads=threads)
    model = load(bundle, profile=chosen.name, threads=threads)
    prepared, free = _free_runs(bundle, model, samples, seed)
    del model  # from here on one layer or one graph is open at a time
    # Every free token but the last is appended: the row of each then predicts the next one.
    inputs = [replace(one.input, new_tokens=tuple(run.tokens[:-1])) for one, run in zip(prepared, free, strict=True)]
    reference = StreamedReference(bundle.checkpoint())
    runs = reference.run(inputs, bundle.plan, record_segments=True, progress=_phase(report, "reference"))
    forced = _forced_where_needed(reference, inputs, runs, free)
    findings = verify_graphs(
        {graph.name: partial(loader, bundle.root / graph.file) for graph in bundle.graphs(chosen.name)},
        bundle.plan,
        chosen,
        precision,
        _verify_samples(prepared, runs),
        progress=report,
    )
    tokens_equal = verify_free(findings, bundle.plan, precision, runs, free, forced)
    gates = GATES[precision]
    return {
        "passed": tokens_equal and not findings.failures,
        "graphs": [check.as_json() for check in findings.graphs],
        "kept_agreement": findings.kept_agreement(),
        "tokens_equal": tokens_equal,
        "samples": samples,
        "profile": chosen.name,
        "precision": precision,
        "gates": {"cosine": gates.cosine, "norm_ratio_within": gates.norm, "kept_agreement": gates.agreement},
        "failures": findings.failures,
        "near_ties": findings.near_ties,
    }


def _free_runs(bundle: Bundle, model: BundleModel, samples: int, seed: int) -> tuple[list[Prepared], list[FreeRun]]:
    from btp_export.families import family_for
    from calibrate.data import prepare, scene_samples
    from engines.verification import FreeRun

    checkpoint = bundle.checkpoint()
    chosen = scene_samples(samples, seed=seed, split="calibration").samples
    prepared = prepare(chosen, model.prompter, family_for(checkpoint.config).vision_module(checkpoint))
    room = min(CHECKED_TOKENS, model.profile.new_tokens)
    answers = model.generate([one.image for one in chosen], [one.prompt for one in chosen], max_new_tokens=room)
    free = []
    for answer in answers:
        kept = iter(answer.kept)
        stages: list[Any] = [next(kept) if stage.keep else [] for stage in bundle.plan.stages]
        free.append(FreeRun(answer.token_ids, stages))
    return prepared, free


def _forced_where_needed(
    reference: StreamedReference, inputs: list[Any], runs: list[RunRecord], free: list[FreeRun]
) -> list[RunRecord] | None:
    """Reference runs forced to the bundle's kept sets, if they differ anywhere and can be forced."""
    from engines.verification import same_kept

    if all(same_kept(run, mine) for run, mine in zip(runs, free, strict=True)):
        return None
    keeps = [stage.keep for stage in runs[0].plan.stages]
    if any([len(kept) for kept in mine.kept] != keeps for mine in free):
        return None
    return reference.run(inputs, runs[0].plan, forced_kept=[_relative(mine) for mine in free])


def _relative(free: FreeRun) -> list[list[int]]:
    """Kept tokens of each stage as indices among those the stage chose from."""
    relative: list[list[int]] = []
    before: list[int] | None = None
    for kept in free.kept:
        absolute = [int(token) for token in kept]
        relative.append(absolute if before is None else [before.index(token) for token in absolute])
        before = absolute
    return relative


def _verify_samples(prepared: list[Prepared], runs: list[RunRecord]) -> list[Any]:
    from engines.verification import VerifySample

    return [
        VerifySample(one.pixel_values, one.input.image_features.float().numpy(), run)
        for one, run in zip(prepared, runs, strict=True)
    ]


def _phase(report: Report | None, text: str) -> Callable[[int, int], None] | None:
    return None if report is None else lambda done, total: report(done, total, text)
