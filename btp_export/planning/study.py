"""Calibration of one model: pictures and prompts through its own processor and vision tower, then calibrate/."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from btp_export.model.defaults import default_profile, fitted_samples
from btp_export.planning.calibration_settings import ANSWER_TOKENS, CalibrationSettings, check_settings
from btp_export.spreading import Cluster, connected
from graphs import dtypes
from graphs.dtypes import Precision
from graphs.files.atomic import size_text
from graphs.files.bundle import tool_versions
from graphs.files.cache_folder import cache_folder
from graphs.files.memory import LIBRARIES, check_memory
from graphs.files.resume import Work, digest, work_folder
from graphs.records.plan import PruningPlan
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
    from calibrate.reference.streamed_model import StreamedReference

LARGE = 2**30  # bytes of weights over which an interrupted calibration is worth resuming
TYPICAL_TEXT = 24  # tokens of a prompt after the picture

Check = Callable[["Request", "Shape", "PrefillCost"], object]


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
    from btp_export.planning.spread_reference import measured
    from calibrate import calibrate as calibration
    from calibrate.measure.statistics_cache import StatisticsCache
    from calibrate.reference.decoder import torch_device

    spec = model.spec
    device = torch_device(settings.device)
    profile = profile or default_profile(model)
    shape = _shape(spec, profile)
    cost = prefill_cost(settings.latency_from, settings.target, settings.weights, spec, profile)
    request = replace(request_of(settings), released=model.family.released)
    (check or type(request).check)(request, shape, cost)
    prompter = Prompter(model.source.folder, spec, checkpoint_processor(model.source.folder))
    chosen = calibration_samples(settings, prompter, note, profile.image_size)
    _check_samples(model, profile, len(chosen.samples), settings)
    samples, resized = fitted_samples(chosen.samples, spec, profile)
    inputs = model_inputs(model, prompter, profile, samples, report)
    reference = _reference(model, settings.maths, device, work, cluster)
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


def _shape(spec: ModelSpec, profile: ShapeProfile) -> Shape:
    from calibrate.place.counts import Shape

    return Shape(
        spec.model_type,
        spec.decoder.num_layers,
        profile.image_tokens,
        profile.grid,
        profile.blocks,
        class_token=bool(spec.vision.class_token),
    )


def _reference(
    model: Model, maths: Precision, device: str, work: Work | None, cluster: Cluster | None
) -> StreamedReference:
    """transformers' layers, here or on the cluster."""
    from btp_export.planning.spread_reference import SpreadReference
    from calibrate.reference.streamed_model import StreamedReference

    dtype = dtypes.BY_NAME[maths].torch
    if cluster is not None:
        return SpreadReference(cluster, model.checkpoint, dtype=dtype, device=device, work=work)
    return StreamedReference(model.checkpoint, dtype=dtype, device=device, work=work)


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
    """What the reference takes of each sample; of one that has a right answer, that answer is expected."""
    from calibrate.data.samples import prepare

    attention = bool(model.spec.vision.class_token)  # among the plans tried are some that score by it
    vision = model.family.vision_module(model.checkpoint, profile.image_size, class_attention=attention)
    prepared = prepare(samples, prompter, vision, progress=labelled(report, "reading the pictures"))
    end = model.spec.eos_token_ids[:1]
    return [
        replace(one.input, expected=(*prompter.token_ids(sample.answer), *end)) if sample.answer and end else one.input
        for one, sample in zip(prepared, samples, strict=True)
    ]


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
    if chosen.shares is not None:
        source["mix"] = dict(chosen.shares)
    if spec.vision.dynamic:
        source |= {"image_size": list(profile.image_size), "resized": resized}
    return source


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
