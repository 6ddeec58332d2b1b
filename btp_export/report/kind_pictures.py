"""One picture of each kind, with what the plan keeps of it and what both models answer.

Of a plan that was calibrated on drawn pictures it is the one of each kind whose answer the plan moves the most; of any
other plan the first that is drawn.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from btp_export.report.data import Picture
from graphs.files.bundle import Bundle
from graphs.files.folders import scratch_beside
from graphs.records.plan import PruningPlan

if TYPE_CHECKING:
    from PIL import Image

    from calibrate.data.samples import Sample

FIRST = 24  # drawn pictures among which every kind occurs


@dataclass(frozen=True)
class _Chosen:
    """A sample, and how far the plan moves its answer in nats a token, where the calibration found that."""

    sample: "Sample"
    divergence: float | None = None


def kind_pictures(bundle: Bundle, *, threads: int | None = None) -> list[Picture]:
    """The pictures, those of the kind that is moved the most first, with the tokens that each stage keeps."""
    from btp_export.running.runtime import load

    profile = bundle.profile()
    chosen = worst_of_each_kind(bundle.plan, profile.image_size) or first_of_each_kind(profile.image_size)
    images, prompts = [one.sample.image for one in chosen], [one.sample.prompt for one in chosen]
    answers = load(bundle, threads=threads).generate(images, prompts, resize=True)
    unpruned = _unpruned_answers(bundle, images, prompts, threads) if bundle.plan.stages else [None] * len(chosen)
    return [
        Picture(
            image=one.sample.image,
            prompt=one.sample.prompt,
            answer=answer.text,
            grid=profile.grid,
            kept=[indices.tolist() for indices in answer.kept],
            expected=one.sample.answer,
            blocks=profile.blocks,
            kind=one.sample.kind,
            full_answer=full,
            divergence=one.divergence,
        )
        for one, answer, full in zip(chosen, answers, unpruned, strict=True)
    ]


def worst_of_each_kind(plan: PruningPlan, size: tuple[int, int]) -> list[_Chosen]:
    """The calibration's samples of drawn pictures of that size, drawn again, the one that moves the most of each kind.

    Empty where the plan has no such record, or where these pictures come out different now.
    """
    from calibrate.data.mix import mixed_samples

    record = plan.calibration
    source, worst = record.get("source", {}), record.get("answers", {}).get("worst_by_kind", {})
    if "mix" not in source or not worst:
        return []
    drawn = mixed_samples(record["samples"], seed=record["seed"], size=size, shares=source["mix"])
    if drawn.digest() != source["sha256"]:
        return []
    chosen = [_Chosen(drawn.samples[entry["sample"]], entry["divergence"]) for entry in worst.values()]
    means = record["answers"]["by_kind"]
    return sorted(chosen, key=lambda one: -means[one.sample.kind])


def first_of_each_kind(size: tuple[int, int]) -> list[_Chosen]:
    """The first drawn picture of every kind that a picture of that size can hold."""
    from calibrate.data.mix import mixed_samples

    first: dict[str, Sample] = {}
    for sample in mixed_samples(FIRST, seed=0, size=size).samples:
        first.setdefault(sample.kind, sample)
    return [_Chosen(sample) for sample in first.values()]


def _unpruned_answers(
    bundle: Bundle, images: "list[Image.Image]", prompts: list[str], threads: int | None
) -> list[str]:
    """What the same model answers without pruning."""
    from btp_export.running.runtime import load
    from graphs.building.derived_bundles import derive

    with scratch_beside(bundle.root) as folder:
        model = load(derive(bundle, bundle.plan.without_stages(), folder / "full", sync=False), threads=threads)
        return [answer.text for answer in model.generate(images, prompts, resize=True)]
