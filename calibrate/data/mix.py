"""The built-in samples: scenes and drawings of what users show, in given shares, interleaved.

The first few samples hold every kind, so that a plan which loses one of them is found out early.
"""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image

from calibrate.data import drawn, scenes
from calibrate.data.samples import Sample, SampleSet
from graphs.records.errors import InputError

SCENES, READING = "scenes", "reading"
NAMES = (SCENES, *drawn.KINDS)


def parse_mix(text: str) -> dict[str, float]:
    """ "scenes=0.5,reading=0.5" -> shares by kind; `reading` is divided among all drawn kinds.

    Raises InputError for an unknown kind, a share that is no number from 0 to 1, and shares that do not add up to 1.
    """
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in (*NAMES, READING):
            raise InputError(f"--mix {text}: no kind {name!r}", wanted=", ".join((*NAMES, READING)), do=_EXAMPLE)
        try:
            share = float(value)
        except ValueError as error:
            raise InputError(
                f"--mix {text}: {name} has no share", wanted="a number from 0 to 1", do=_EXAMPLE
            ) from error
        if not 0.0 <= share <= 1.0:
            raise InputError(f"--mix {text}: {name}={value}", wanted="a number from 0 to 1", do=_EXAMPLE)
        for kind in drawn.KINDS if name == READING else (name,):
            shares[kind] = shares.get(kind, 0.0) + share / (len(drawn.KINDS) if name == READING else 1)
    if abs(sum(shares.values()) - 1.0) > 1e-6:
        raise InputError(
            f"--mix {text} adds up to {sum(shares.values()):g}", wanted="shares that add up to 1", do=_EXAMPLE
        )
    return {name: share for name, share in shares.items() if share > 0.0}


_EXAMPLE = "--mix scenes=0.5,reading=0.5"


def default_mix(size: tuple[int, int]) -> dict[str, float]:
    """Every kind that a picture of height x width pixels can hold, in equal shares."""
    names = [SCENES, *(name for name, kind in drawn.KINDS.items() if min(size) >= kind.least)]
    return dict.fromkeys(names, 1.0 / len(names))


def mixed_samples(
    count: int, *, seed: int, size: tuple[int, int], shares: Mapping[str, float] | None = None
) -> SampleSet:
    """`count` samples in the shares (None: the default mix), drawn at `size` (height, width).

    Raises InputError for a kind whose letters such a picture cannot hold.
    """
    chosen = default_mix(size) if shares is None else shares
    for name in chosen:
        if name != SCENES and min(size) < drawn.KINDS[name].least:
            raise InputError(
                f"--mix with {name} at {size[0]} x {size[1]} pixels",
                wanted=f"a side of at least {drawn.KINDS[name].least} pixels",
                do="leave that kind out, or a larger --image-size",
            )
    order = _interleaved(count, chosen)
    drawn_scenes = iter(scenes.samples(order.count(SCENES), seed=seed, split="calibration"))
    if set(chosen) == {SCENES}:
        samples = [
            Sample(scene.image, scene.question, f"scene {scene.scene_seed}", scene.answer, scene.kind)
            for scene in drawn_scenes
        ]
        return SampleSet(tuple(samples), f"generated scenes, split calibration, seed {seed}", shares=chosen)
    samples = []
    for number, name in enumerate(order):
        if name == SCENES:
            scene = next(drawn_scenes)
            picture = scene.image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
            samples.append(Sample(picture, scene.question, f"scene {scene.scene_seed}", scene.answer, SCENES))
        else:
            sample = drawn.draw(name, seed, number, size)
            samples.append(Sample(sample.image, sample.prompt, f"{name} {number}", None, name))
    shown = ", ".join(f"{name} {share:.3g}" for name, share in chosen.items())
    return SampleSet(tuple(samples), f"drawn pictures ({shown}), seed {seed}", shares=chosen)


def _interleaved(count: int, shares: Mapping[str, float]) -> list[str]:
    """`count` names in these shares, each as evenly spread as the others allow: always the one that lags most."""
    given = dict.fromkeys(shares, 0)
    order: list[str] = []
    for number in range(1, count + 1):
        name = max(shares, key=lambda kind: shares[kind] * number - given[kind])
        given[name] += 1
        order.append(name)
    return order
