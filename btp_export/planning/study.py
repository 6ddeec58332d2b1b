"""Calibration of one model: pictures and prompts through its own processor and vision tower, then calibrate/."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btp_export.model.defaults import default_profile, fitted_samples
from btp_export.spreading import Cluster, connected
from graphs import dtypes
from graphs.dtypes import Precision
from graphs.files.atomic import size_text
from graphs.files.bundle import tool_versions
from graphs.files.cache_folder import cache_folder
from graphs.files.memory import LIBRARIES, check_memory
from graphs.files.resume import Work, digest, work_folder
from graphs.records.errors import InputError
from graphs.records.plan import Importance, PruningPlan, SpatialMetric
from graphs.records.progress import Note, Report, labelled
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import ModelSpec

if TYPE_CHECKING:
    from btp_export.model.open_model import Model
    from btp_export.model.prompting import Prompter
    from calibrate.calibrate import Study
    from calibrate.data.samples import Sample, SampleSet
    from calibrate.place.candidates import Request
    from calibrate.place.cost import PrefillCost
    from calibrate.place.counts import Shape
    from calibrate.reference.records import ReferenceInput

MOST_SAMPLES = 4096
DEFAULT_SAMPLES = 64
TUNED_SAMPLES = 128  # for a search, which a handful of samples would lead astray
LARGE = 2**30  # bytes of weights over which an interrupted calibration is worth resuming
TYPICAL_TEXT = 24  # tokens of a prompt after the picture
ANSWER_TOKENS = 16  # of the model's own answer to each prompt
MOST_ANSWER_TOKENS = 128

Check = Callable[["Request", "Shape", "PrefillCost"], object]


@dataclass(frozen=True)
class CalibrationSettings:
    """What the user may choose.

    The samples: `images` None are drawn pictures in the shares of `mix` (None: all kinds that the model's picture size
    can hold), else a folder, a JSONL file or `hf:owner/name[:split]`. Of each answer at most `answer_tokens` are looked
    at; a plan that moves a kind of picture by more than `kind_bound` nats a token is refused.
    The budget: a compression, counts `keep` or a latency share, else a compression of 0.78; `latency_from` is a
    measurement that the share and the cost are taken from, `target` a device whose limits they follow, with the model's
    weights or "int4" ones. Everything else are the switches of the method.
    """

    images: str | None = None
    prompts: Path | None = None
    mix: str | None = None
    samples: int = DEFAULT_SAMPLES
    answer_tokens: int = ANSWER_TOKENS
    kind_bound: float | None = None
    compression: float | None = None
    keep: tuple[int, ...] | None = None
    latency_share: float | None = None
    latency_from: Path | None = None
    target: str | None = None
    weights: str = "model"
    stages: tuple[int, ...] | None = None
    balance: tuple[float, ...] | None = None
    importance: Importance = "last-token"
    spatial_metric: SpatialMetric = "euclidean"
    rebalance: bool = True
    spatial: bool = True
    drop_bound: float | None = None
    tune: bool = False
    tau: float | None = None
    cache: bool = True
    seed: int = 0
    device: str = "auto"  # cpu, cuda, cuda:<n>; auto: a GPU if there is one
    maths: Precision = "float32"  # what the model computes in
    ray: str | None = None  # address of a cluster that the samples are spread over


def parse_keep(text: str) -> tuple[int, ...]:
    """ "288,144,48,0" -> (288, 144, 48, 0). Raises InputError if it is not a list of whole numbers."""
    return tuple(int(part) for part in _parse(text, "--keep", int, "whole numbers", "288,144,48,0"))


def parse_stages(text: str) -> tuple[int, ...]:
    """ "3,6,14,22" -> (3, 6, 14, 22). Raises InputError if it is not a list of whole numbers."""
    return tuple(int(part) for part in _parse(text, "--stages", int, "whole numbers", "3,6,14,22"))


def parse_shares(text: str, flag: str = "--balance", example: str = "0.4,0.7,1.0") -> tuple[float, ...]:
    """ "0.4,0.7,1.0" -> (0.4, 0.7, 1.0). Raises InputError if it is not a list of numbers from 0 to 1."""
    shares = _parse(text, flag, float, "numbers from 0 to 1", example)
    if not all(0.0 <= share <= 1.0 for share in shares):
        raise InputError(f"{flag} {text}", wanted="numbers from 0 to 1 with commas", do=f"{flag} {example}")
    return tuple(shares)


def _parse(text: str, flag: str, kind: Callable[[str], float], what: str, example: str) -> list[float]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{flag} {text}", wanted=f"{what} with commas", do=f"{flag} {example}") from error


def calibrate_model(
    model: Model,
    settings: CalibrationSettings,
    *,
    profile: ShapeProfile | None = None,
    report: Report | None = None,
    note: Note | None = None,
) -> PruningPlan:
    """The calibrated plan `btp` for a model at a profile's image size, its own if there is none.

    Pictures that become other tokens are scaled to that size. `note` is called for pictures that are skipped and for
    statistics that are reused. Raises InputError for settings or pictures that cannot be used, UnavailableError for a
    data set that cannot be had, before any long work.
    """
    from calibrate.calibrate import calibrate

    with calibration_work(model, settings, note) as work, connected(settings.ray) as cluster:
        study, request = open_study(
            model, settings, profile=profile, work=work, cluster=cluster, report=report, note=note
        )
        return calibrate(study, request, tuned=settings.tune, progress=report)


@contextlib.contextmanager
def calibration_work(model: Model, settings: CalibrationSettings, note: Note | None) -> Iterator[Work | None]:
    """Where a calibration keeps checkpoints, so that an interrupted one goes on: of a large model, and of one whose
    samples are spread over a cluster; else nowhere.
    """
    if settings.ray is None and sum(ref.nbytes for ref in model.checkpoint.tensors.values()) < LARGE:
        yield None
        return
    from calibrate.measure.statistics_cache import checkpoint_identity

    key = digest(
        checkpoint_identity(model.checkpoint), model.spec.system, repr(replace(settings, ray=None)), tool_versions()
    )
    with work_folder(cache_folder("work"), key, note or (lambda text: None)) as work:
        yield work


def open_study(
    model: Model,
    settings: CalibrationSettings,
    *,
    profile: ShapeProfile | None = None,
    check: Check | None = None,
    work: Work | None = None,
    cluster: Cluster | None = None,
    report: Report | None = None,
    note: Note | None = None,
) -> tuple[Study, Request]:
    """The model measured on its samples, or its statistics from the cache, and what plan is asked for.

    `work` is where long passes leave checkpoints, `cluster` what the samples are spread over, if anything. `check`
    stands for the request's own where something else is asked of it. Raises as `calibrate_model`.
    """
    check_settings(settings)

    from btp_export.families._describe import checkpoint_processor
    from btp_export.model.prompting import Prompter
    from btp_export.planning.latency import prefill_cost
    from btp_export.planning.spread_reference import SpreadReference, measured
    from calibrate import calibrate as calibration
    from calibrate.measure.statistics_cache import StatisticsCache
    from calibrate.place.counts import Shape
    from calibrate.reference.streamed_model import StreamedReference, torch_device

    spec = model.spec
    device = torch_device(settings.device)
    profile = profile or default_profile(model)
    shape = Shape(
        spec.model_type,
        spec.decoder.num_layers,
        profile.image_tokens,
        profile.grid,
        profile.blocks,
        class_token=bool(spec.vision.class_token),
    )
    cost = prefill_cost(settings.latency_from, settings.target, settings.weights, spec, profile)
    request = replace(request_of(settings), released=model.family.released)
    (check or type(request).check)(request, shape, cost)
    prompter = Prompter(model.source.folder, spec, checkpoint_processor(model.source.folder))
    chosen = calibration_samples(settings, prompter, note, profile.image_size)
    _check_samples(model, profile, len(chosen.samples), settings)
    samples, resized = fitted_samples(chosen.samples, spec, profile)
    inputs = model_inputs(model, prompter, profile, samples, report)
    dtype = dtypes.BY_NAME[settings.maths].torch
    reference = StreamedReference(model.checkpoint, dtype=dtype, device=device, work=work)
    if cluster is not None:
        reference = SpreadReference(cluster, model.checkpoint, dtype=dtype, device=device, work=work)
    taus = calibration.taus_for(settings.tau, spec.change_threshold)
    measure = partial(measured, reference, inputs, shape, answer_tokens=settings.answer_tokens)
    cache = StatisticsCache(cache_folder("statistics") if settings.cache else None, note)
    statistics = cache.get_or_measure(
        _cache_key(model, profile, chosen.digest(), taus, settings, device),
        lambda: measure(tau=settings.tau, model_tau=spec.change_threshold, ends=spec.eos_token_ids, progress=report),
    )
    study = calibration.Study(
        reference=reference,
        inputs=statistics.answered(inputs),
        shape=shape,
        statistics=statistics,
        threshold=calibration.threshold_of(statistics, shape, tau=settings.tau, model_tau=spec.change_threshold),
        cost=cost,
        seed=settings.seed,
        source=_source(chosen, spec, profile, resized),
        kinds=[sample.kind for sample in chosen.samples],
        kind_bound=calibration.KIND_BOUND if settings.kind_bound is None else settings.kind_bound,
    )
    return study, request


def _check_samples(model: Model, profile: ShapeProfile, samples: int, settings: CalibrationSettings) -> None:
    """Raise InputError for more samples than memory holds, or fewer than a search takes."""
    from calibrate.place.search import check_tuning

    def needed(samples: int) -> int:
        return needed_bytes(model, profile, samples, settings.maths, settings.answer_tokens)

    check_memory(
        needed(samples),
        f"calibrating {model.spec.name} on {samples} samples",
        do=f"fewer --samples (a layer at a time needs {size_text(needed(1))})",
    )
    if settings.tune:
        check_tuning(samples, counts=settings.keep is None, shares=settings.balance is None)


def needed_bytes(
    model: Model, profile: ShapeProfile, samples: int, maths: Precision, answer_tokens: int = ANSWER_TOKENS
) -> int:
    """About how much memory a calibration takes at its highest.

    The vision tower, or a layer with all samples' rows and the logits of their whole answers, beside which are the rows
    of dropped runs while plans are placed, and one pass of candidates while they are judged.
    """
    from calibrate.calibrate import DROPPED_SAMPLES
    from calibrate.place.rank_by_divergence import PASS_BYTES

    decoder, size = model.spec.decoder, dtypes.BY_NAME[maths].nbytes
    own = ("language_model.", "lm_head.")
    vision = sum(math.prod(ref.shape) for ref in model.checkpoint.tensors.values() if not ref.name.startswith(own))
    layer = size * decoder.layer_elements
    tokens = profile.prefix_tokens + profile.image_tokens + TYPICAL_TEXT
    rows = size * decoder.hidden_size * samples * tokens
    text = profile.prefix_tokens + TYPICAL_TEXT
    branches = size * decoder.hidden_size * min(samples, DROPPED_SAMPLES) * text * decoder.num_layers
    logits = 4 * samples * answer_tokens * decoder.vocab_size
    return LIBRARIES + max(8 * vision, layer + layer // 3 + rows + logits + max(branches, PASS_BYTES))


def request_of(settings: CalibrationSettings) -> Request:
    """The plan that the settings ask for."""
    from calibrate.place.balance import Recipe
    from calibrate.place.candidates import DROP_BOUNDS, Budget, Request

    return Request(
        budget=Budget(compression=settings.compression, keep=settings.keep, share=settings.latency_share),
        layers=settings.stages,
        recipe=Recipe(
            importance=settings.importance,
            spatial_metric=settings.spatial_metric,
            rebalance=settings.rebalance,
            spatial=settings.spatial,
            balance=settings.balance,
        ),
        drop_bounds=DROP_BOUNDS if settings.drop_bound is None else (settings.drop_bound,),
    )


def model_inputs(
    model: Model, prompter: Prompter, profile: ShapeProfile, samples: Sequence[Sample], report: Report | None
) -> list[ReferenceInput]:
    """What the reference takes of each sample."""
    from calibrate.data.samples import prepare

    attention = bool(model.spec.vision.class_token)  # among the plans tried are some that score by it
    vision = model.family.vision_module(model.checkpoint, profile.image_size, class_attention=attention)
    prepared = prepare(samples, prompter, vision, progress=labelled(report, "reading the pictures"))
    return [sample.input for sample in prepared]


def _cache_key(
    model: Model,
    profile: ShapeProfile,
    pictures: str,
    taus: Sequence[float],
    settings: CalibrationSettings,
    device: str,
) -> str:
    """Everything that decides the statistics; see calibrate/measure/statistics_cache.py."""
    import importlib.metadata

    from btp_export import __version__
    from calibrate.calibrate import DROPPED_SAMPLES
    from calibrate.measure.statistics_cache import checkpoint_identity, key_of
    from graphs.files.atomic import sha256

    picture = {"image_size", "grid", "blocks", "pixel_shape", "prefix_tokens", "image_tokens"}
    return key_of(
        {
            "model": checkpoint_identity(model.checkpoint),
            "processor": {path.name: sha256(path) for path in model.processor_files},
            "pictures": pictures,
            "profile": profile.model_dump(mode="json", include=picture),
            "system": model.spec.system,
            "settings": {
                "taus": list(taus),
                "dropped": DROPPED_SAMPLES,
                "answer_tokens": settings.answer_tokens,
                "ends": list(model.spec.eos_token_ids),
                "maths": settings.maths,
                "device": device,
            },
            "versions": {
                "btp-export": __version__,
                **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
            },
        }
    )


def _source(chosen: SampleSet, spec: ModelSpec, profile: ShapeProfile, resized: int) -> dict[str, Any]:
    """Where the samples came from, as the plan's record holds it."""
    source: dict[str, Any] = {
        "pictures": chosen.source,
        "skipped": list(chosen.skipped),
        "prompts": len({sample.prompt for sample in chosen.samples}),
        "sha256": chosen.digest(),
    }
    if spec.vision.dynamic:
        source |= {"image_size": list(profile.image_size), "resized": resized}
    return source


