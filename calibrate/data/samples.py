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
class SourcePicture:
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


@dataclass(frozen=True)
class Choice:
    """Which pictures of a source are taken, and what they are asked.

    At most `count` in the order that `seed` decides. `prompts` take turns and replace the source's own, if it has any.
    A picture that cannot be used is skipped, and `note` is told its name and the reason.
    """

    count: int
    seed: int = 0
    prompts: Sequence[str] | None = None
    note: Note | None = None
    checks: Checks = NO_CHECKS

    def order(self, pictures: int) -> list[int]:
        """The numbers of a source's pictures, shuffled."""
        order: list[int] = np.random.default_rng(self.seed).permutation(pictures).tolist()
        return order


def folder_samples(folder: Path, choice: Choice) -> SampleSet:
    """Pictures of a folder, its subfolders too.

    Raises InputError if the folder is not there or fewer than `LEAST_PICTURES` pictures can be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", wanted="a folder of pictures", do="--images DIR")
    paths = picture_files(folder, choice.note)
    ordered = (paths[place] for place in choice.order(len(paths)))
    pictures = (
        SourcePicture(path.relative_to(folder).as_posix(), functools.partial(open_picture, path)) for path in ordered
    )
    return take(pictures, choice, where=f"in {folder}", source="pictures of a folder")


def jsonl_pictures(path: Path, choice: Choice) -> SampleSet:
    """Lines of {"image": path, "prompt": text}; paths are relative to the file.

    Raises InputError for a line that is no such object or has a prompt that the model cannot take, and for too few
    pictures.
    """
    keys = ("image",) if choice.prompts else ("image", "prompt")
    lines = read_lines(path, "JSONL file of image, prompt")
    records = [json_record(line, keys) for line in lines]
    for line, record in zip(lines, records, strict=True):
        _check_prompt(record.get("prompt"), line.where, choice.checks)

    def pictures() -> Iterator[SourcePicture]:
        for place in choice.order(len(records)):
            image, prompt = records[place]["image"], records[place].get("prompt")
            read = functools.partial(open_picture, path.parent / image)
            yield SourcePicture(image, read, None if choice.prompts else prompt, lines[place].where)

    return take(pictures(), choice, where=f"in {path}", source=f"lines of {path.name}")


def pictures_named(path: Path) -> list[Path]:
    """The pictures that a JSONL file names, there or not; none for a folder. Raises InputError as above."""
    if not path.is_file():
        return []
    return [path.parent / json_record(line, ("image",))["image"] for line in read_lines(path, "JSONL file")]


def _check_prompt(prompt: str | None, where: str, checks: Checks) -> None:
    if prompt is None:
        return
    try:
        checks.prompt(prompt)
    except InputError as error:
        raise at(where, error) from error


def take(pictures: Iterable[SourcePicture], choice: Choice, *, where: str, source: str) -> SampleSet:
    """The first pictures that can be used, in the order in which they come.

    Raises InputError if fewer than `LEAST_PICTURES` (or the choice's count) can be used.
    """
    prompts, count, note = choice.prompts or DEFAULT_PROMPTS, choice.count, choice.note
    samples: list[Sample] = []
    skipped: list[str] = []
    for picture in pictures:
        if len(samples) == count:
            break
        try:
            image = picture.read()
            if picture.prompt is not None:
                choice.checks.prompt(picture.prompt)
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
    lines = read_lines(path, "text file, one prompt a line")
    for line in lines:
        _check_prompt(line.text.strip(), line.where, checks)
    return tuple(line.text.strip() for line in lines)


def jsonl_samples(path: Path, *, count: int | None = None) -> SampleSet:
    """Lines of {"image": path, "prompt": text, "answer": text, "kind": text}; paths are relative to the file.

    Raises InputError that names the line for anything else: a measurement must not drop samples in silence.
    """
    samples = []
    for line in read_lines(path, "JSONL file of image, prompt, answer")[:count]:
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
    from calibrate.reference.side_by_side import side_by_side

    ids, pixels, keys = [], [], []
    for sample in samples:
        try:
            encoded = encoder.encode([sample.image], [sample.prompt])
        except InputError as error:
            raise at(sample.where or sample.name, error) from error
        ids.append(torch.as_tensor(np.asarray(encoded.input_ids[0]), dtype=torch.int64))
        pixels.append(np.asarray(encoded.pixel_values, dtype=np.float32))
        keys.append(pixels[-1].tobytes())
    different = dict(zip(keys, pixels, strict=True))
    features: dict[bytes, tuple[torch.Tensor, torch.Tensor | None]] = {}
    with torch.inference_mode(), side_by_side(sum(part.nbytes for part in vision.parameters())) as each:
        for key, made in zip(different, each(vision, map(torch.from_numpy, different.values())), strict=True):
            features[key] = (made[0][0], made[1][0]) if isinstance(made, tuple) else (made[0], None)
            if progress is not None:
                progress(len(features), len(different))
    return [
        Prepared(
            ReferenceInput(prompt, features[key][0], class_attention=features[key][1]),
            picture[0] if len(picture) == 1 else picture,
        )
        for prompt, picture, key in zip(ids, pixels, keys, strict=True)
    ]
