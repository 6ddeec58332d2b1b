"""What a model is calibrated and measured on: pictures with prompts.

They come from generated scenes, a folder, a JSONL file or a Hugging Face data set (calibrate/data/hub_data.py). For
calibration a picture that cannot be used is named and skipped, and too few are an error; for a measurement
(`jsonl_samples`) it is an error at once, because a score over fewer questions is another score.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from calibrate.data import scenes
from calibrate.data.folders import PICTURE_SUFFIXES, picture_files
from calibrate.data.text_files import at, json_record, read_lines
from graphs.files.pictures import open_picture
from graphs.records.errors import InputError
from graphs.records.progress import Note, Report

if TYPE_CHECKING:  # recording inputs for engines draws samples where there is no torch
    import torch

    from calibrate.reference.records import ReferenceInput

LEAST_PICTURES = 4
DEFAULT_SAMPLES = 64
# What stands in for a user's questions; image tokens come before the question, so its words hardly matter.
DEFAULT_PROMPTS = (
    "Describe the image.",
    "What is in the picture?",
    "What colours do you see?",
    "How many things are there?",
)


@dataclass(frozen=True)
class Sample:
    """One picture with one prompt; `answer` and `kind` where they are known.

    `where` names the file and line that it comes from, for errors; empty where there is none.
    """

    image: Image.Image
    prompt: str
    name: str
    answer: str | None = None
    kind: str = ""
    where: str = ""


@dataclass(frozen=True)
class SampleSet:
    """Samples and where they came from; `skipped` names what could not be read.

    `shares` are those of drawn pictures by kind (calibrate/data/mix.py), None for a user's own.
    """

    samples: tuple[Sample, ...]
    source: str
    skipped: tuple[str, ...] = ()
    shares: Mapping[str, float] | None = None

    def digest(self) -> str:
        """sha256 over pixels and prompts, in order."""
        state = hashlib.sha256()
        for sample in self.samples:
            state.update(f"{sample.image.mode}{sample.image.size}{sample.prompt}".encode())
            state.update(sample.image.tobytes())
        return state.hexdigest()


class Encoded(Protocol):
    """A batch as the processor makes it: token ids with image tokens expanded per sample, and pixels [B,3,h,w]."""

    @property
    def input_ids(self) -> Sequence[Any]:
        """Token ids of each sample, unpadded."""

    @property
    def pixel_values(self) -> Any:
        """[B,3,h,w] float32."""


class Encoder(Protocol):
    """btp_export's Prompter."""

    def encode(self, images: list[Image.Image], prompts: list[str], *, raw: bool = False) -> Encoded:
        """Apply the processor and its chat template."""


def scene_samples(count: int, *, seed: int, split: str) -> SampleSet:
    """Generated scenes with questions (calibrate/data/scenes.py); splits never share a scene."""
    drawn = scenes.samples(count, seed=seed, split=split)
    samples = tuple(
        Sample(sample.image, sample.question, f"scene {sample.scene_seed}", sample.answer, sample.kind)
        for sample in drawn
    )
    return SampleSet(samples, f"generated scenes, split {split}, seed {seed}")


@dataclass(frozen=True)
class Found:
    """A picture that a source has, not read yet; `read` raises InputError if it is none.

    `prompt` None: the next one of the prompts that take turns.
    """

    name: str
    read: Callable[[], Image.Image]
    prompt: str | None = None
    where: str = ""


@dataclass(frozen=True)
class Checks:
    """What a model says of a prompt: raises InputError for one that it cannot take."""

    prompt: Callable[[str], object] = lambda prompt: None


NO_CHECKS = Checks()


