"""What pruning saves in time and memory, measured: the bundle beside the same model without pruning.

The unpruned bundle is derived from the same weights into a temporary folder. Both are loaded in one process with the
same settings and run in turns (A B B A ...), so that whatever else the machine does hits both alike; results are
medians. "Prefill" is the decoder chain with selection and output projection, without vision, which pruning does not
change and which is reported on its own. All shapes are static, so no time depends on what is in the picture: pixels and
tokens are random.
"""

from collections.abc import Mapping, Sequence
from math import comb
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from btp_export.model.prompting import Encoded
from btp_export.results.timing import Bench, CacheBytes, DecodeTimes, Operations, PrefillTimes
from btp_export.running.generation import answers_for
from btp_export.running.memory_fit import check_fits_memory
from btp_export.running.opening import activations_in, open_graphs
from btp_export.running.runtime import BundleModel, load
from graphs.files.bundle import Bundle
from graphs.files.folders import scratch_beside
from graphs.pruning.operations import cost
from graphs.records.errors import InputError
from graphs.records.progress import Note, Report
from graphs.records.stored_weights import Activations

DECODE_STEPS: Final = 16  # at most, in each round
MISSED: Final = 0.05  # how often a speed-up may lie outside its interval


def measure(
    bundle: Bundle,
    *,
    profile: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    target: str | None = None,
    activations: Activations = "int8",
    cuda_graphs: bool = True,
    rounds: int = 10,
    warm_up: int = 2,
    report: Report | None = None,
    note: Note = lambda text: None,
) -> Bench:
    """Times in milliseconds and cache sizes in bytes of the bundle and of the unpruned model.

    `flops_limit` is how many times fewer operations in matrix products the pruned decoder needs
    (graphs/pruning/operations.py, selection not counted): the speed-up there would be if time were proportional to them
    and selecting were free. It counts attention's whole square, as `flops` does; `causal_limit` counts it up to its
    diagonal, as far as both models compute it. `share_of_limit` is the measured speed-up as a share of `flops_limit`.
    `variation` is how far the middle half of the prefill times lies apart, as a share of the median, of the model that
    varies more: on a busy machine it is large, and the other numbers mean little. `speedup_interval`, from the rounds
    taken in pairs, holds the speed-up; where it holds 1 as well, there is none to be told.

    A bundle of one whole prefill graph is measured as segments, so that vision and selection can be told apart. With
    `target`, the engines of that device are measured, beside the unpruned ones that `build --unpruned` made.

    Raises InputError for rounds below 1 or engines that are not there, CheckError if pruning did not happen.
    """
    if rounds < 1 or warm_up < 0:
        raise InputError(f"{rounds} rounds after {warm_up}", wanted="at least 1 round", do="--rounds 10")
    if target is None:
        from engines.runners.onnxruntime import onnxruntime_device

        device = onnxruntime_device(device)
        check_fits_memory(bundle, profile, device, models=2, activations=activations)
    with scratch_beside(bundle.root) as folder:
        common = {"threads": threads, "device": device, "cuda_graphs": cuda_graphs, "note": note}
        if target is None:
            models = _open_graphs(bundle, folder, profile=profile, activations=activations, **common)
        else:
            models = _open_engines(bundle, target, profile=profile, **common)
        times = {name: _Times() for name in models}
        encoded = random_samples(models["full"])
        for number in range(-warm_up, rounds):
            # Turned around every other round (A B B A), so that a machine that gets slower favours neither.
            for name in ("full", "pruned") if number % 2 else ("pruned", "full"):
                run = _run(models[name], encoded)
                if number >= 0:
                    times[name].add(run)
            if report is not None:
                report(number + warm_up + 1, rounds + warm_up)
    settings = {"rounds": rounds, "threads": threads, "device": device, "engine": target}
    settings["activations"] = activations_in(bundle, activations, target)
    return _result(bundle, models, times, settings)


def _open_graphs(bundle: Bundle, folder: Path, **options: Any) -> dict[str, BundleModel]:
    """The bundle and the same model without pruning, derived into `folder`."""
    from graphs.building.derived_bundles import derive

    bundles = {"full": derive(bundle, bundle.plan.without_stages(), folder / "full", sync=False), "pruned": bundle}
    if bundle.manifest.build.assemble == "whole":
        bundles["pruned"] = derive(bundle, bundle.plan, folder / "pruned", sync=False)
    full = load(bundles["full"], **options)
    return {"full": full, "pruned": load(bundles["pruned"], beside=full, **options)}


def _open_engines(bundle: Bundle, target: str, *, profile: str | None, **options: Any) -> dict[str, BundleModel]:
    """The engines of a target and the unpruned ones beside them. Both use the same memory for shared weights."""
    from engines.tensorrt.records import UNPRUNED

    chosen = bundle.profile(profile)
    model = load(bundle, profile=chosen.name, target=target, **options)
    if model.chain.is_whole:
        raise InputError(
            f"the engines for {target} hold the prefill as a whole",
            wanted="segments, so that selection can be told apart",
            do=f"btp-export build BUNDLE --target {target} --assemble segments --unpruned",
        )
    without = bundle.without_pruning()
    loader, graphs = open_graphs(without, chosen.name, target=target, part=UNPRUNED, **options)
    return {"full": BundleModel(without, loader, profile=chosen.name, graphs=graphs), "pruned": model}