def check_settings(settings: CalibrationSettings) -> None:
    """Raise InputError for settings out of range."""
    if not 1 <= settings.samples <= MOST_SAMPLES:
        raise InputError(f"--samples {settings.samples}", wanted=f"1 to {MOST_SAMPLES}", do="--samples 64")
    if settings.tau is not None and not -1.0 < settings.tau < 1.0:
        raise InputError(f"--tau {settings.tau}", wanted="a cosine between -1 and 1", do="--tau 0.93")
    if settings.drop_bound is not None and not settings.drop_bound > 0.0:
        raise InputError(f"--drop-bound {settings.drop_bound}", wanted="nats above 0", do="--drop-bound 0.02")
    if settings.weights != "model" and settings.target is None:
        raise InputError(f"--weights {settings.weights} without --target", wanted="both", do="--target NAME")
    if settings.target is not None and settings.latency_from is not None:
        raise InputError("both --target and --latency-from", wanted="one cost", do="leave one out")
    if settings.mix is not None and settings.images is not None:
        raise InputError("--mix with --images", wanted="drawn pictures, or your own", do="leave one of them out")
    if not 1 <= settings.answer_tokens <= MOST_ANSWER_TOKENS:
        raise InputError(
            f"--answer-tokens {settings.answer_tokens}", wanted=f"1 to {MOST_ANSWER_TOKENS}", do="--answer-tokens 16"
        )
    if settings.kind_bound is not None and not settings.kind_bound > 0.0:
        raise InputError(f"--kind-bound {settings.kind_bound}", wanted="nats above 0", do="--kind-bound 1")
    if settings.prompts is not None and settings.images is None:
        raise InputError("--prompts without --images", wanted="pictures to ask about", do="--images DIR --prompts FILE")
    if not 0 <= settings.seed < 2**24:
        raise InputError(f"--seed {settings.seed}", wanted="0 to 16777215", do="--seed 0")
    _check_budget(settings)


