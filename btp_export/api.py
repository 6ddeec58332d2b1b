"""The functions that `import btp_export` offers: what the commands do, with Python values in and out.

Each opens what it is given by name, does what the command of that name does and gives the command's document
(btp_export/results/) or the object that was made. Nothing is printed; `report` is told how far long work is and `note`
what a user should know. What cannot be done raises InputError, CheckError or UnavailableError.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, get_type_hints

from btp_export import bounds
from btp_export.arguments import check_arguments, checked
from btp_export.extras import CPU, DEVICE, EXPORT, naming
from graphs.dtypes import Precision
from graphs.files.atomic import Link
from graphs.files.bundle import Bundle
from graphs.records.errors import InputError
from graphs.records.plan import Importance, PruningPlan, SpatialMetric
from graphs.records.progress import Note, Report
from graphs.records.stored_weights import Activations, Weights

if TYPE_CHECKING:
    from btp_export.results.engines import BuildResult
    from btp_export.results.evaluation import Evaluation
    from btp_export.results.timing import Bench
    from btp_export.results.verification import Verification
    from btp_export.running.runtime import BundleModel

PathLike = Path | str
Item = TypeVar("Item")


@dataclass(frozen=True)
class Shape:
    """Shapes for which graphs are made, all static; None is the model's default. Raises InputError for other values.

    Args:
        batch: samples at a time.
        text: room for the prompt after the image, in tokens.
        new: room for generated tokens.
        image: height and width of the pictures in pixels.
    """

    batch: int = 1
    text: int | None = None
    new: int | None = None
    image: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        sizes = {"batch": bounds.BATCHES, "text": bounds.TOKENS, "new": bounds.TOKENS}
        check_arguments("Shape", vars(self), get_type_hints(Shape), sizes)

    def __str__(self) -> str:
        """As the command line writes it: batch=2,text=64,new=128,image=336x672."""
        size = None if self.image is None else f"{self.image[0]}x{self.image[1]}"
        parts = {"batch": self.batch, "text": self.text, "new": self.new, "image": size}
        return ",".join(f"{name}={value}" for name, value in parts.items() if value is not None)


@naming(CPU)
@checked(threads=bounds.THREADS)
def load(
    bundle: Bundle | PathLike,
    *,
    profile: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    target: str | None = None,
    activations: Activations = "int8",
    cuda_graphs: bool = True,
    engine: str | None = None,
    note: Note = lambda text: None,
) -> BundleModel:
    """Open a bundle for running: `load("b").generate("cat.png", "what is it?")[0].text`.

    Args:
        bundle: its folder, or an opened Bundle.
        profile: name of a shape profile; the first if left out.
        threads: threads inside an operator; all cores if left out. Engines have none. A model may be called by several
            threads: one call runs at a time, the others wait. Load it twice to run two at once.
        device: where ONNX Runtime computes: "cpu", "cuda", "cuda:<number>" or "auto", a GPU if any;
            engines run on the first GPU.
        target: run the engines built for this device in place of the graphs.
        activations: what a CPU multiplies four-bit weights with: rows rounded to "int8" (fast), or "float32" rows.
        cuda_graphs: replay a prefill and a decode step of engines as CUDA graphs; `note` is told where that cannot be.
        engine: the former name of `target`.
    """
    from btp_export.running import runtime

    if engine is not None:
        warnings.warn("load(engine=...) is called load(target=...) now", DeprecationWarning, stacklevel=2)
    chosen = target or engine
    return runtime.load(
        _opened(bundle),
        profile=profile,
        threads=threads,
        device=device,
        target=chosen,
        activations=activations,
        cuda_graphs=cuda_graphs,
        note=note,
    )


@naming(EXPORT)
@checked()
def export(
    model: PathLike,
    *,
    out: PathLike,
    plan: PruningPlan | PathLike = "btp",
    compression: float | None = None,
    shapes: Sequence[Shape] = (),
    opset: int = 23,
    precision: Precision | None = None,
    assemble: Literal["segments", "whole"] = "segments",
    link: Link = "auto",
    weights: Weights = "model",
    system: str | None = None,
    force: bool = False,
    report: Report | None = None,
    note: Note = lambda text: None,
) -> Bundle:
    """Export a model with a pruning plan to a bundle of ONNX graphs, which appears at `out` whole or not at all.

    Args:
        model: "demo", a name such as "llava-1.5-7b", a checkpoint folder, or a hub id.
        out: the bundle's folder.
        plan: "btp" calibrates, as `calibrate` does without settings; else a preset's name, a plan file, or a Plan.
        compression: share of image tokens to save, for "btp" and presets.
        shapes: a shape profile for each; the model's default shape without.
        opset: 23 has fused operators, 18 primitives only.
        precision: the model's own if left out; float32 for the demo.
        assemble: the prefill as segments, or as one whole graph.
        link: weights as hard links, copies, or links for the big ones ("auto").
        weights: "int4" puts the decoder's matrices into four bits in groups of 128, "int4-g32" and "int4-g64" in
            smaller ones, with scales searched on the calibration's pictures.
        system: a message that every prompt begins with; what the chat template writes by itself without.
        force: replace a bundle at `out`.
    """
    from btp_export.exporting import Options, check_plan, check_target, export_bundle
    from btp_export.model.open_model import open_model
    from btp_export.planning.calibration_settings import CalibrationSettings
    from btp_export.planning.choose_plan import choose_plan, files_read
    from btp_export.quantising import check_weights, quantise_model

    options = Options(
        profiles=tuple(str(shape) for shape in shapes), opset=opset, precision=precision, assemble=assemble, link=link
    )
    opened = open_model(str(model), system=system, weights=weights, report=report)
    folder = Path(out)
    check_weights(opened, weights)
    settings = CalibrationSettings(compression=compression)
    reads = [] if isinstance(plan, PruningPlan) else files_read(str(plan), settings)
    profiles = check_target(opened, folder, options, force=force, reads=reads)
    if isinstance(plan, PruningPlan):
        if compression is not None:
            raise InputError("compression with a Plan", wanted="one of them", do="leave compression out")
        chosen = plan
    else:
        chosen = choose_plan(opened, str(plan), settings, profile=profiles[0], report=report, note=note)
    if weights != "model":
        first = check_plan(opened, chosen, profiles)[0]
        opened = quantise_model(opened, first, settings, weights, profile=profiles[0], report=report, note=note)
    return export_bundle(opened, chosen, folder, options, force=force, profiles=profiles, report=report, note=note)


@naming(EXPORT)
@checked(samples=bounds.CALIBRATION_SAMPLES, answer_tokens=bounds.ANSWER_TOKENS, seed=bounds.SEEDS)
def calibrate(
    model: PathLike,
    *,
    compression: float | None = None,
    keep: Sequence[int] | None = None,
    latency_share: float | None = None,
    latency_from: PathLike | None = None,
    target: str | None = None,
    weights: Literal["model", "int4"] = "model",
    images: str | None = None,
    mix: str | None = None,
    prompts: PathLike | None = None,
    samples: int | None = None,
    image_size: tuple[int, int] | None = None,
    system: str | None = None,
    tune: bool = False,
    importance: Importance = "last-token",
    spatial_metric: SpatialMetric = "euclidean",
    rebalance: bool = True,
    spatial: bool = True,
    stages: Sequence[int] | None = None,
    balance: Sequence[float] | None = None,
    answer_tokens: int = 16,
    kind_bound: float | None = None,
    drop_bound: float | None = None,
    tau: float | None = None,
    cache: bool = True,
    seed: int = 0,
    device: str = "auto",
    maths: Precision = "float32",
    ray: str | None = None,
    report: Report | None = None,
    note: Note = lambda text: None,
) -> PruningPlan:
    """Measure on a few pictures where image tokens can be pruned, and make the balanced plan.

    The budget is one of `compression`, `keep` and `latency_share`, else a compression of 0.78; what each setting does
    is in docs/plans.md, under the option of the same name.

    Args:
        model: "demo", a name such as "llava-1.5-7b", a checkpoint folder, or a hub id.
        compression: share of image tokens to save, mean over the layers.
        keep: tokens kept by each stage.
        latency_share: the prefill's cost as a share of the unpruned prefill's.
        latency_from: a file of `bench` or `profile` that the cost is taken from.
        target: a device whose limits the cost follows; the plan keeps what costs it no time.
        images: a folder, a JSONL file or hf:owner/name; drawn pictures without.
        mix: shares of the drawn kinds, such as "scenes=0.5,reading=0.5".
        samples: how many; 64, with `tune` 128.
        image_size: height and width in pixels to calibrate at; the model's own without.
        system: a message that every prompt begins with, as for `export`.
        ray: address of a Ray cluster that the samples are spread over; an interrupted run goes on then.
    """
    from btp_export.model.defaults import default_profile
    from btp_export.model.open_model import open_model
    from btp_export.planning import calibration_settings as chosen
    from btp_export.planning.study import calibrate_model

    usual = chosen.TUNED_SAMPLES if tune else chosen.DEFAULT_SAMPLES
    settings = chosen.CalibrationSettings(
        images=images, mix=mix, prompts=_path(prompts), samples=usual if samples is None else samples,
        compression=compression, keep=_tuple(keep), latency_share=latency_share, latency_from=_path(latency_from),
        target=target, weights=weights, answer_tokens=answer_tokens, kind_bound=kind_bound,
        stages=_tuple(stages), balance=_tuple(balance), importance=importance, spatial_metric=spatial_metric,
        rebalance=rebalance, spatial=spatial, drop_bound=drop_bound, tune=tune, tau=tau, cache=cache, seed=seed,
        device=device, maths=maths, ray=ray,
    )  # fmt: skip
    chosen.check_settings(settings)
    opened = open_model(str(model), system=system, report=report)
    profile = default_profile(opened, image_size)
    return calibrate_model(opened, settings, profile=profile, report=report, note=note)


@naming(EXPORT)
@checked(samples=bounds.VERIFIED_SAMPLES, tokens=bounds.TOKENS, seed=bounds.SEEDS, threads=bounds.THREADS)
def verify(
    bundle: Bundle | PathLike,
    *,
    samples: int = 4,
    tokens: int | None = None,
    seed: int = 0,
    profile: str | None = None,
    threads: int | None = None,
    target: str | None = None,
    device: str = "auto",
    maths: Precision = "float32",
    cuda_graphs: bool = True,
    report: Report | None = None,
    note: Note = lambda text: None,
) -> Verification:
    """Check every graph of a bundle, its kept tokens and its text against transformers' own modelling code.

    What does not hold is in the result (`passed`, `failures`) and raises nothing.

    Args:
        bundle: its folder, whose files are all hashed, or an opened Bundle.
        samples: how many generated scenes.
        tokens: generated tokens compared; 8, or 3 for large models.
        profile: name of a shape profile; all without.
        target: check the engines built for this device in place of the graphs.
        device: where the reference and the graphs compute: "cpu", "cuda", "cuda:<number>"; "auto": a GPU if any.
        maths: what the reference computes in.
        cuda_graphs: replay engines as CUDA graphs.
    """
    from btp_export.measuring.verify import verify_profiles

    return verify_profiles(
        _opened(bundle, full=True),
        samples=samples,
        tokens=tokens,
        seed=seed,
        profile=profile,
        threads=threads,
        target=target,
        device=device,
        maths=maths,
        cuda_graphs=cuda_graphs,
        report=report,
        note=note,
    )


@naming(EXPORT)
@checked(samples=bounds.QUESTIONS, seed=bounds.SEEDS, threads=bounds.THREADS)
def evaluate(
    bundle: Bundle | PathLike,
    *,
    plans: Sequence[str] | None = None,
    compression: float | Sequence[float] | None = None,
    samples: int = 200,
    seed: int = 0,
    data: PathLike | None = None,
    full_weights: Bundle | PathLike | None = None,
    threads: int | None = None,
    ray: str | None = None,
    report: Report | None = None,
    note: Note = lambda text: None,
) -> Evaluation:
    """Measure how many answers stay right under each plan, through the exported graphs.

    Args:
        bundle: its folder, or an opened Bundle.
        plans: presets, plan files, and "btp", the bundle's own plan; all presets without.
        compression: a budget for all plans, or several; the bundle's own without.
        samples: how many held-out questions.
        data: JSONL of image, prompt, answer; drawn scenes without.
        full_weights: of a four-bit bundle, the same export without `weights`: tells what four bits cost.
        ray: address of a Ray cluster that the samples are spread over; an interrupted run goes on then.
    """
    from btp_export.measuring.evaluate import DEFAULT_PLANS, evaluate_bundle

    return evaluate_bundle(
        _opened(bundle),
        plans=DEFAULT_PLANS if plans is None else plans,
        compression=compression,
        samples=samples,
        seed=seed,
        data=_path(data),
        full_weights=None if full_weights is None else _opened(full_weights),
        threads=threads,
        ray=ray,
        report=report,
        note=note,
    )


@naming(EXPORT)
@checked(rounds=bounds.ROUNDS, threads=bounds.THREADS)
def bench(
    bundle: Bundle | PathLike,
    *,
    rounds: int = 10,
    profile: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    target: str | None = None,
    cuda_graphs: bool = True,
    report: Report | None = None,
    note: Note = lambda text: None,
) -> Bench:
    """Measure prefill, selection, decoding and caches beside the same model without pruning.

    Args:
        bundle: its folder, or an opened Bundle.
        rounds: runs of each model; medians are given.
        profile: name of a shape profile; the first without.
        target: measure the engines built for this device, beside its unpruned ones.
        cuda_graphs: replay engines as CUDA graphs.
    """
    from btp_export.measuring.bench import measure

    return measure(
        _opened(bundle),
        profile=profile,
        threads=threads,
        device=device,
        target=target,
        cuda_graphs=cuda_graphs,
        rounds=rounds,
        report=report,
        note=note,
    )


@naming(DEVICE)
@checked(memory_bytes=bounds.MEMORY)
def build(
    bundle: Bundle | PathLike,
    target: str,
    *,
    tensorrt: str | None = None,
    assemble: Literal["segments", "whole"] | None = None,
    engine_weights: Literal["baked", "shared"] | None = None,
    plugins: Literal["auto", "library", "python", "none"] = "auto",
    accumulate: Literal["auto", "float32", "native"] = "auto",
    memory_bytes: int | None = None,
    unpruned: bool = False,
    dry_run: bool = False,
    force: bool = False,
    report: Report | None = None,
) -> BuildResult:
    """Build TensorRT engines in the bundle; without TensorRT, write what the device needs to build and profile them.

    Args:
        bundle: its folder, or an opened Bundle.
        target: the device, e.g. "jetson-orin-jp6", "h100", "rtx-ada".
        tensorrt: its version; the target's without, as for the next three.
        accumulate: the sums in float16 products: in float32 (auto), or as TensorRT likes.
        memory_bytes: of the device.
        unpruned: also engines without pruning, to measure beside.
        dry_run: prepare, check and estimate; write nothing. What does not suit is in `findings`.
        force: replace the engines of this target.
    """
    from btp_export.engine_inputs import build_engines
    from btp_export.results.engines import BuildResult
    from engines.targets import find_target
    from engines.tensorrt.build.machine import machine_for
    from engines.tensorrt.prepare.build_plan import Wishes, plan_build

    device, opened = find_target(target), _opened(bundle)
    wishes = Wishes(tensorrt, assemble, engine_weights, plugins, memory_bytes, unpruned, accumulate)
    if dry_run:
        return BuildResult.of(plan_build(opened, device, wishes).summary())
    machine = machine_for(device, wishes)
    plan = plan_build(opened, device, machine.wishes)
    return BuildResult.of(plan.summary(), build_engines(plan, machine, force=force, report=report))


def _opened(bundle: Bundle | PathLike, *, full: bool = False) -> Bundle:
    if isinstance(bundle, Bundle):
        return bundle
    return Bundle.open(Path(bundle), check="full" if full else "quick")


def _path(value: PathLike | None) -> Path | None:
    return None if value is None else Path(value)


def _tuple(values: Sequence[Item] | None) -> tuple[Item, ...] | None:
    return None if values is None else tuple(values)
