"""Verification of a bundle: its graphs and its free run against transformers' own modelling code, streamed by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btp_export.console import Phases
from btp_export.extras import require_docstrings
from btp_export.results.verification import AppliedGates, GateValues, GraphParity, Int8Rows, Verification, joined
from graphs import dtypes
from graphs.dtypes import Precision
from graphs.files.bundle import Bundle, tool_versions
from graphs.files.cache_folder import cache_folder
from graphs.files.resume import Work, digest, work_folder
from graphs.pruning import kept_tokens
from graphs.records.errors import CheckError, InputError
from graphs.records.progress import Note, Report
from graphs.records.reading import read_file
from graphs.records.shapes import ShapeProfile

if TYPE_CHECKING:
    from btp_export.running.logit_rules import LogitRules
    from btp_export.running.memory_fit import Streaming
    from calibrate.data.samples import Prepared, Sample
    from calibrate.reference.records import ReferenceInput, RunRecord
    from calibrate.reference.streamed_model import StreamedReference
    from engines.verify.gates import CheckResults, Gates
    from engines.verify.verification import FreeRun

DEFAULT_SAMPLES = 4
CHECKED_TOKENS = 8  # generated tokens of each sample that are compared
STREAMED_TOKENS = 3  # the same where every token takes a pass over all weights
PHASES = {"pictures": 1, "free run": 10, "reference": 10, "graphs": 10}  # shares of the time, roughly


def verify_bundle(
    bundle: Bundle,
    *,
    samples: int = DEFAULT_SAMPLES,
    tokens: int | None = None,
    seed: int = 0,
    profile: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    maths: Precision = "float32",
    target: str | None = None,
    cuda_graphs: bool = True,
    streaming: Streaming | None = None,
    report: Report | None = None,
    note: Note = lambda text: None,
) -> Verification:
    """Check a bundle's graphs, its kept tokens and its text at one shape profile, the first if none is named.

    With `target`, the engines of that device are checked in place of the bundle's graphs. Samples are generated scenes,
    of which `tokens` generated tokens are compared (None: 8, or 3 where the graphs are streamed). `device` is cpu, cuda
    or auto: a GPU if there is one. `maths` is the reference's. Everything the reference needs lies in the bundle.

    Graphs that would not fit in memory together are opened one layer at a time; such a run leaves checkpoints in the
    cache folder, and `note` is told when it goes on from them. `streaming` says when and how (None: as suits a
    workstation). Raises InputError for a bundle that cannot be opened or run, or too little memory; what merely does
    not hold is in the document.
    """
    _check_counts(samples, tokens)
    require_docstrings()
    from btp_export.model.check_spec import check_spec
    from btp_export.running.memory_fit import Streaming, must_stream
    from btp_export.running.opening import open_graphs
    from calibrate.reference.decoder import torch_device
    from engines.runners.onnxruntime import onnxruntime_device

    streaming, chosen = streaming or Streaming(), bundle.profile(profile)
    check_spec(bundle)
    place = torch_device(device)
    graph_device = "cpu" if target else onnxruntime_device(device)
    loader, files = open_graphs(
        bundle,
        chosen.name,
        threads=threads,
        device=graph_device,
        target=target,
        cuda_graphs=cuda_graphs,
        note=note,
        activations="float32",  # exact: what rows in int8 change is not the graphs' fault
        check="full",
    )
    streamed = target is None and must_stream(files, graph_device, above=streaming.above)
    if streamed:
        _check_room(bundle, chosen, samples)
    room = min(tokens or (STREAMED_TOKENS if streamed else CHECKED_TOKENS), chosen.new_tokens)
    how, phases = streaming if streamed else None, Phases(report, PHASES)
    job = _Job(bundle, chosen, samples, room, seed, loader, files, how, place, maths, phases)
    with _work(job, note) as work:
        found = _verify(job, work)
    verified = _document(job, found.checks, tokens_equal=found.tokens_equal, target=target)
    int8 = verified.activations is not None and not streamed and found.answered
    return _with_int8_rows(verified, job, threads) if int8 else verified


def _check_room(bundle: Bundle, profile: ShapeProfile, samples: int) -> None:
    """Raise InputError unless memory holds what a streamed verification keeps of its samples."""
    from btp_export.running.memory_fit import streaming_bytes
    from graphs.files.memory import check_memory

    needed = streaming_bytes(bundle, profile.name, samples)
    check_memory(needed, f"verifying {bundle.spec.name} layer by layer", do="close other programs, or --samples 1")


def _document(job: _Job, findings: CheckResults, *, tokens_equal: bool, target: str | None) -> Verification:
    from btp_export.running.opening import activations_in

    def gates_of(gates: Gates) -> dict[str, float]:
        return {"cosine": gates.cosine, "norm_ratio_within": gates.norm}

    return Verification(
        passed=tokens_equal and not findings.failures,
        graphs=tuple(
            GraphParity(
                name=check.name,
                profile=job.profile.name,
                cosine=check.cosine,
                norm_ratio=check.norm_ratio,
                max_abs=check.max_abs,
                worst=check.worst,
                gates=GateValues(**gates_of(check.gates)),
            )
            for check in findings.graphs
        ),
        kept_agreement=tuple(findings.kept_agreement()),
        tokens_equal=tokens_equal,
        samples=job.samples,
        tokens=job.tokens,
        profile=job.profile.name,
        profiles=(job.profile.name,),
        engine=target,
        streamed=job.streamed,
        maths=job.maths,
        precision=job.bundle.manifest.build.precision,
        computed_in=job.computed,
        dummy_weights=job.bundle.manifest.model.dummy_weights,
        gates=AppliedGates(
            **gates_of(findings.gates),
            kept_agreement=findings.gates.agreement,
            free_run_agreement=findings.free.agreement,
        ),
        failures=tuple(findings.failures),
        near_ties=tuple(findings.near_ties),
        activations=activations_in(job.bundle, "float32", target),
    )


def verify_profiles(
    bundle: Bundle, *, profile: str | None = None, report: Report | None = None, **settings: Any
) -> Verification:
    """`verify_bundle` of that profile, or of all one after another, in one document."""
    names = [each.name for each in bundle.manifest.profiles] if profile is None else [profile]
    phases = Phases(report, dict.fromkeys(names, 1))
    return joined(
        {
            name: verify_bundle(
                bundle, profile=name, report=phases.named(name) if len(names) > 1 else report, **settings
            )
            for name in names
        }
    )


def _check_counts(samples: int, tokens: int | None) -> None:
    if samples < 1:
        raise InputError(f"--samples {samples}", wanted="1 or more", do="--samples 4")
    if tokens is not None and tokens < 1:
        raise InputError(f"--tokens {tokens}", wanted="1 or more", do="--tokens 3")


@dataclass(frozen=True)
class _Job:
    """What is verified and how."""

    bundle: Bundle
    profile: ShapeProfile
    samples: int
    tokens: int
    seed: int
    loader: Any
    files: dict[str, Path]
    streaming: Streaming | None  # None where all graphs are open at once
    device: str  # of the reference
    maths: Precision
    phases: Phases

    @property
    def streamed(self) -> bool:
        """Whether graphs are opened part by part."""
        return self.streaming is not None

    @property
    def computed(self) -> Precision:
        """What the decoder graphs compute in: streamed on a CPU, bfloat16 is widened
        (graphs/building/graph_parts.py).
        """
        precision = self.bundle.manifest.build.precision
        wide = self.streamed and self.loader.device == "cpu" and precision == "bfloat16"
        return "float32" if wide else precision


@contextlib.contextmanager
def _work(job: _Job, note: Note) -> Iterator[Work | None]:
    """Where a streamed run keeps its checkpoints: by the bundle's hash of hashes, and what is run."""
    if job.streaming is None:
        yield None
        return
    manifest = read_file(job.bundle.root / "manifest.json")
    settings = [job.samples, job.tokens, job.seed, job.profile.name, job.device, job.maths, job.loader.device]
    key = digest(manifest, settings, tool_versions())
    with work_folder(cache_folder("work"), key, note, interval=job.streaming.interval) as work:
        yield work