def random_samples(model: BundleModel, seed: int = 0) -> Encoded:
    """A full batch of noise with the longest text that fits."""
    profile, spec = model.profile, model.spec
    rng = np.random.default_rng(seed)
    words = rng.integers(0, spec.decoder.vocab_size, (profile.batch, profile.total_tokens))
    words[:, profile.prefix_tokens : profile.prefix_tokens + profile.image_tokens] = spec.image_token_id
    pixels = rng.standard_normal(profile.pixel_input(spec.vision.channels), dtype=np.float32)
    return Encoded(tuple(words), pixels, profile.prefix_tokens, profile.image_tokens, (0,) * profile.batch)


class _Times:
    """One model's times in milliseconds."""

    def __init__(self) -> None:
        self.prefill: list[float] = []
        self.vision: list[float] = []
        self.select: list[tuple[float, ...]] = []
        self.decode: list[float] = []

    def add(self, run: "_Times") -> None:
        self.prefill += run.prefill
        self.vision += run.vision
        self.select += run.select
        self.decode += run.decode


def _run(model: BundleModel, encoded: Encoded) -> _Times:
    """One prefill and some decode steps."""
    times = _Times()
    prefill = model.prefill(encoded)
    times.prefill.append(prefill.prefill_ms)
    times.select.append(prefill.select_ms)
    times.vision += [] if prefill.vision_ms is None else [prefill.vision_ms]
    steps = min(DECODE_STEPS, model.profile.new_tokens)
    answers = answers_for(model.spec, encoded.input_ids, room=steps + 1, endless=True)  # the first is the prefill's
    times.decode += model.complete(prefill, answers)
    return times


def _variation(values: list[float]) -> float:
    low, high = np.percentile(values, [25, 75])
    return float((high - low) / median(values))


def speedup_interval(full: Sequence[float], pruned: Sequence[float]) -> tuple[float, float] | None:
    """Between which two numbers the median of full / pruned lies, of times measured in turns; None for too few pairs.

    The k-th smallest and the k-th largest of n ratios, k as large as P(fewer than k heads in n throws) <= MISSED / 2
    allows: exact whatever the times' distribution is.
    """
    ratios = sorted(one / other for one, other in zip(full, pruned, strict=True))
    missed, k = 0.0, 0
    while (missed := missed + comb(len(ratios), k) / 2 ** len(ratios)) <= MISSED / 2:
        k += 1
    return (ratios[k - 1], ratios[-k]) if k else None


def _by_round(times: Sequence[float], rounds: int) -> list[float]:
    """The median of each round's times."""
    count = len(times) // rounds
    return [median(times[start : start + count]) for start in range(0, count * rounds, count)] if count else []


def _result(
    bundle: Bundle, models: Mapping[str, BundleModel], times: Mapping[str, _Times], settings: Mapping[str, Any]
) -> Bench:
    profile, decoder = models["pruned"].profile, bundle.spec.decoder
    precision = bundle.manifest.build.precision
    full, pruned = (cost(decoder, model.plan, profile, precision) for model in (models["full"], models["pruned"]))
    full_ms, pruned_ms = median(times["full"].prefill), median(times["pruned"].prefill)
    limit = full.decoder / pruned.decoder
    token_ms, full_token_ms = median(times["pruned"].decode), median(times["full"].decode)
    full_steps, steps = (_by_round(times[name].decode, settings["rounds"]) for name in ("full", "pruned"))
    return Bench(
        prefill=PrefillTimes(
            full_ms=full_ms,
            pruned_ms=pruned_ms,
            speedup=full_ms / pruned_ms,
            speedup_interval=speedup_interval(times["full"].prefill, times["pruned"].prefill),
            flops_limit=limit,
            causal_limit=full.needed / pruned.needed,
            share_of_limit=full_ms / pruned_ms / limit,
        ),
        select_ms=tuple(median(stage) for stage in zip(*times["pruned"].select, strict=True)),
        decode=DecodeTimes(
            ms_per_token=token_ms,
            full_ms_per_token=full_token_ms,
            speedup=full_token_ms / token_ms,
            speedup_interval=speedup_interval(full_steps, steps),
        ),
        cache_bytes=CacheBytes(**{name: model.chain.cache_bytes() for name, model in models.items()}),
        variation=max(_variation(times[name].prefill) for name in models),
        vision_ms=median(times["full"].vision + times["pruned"].vision),
        flops=Operations(full=full.decoder, pruned=pruned.decoder, selection=sum(pruned.selection)),
        profile=profile.name,
        batch=profile.batch,
        precision=precision,
        dummy_weights=bundle.manifest.model.dummy_weights,
        **settings,
    )