def _check_budget(settings: CalibrationSettings) -> None:
    compression, share = settings.compression, settings.latency_share
    if compression is not None and not 0.0 <= compression < 1.0:
        raise InputError(f"--compression {compression}", wanted="a number from 0 to below 1", do="--compression 0.78")
    if share is not None and not 0.0 < share < 1.0:
        raise InputError(f"--latency-share {share}", wanted="a number above 0 and below 1", do="--latency-share 0.3")
    budgets = {"--compression": compression, "--keep": settings.keep, "--latency-share": share}
    given = [flag for flag, value in budgets.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"both {' and '.join(given[:2])}", wanted="one of them", do="leave one out")


def calibration_samples(
    settings: CalibrationSettings, prompter: Prompter | None, note: Note | None, image_size: tuple[int, int]
) -> SampleSet:
    """Drawn pictures of that size (height, width) in the shares of the mix, or what `images` names.

    Pictures and prompts that the prompter does not take are treated as calibrate.data.samples says.
    """
    from calibrate.data import mix, samples, sources

    if settings.images is None:
        shares = None if settings.mix is None else mix.parse_mix(settings.mix)
        return mix.mixed_samples(settings.samples, seed=settings.seed, size=image_size, shares=shares)
    checks = samples.NO_CHECKS if prompter is None else samples.Checks(prompt=prompter.text)
    return sources.calibration_samples(
        settings.images, prompts=settings.prompts, count=settings.samples, seed=settings.seed, note=note, checks=checks
    )