@dataclass(frozen=True)
class _Found:
    """What the graphs gave, whether they answered at all, and whether the tokens were the reference's."""

    checks: CheckResults
    answered: bool
    tokens_equal: bool


def _verify(job: _Job, work: Work | None) -> _Found:
    from calibrate.reference.streamed_model import StreamedReference
    from engines.verify.streamed_graphs import Shares, StreamedRunner
    from engines.verify.verification import verify_free, verify_graphs

    plan, precision = job.bundle.plan_for(job.profile.name), job.bundle.manifest.build.precision
    samples, prepared = _prepared(job)
    free, silence = _free_run(job, samples, work)
    inputs = _with_new_tokens(prepared, free, job.tokens)
    checkpoint = job.bundle.checkpoint()
    reference = StreamedReference(checkpoint, dtype=dtypes.BY_NAME[job.maths].torch, device=job.device, work=work)
    runs = reference.run(inputs, plan, record_segments=True, progress=job.phases.named("reference"))
    forced = None if free is None else _forced_where_needed(reference, inputs, runs, free)
    progress = job.phases.named("graphs")
    openers = {name: partial(job.loader, file) for name, file in job.files.items()}
    if job.streaming is not None:
        shares, part_bytes = Shares(list(job.files.values()), progress), job.streaming.part_bytes
        openers = {
            name: partial(StreamedRunner, file, job.loader, most=part_bytes, progress=shares.of(number))
            for number, (name, file) in enumerate(job.files.items())
        }
    findings = verify_graphs(
        openers,
        plan,
        job.profile,
        precision,
        _verify_samples(prepared, runs),
        computed=job.computed,
        steps=work.sequence("graphs") if work is not None else None,
        progress=None if job.streamed else progress,
    )
    if free is None:
        findings.failures.append(silence)
        return _Found(findings, answered=False, tokens_equal=False)
    equal = verify_free(findings, plan, runs, free, forced, _rules(job, prepared))
    return _Found(findings, answered=True, tokens_equal=equal)