def folder_samples(
    folder: Path,
    *,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    count: int,
    seed: int,
    note: Note | None = None,
    checks: Checks = NO_CHECKS,
) -> SampleSet:
    """Up to `count` pictures of a folder (its subfolders too) in a seeded order, prompts taking turns.

    A picture that cannot be used is named and skipped. Raises InputError if the folder is not there or fewer than
    `LEAST_PICTURES` pictures can be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", wanted="a folder of pictures", do="--images DIR")
    paths = picture_files(folder, note)

    def found() -> Iterator[Found]:
        for place in np.random.default_rng(seed).permutation(len(paths)):
            path = paths[place]
            yield Found(path.relative_to(folder).as_posix(), lambda path=path: open_picture(path))  # type: ignore[misc]

    return take(
        found(), prompts, count=count, where=f"in {folder}", source="pictures of a folder", note=note, checks=checks
    )


def jsonl_pictures(
    path: Path,
    *,
    prompts: Sequence[str] | None = None,
    count: int,
    seed: int,
    note: Note | None = None,
    checks: Checks = NO_CHECKS,
) -> SampleSet:
    """Up to `count` lines of {"image": path, "prompt": text} in a seeded order; paths are relative to the file.

    `prompts` replace the file's own. A picture that cannot be used is named and skipped, a line that is no such object
    or has a prompt that the model cannot take is an error. Raises InputError for that and for too few pictures.
    """
    keys = ("image",) if prompts else ("image", "prompt")
    lines = read_lines(path, "a JSONL file of image, prompt")
    records = [json_record(line, keys) for line in lines]
    for line, record in zip(lines, records, strict=True):
        _check_prompt(record.get("prompt"), line.where, checks)

    def found() -> Iterator[Found]:
        for place in np.random.default_rng(seed).permutation(len(records)):
            image, prompt = records[place]["image"], records[place].get("prompt")
            read = functools.partial(open_picture, path.parent / image)
            yield Found(image, read, None if prompts else prompt, lines[place].where)

    return take(
        found(),
        prompts or DEFAULT_PROMPTS,
        count=count,
        where=f"in {path}",
        source=f"lines of {path.name}",
        note=note,
        checks=checks,
    )


def pictures_named(path: Path) -> list[Path]:
    """The pictures that a JSONL file names, there or not; none for a folder. Raises InputError as above."""
    if not path.is_file():
        return []
    return [path.parent / json_record(line, ("image",))["image"] for line in read_lines(path, "a JSONL file")]


def _check_prompt(prompt: str | None, where: str, checks: Checks) -> None:
    if prompt is None:
        return
    try:
        checks.prompt(prompt)
    except InputError as error:
        raise at(where, error) from error


def take(
    pictures: Iterable[Found],
    prompts: Sequence[str],
    *,
    count: int,
    where: str,
    source: str,
    note: Note | None,
    checks: Checks = NO_CHECKS,
) -> SampleSet:
    """The first `count` pictures that can be used; the others are named and skipped, with the reason.

    Raises InputError if fewer than `LEAST_PICTURES` (or `count`) can be used.
    """
    samples: list[Sample] = []
    skipped: list[str] = []
    for picture in pictures:
        if len(samples) == count:
            break
        try:
            image = picture.read()
            if picture.prompt is not None:
                checks.prompt(picture.prompt)
        except InputError as error:
            skipped.append(picture.name)
            if note is not None:
                note(f"skipped: {error.got if picture.name in error.got else f'{picture.name}: {error.got}'}")
            continue
        samples.append(
            Sample(image, picture.prompt or prompts[len(samples) % len(prompts)], picture.name, where=picture.where)
        )
    least = min(LEAST_PICTURES, count)
    if len(samples) < least:
        raise InputError(
            f"{len(samples)} usable pictures {where} ({len(skipped)} skipped, {len(samples) + len(skipped)} found)",
            wanted=f"at least {least}: {', '.join(PICTURE_SUFFIXES)}",
            do="give a source with more pictures, or leave --images out for generated scenes",
        )
    return SampleSet(tuple(samples), source, tuple(skipped))


def read_prompts(path: Path, checks: Checks = NO_CHECKS) -> tuple[str, ...]:
    """One prompt a line, blank lines left out.

    Raises InputError for a file that holds none, naming the line for a prompt that the model cannot take.
    """
    lines = read_lines(path, "a text file, one prompt a line")
    for line in lines:
        _check_prompt(line.text.strip(), line.where, checks)
    return tuple(line.text.strip() for line in lines)


def jsonl_samples(path: Path, *, count: int | None = None) -> SampleSet:
    """Lines of {"image": path, "prompt": text, "answer": text, "kind": text}; paths are relative to the file.

    Raises InputError that names the line for anything else: a measurement must not drop samples in silence.
    """
    samples = []
    for line in read_lines(path, "a JSONL file of image, prompt, answer")[:count]:
        record = json_record(line, ("image", "prompt", "answer"))
        try:
            image = open_picture(path.parent / record["image"])
        except InputError as error:
            raise at(line.where, error) from error
        kind = record.get("kind", "")
        samples.append(Sample(image, record["prompt"], record["image"], record["answer"], kind, line.where))
    return SampleSet(tuple(samples), f"lines of {path.name}")


@dataclass(frozen=True)
class Prepared:
    """A sample ready to run: what the reference takes, and its pixels, float32 [3,h,w] or as the processor has them."""

    input: ReferenceInput
    pixel_values: np.ndarray


def prepare(
    samples: Sequence[Sample],
    encoder: Encoder,
    vision: torch.nn.Module,
    *,
    progress: Report | None = None,
) -> list[Prepared]:
    """Token ids and image features [V,C] of every sample; `vision` maps pixel_values [B,3,h,w] to features [B,V,C], or
    to these and its class token's attention [B,V].

    A picture that occurs in several samples goes through the vision tower once.
    """
    import torch

    from calibrate.reference.records import ReferenceInput

    prepared: list[Prepared] = []
    seen: dict[bytes, tuple[torch.Tensor, torch.Tensor | None]] = {}
    for number, sample in enumerate(samples):
        try:
            encoded = encoder.encode([sample.image], [sample.prompt])
        except InputError as error:
            raise at(sample.where or sample.name, error) from error
        pixels = np.asarray(encoded.pixel_values, dtype=np.float32)
        key = pixels.tobytes()
        if key not in seen:
            with torch.inference_mode():
                made = vision(torch.from_numpy(pixels))
            seen[key] = (made[0][0], made[1][0]) if isinstance(made, tuple) else (made[0], None)
        features, attention = seen[key]
        ids = torch.as_tensor(np.asarray(encoded.input_ids[0]), dtype=torch.int64)
        given = ReferenceInput(ids, features, class_attention=attention)
        prepared.append(Prepared(given, pixels[0] if len(pixels) == 1 else pixels))
        if progress is not None:
            progress(number + 1, len(samples))
    return prepared