def _with_new_tokens(prepared: Sequence[Prepared], free: Sequence[FreeRun] | None, tokens: int) -> list[ReferenceInput]:
    """What the reference runs: every free token but the last is appended, the row of each then predicts the next one.

    Without a free run it is the prompt's last token again and again: the decode graph is compared on any tokens.
    """
    if free is None:
        return [replace(one.input, new_tokens=(int(one.input.input_ids[-1]),) * (tokens - 1)) for one in prepared]
    return [replace(one.input, new_tokens=tuple(run.tokens[:-1])) for one, run in zip(prepared, free, strict=True)]


def _rules(job: _Job, prepared: Sequence[Prepared]) -> list[LogitRules]:
    """What the checkpoint's generation settings do to the logits of each sample."""
    from btp_export.running.logit_rules import LogitRules

    spec = job.bundle.spec
    prompts = [sample.input.input_ids.tolist() for sample in prepared]
    return [LogitRules(spec.generation, spec.eos_token_ids, prompt, job.tokens) for prompt in prompts]


def _prepared(job: _Job) -> tuple[list[Sample], list[Prepared]]:
    """The samples at the profile's size, and as the reference takes them: with features of transformers' own tower."""
    from btp_export.families import family_of
    from btp_export.model.defaults import fitted_samples
    from btp_export.model.prompting import Prompter
    from calibrate.data.samples import prepare, scene_samples

    bundle, spec = job.bundle, job.bundle.spec
    scenes = scene_samples(job.samples, seed=job.seed, split="calibration").samples
    samples, _ = fitted_samples(scenes, spec, job.profile)
    attention = bundle.plan_for(job.profile.name).needs_class_attention
    vision = family_of(spec).vision_module(bundle.checkpoint(), job.profile.image_size, class_attention=attention)
    return samples, prepare(samples, Prompter(bundle.processor, spec), vision, progress=job.phases.named("pictures"))


def _free_run(job: _Job, samples: Sequence[Sample], work: Work | None) -> tuple[list[FreeRun] | None, str]:
    """What the bundle answers on its own; None and why where it cannot, as with logits that are not finite.

    The error would advise to verify: which graph it is shows when each is compared by itself.
    """
    from engines.runners.cuda import CudaError

    try:
        if job.streaming is None:
            return _answers(job, samples), ""
        return _streamed_answers(job, samples, work, job.streaming), ""
    except CudaError:  # the GPU's fault, and no graph runs on it any more
        raise
    except CheckError as error:
        return None, f"the free run could not be made: {error.got}"


def _answers(job: _Job, samples: Sequence[Sample]) -> list[FreeRun]:
    """The free run with all graphs open."""
    from btp_export.running.runtime import BundleModel
    from engines.verify.verification import FreeRun

    model = BundleModel(job.bundle, job.loader, profile=job.profile.name, graphs=job.files)
    free = []
    for answer in model.generate(
        [sample.image for sample in samples], [sample.prompt for sample in samples], max_new_tokens=job.tokens
    ):
        free.append(FreeRun(answer.token_ids, answer.kept))
    return free


def _with_int8_rows(verified: Verification, job: _Job, threads: int | None) -> Verification:
    """How far int8 rows are off is said and not judged: it is ONNX Runtime's choice of speed, not the graphs'.

    That there are answers at all is judged: `run` takes them so.
    """
    try:
        return verified.model_copy(update={"int8_rows": _int8_rows(job, threads)})
    except CheckError as error:
        failures = (*verified.failures, f"the free run with int8 rows could not be made: {error.got}")
        return verified.model_copy(update={"passed": False, "failures": failures})


def _int8_rows(job: _Job, threads: int | None) -> Int8Rows:
    from btp_export.measuring.rounding import compare_rows
    from btp_export.model.defaults import fitted_samples
    from calibrate.data.samples import scene_samples

    scenes = scene_samples(job.samples, seed=job.seed, split="calibration").samples
    samples, _ = fitted_samples(scenes, job.bundle.spec, job.profile)
    images, prompts = [sample.image for sample in samples], [sample.prompt for sample in samples]
    return compare_rows(job.bundle, images, prompts, profile=job.profile.name, tokens=job.tokens, threads=threads)


def _streamed_answers(job: _Job, samples: Sequence[Sample], work: Work | None, streaming: Streaming) -> list[FreeRun]:
    """The free run with one part of a graph open."""
    from btp_export.model.prompting import Prompter
    from btp_export.running.streamed_run import free_runs

    prompter = Prompter(job.bundle.processor, job.bundle.spec)
    return free_runs(
        job.bundle,
        job.profile.name,
        job.files,
        prompter.encode(
            [sample.image for sample in samples], [sample.prompt for sample in samples], profile=job.profile
        ),
        job.loader,
        tokens=job.tokens,
        part_bytes=streaming.part_bytes,
        steps=work.sequence("tokens") if work is not None else None,
        progress=job.phases.named("free run"),
    )


def _forced_where_needed(
    reference: StreamedReference, inputs: list[Any], runs: list[RunRecord], free: list[FreeRun]
) -> list[RunRecord] | None:
    """Reference runs forced to the bundle's kept sets, if they differ anywhere and can be forced."""
    from engines.verify.verification import same_kept

    if all(same_kept(run, own) for run, own in zip(runs, free, strict=True)):
        return None
    keeps = [stage.keep for stage in runs[0].plan.stages]
    if any([len(kept) for kept in own.kept] != keeps for own in free):
        return None
    forced = [[indices.tolist() for indices in kept_tokens.relative(run.kept)] for run in free]
    return reference.run(inputs, runs[0].plan, forced_kept=forced)


def _verify_samples(prepared: list[Prepared], runs: list[RunRecord]) -> list[Any]:
    from engines.verify.verification import VerifySample

    return [
        VerifySample(
            sample.pixel_values,
            sample.input.image_features.float().numpy(),
            run,
            None if sample.input.class_attention is None else sample.input.class_attention.float().numpy(),
        )
        for sample, run in zip(prepared, runs, strict=True)
    ]
