"""What a model is calibrated and measured on: pictures with prompts.

They come from generated scenes, a folder, a JSONL file or a Hugging Face data set (calibrate/data/hub_data.py). For
calibration a picture that cannot be read is named and skipped, and too few are an error; for a measurement
(`jsonl_samples`) it is an error at once, because a score over fewer questions is another score.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from calibrate.data import scenes
from calibrate.reference.records import ReferenceInput
from graphs.records.errors import InputError
from graphs.records.progress import Note, Report

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
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
    """One picture with one prompt; `answer` and `kind` where they are known."""

    image: Image.Image
    prompt: str
    name: str
    answer: str | None = None
    kind: str = ""


@dataclass(frozen=True)
class SampleSet:
    """Samples and where they came from; `skipped` names what could not be read."""

    samples: tuple[Sample, ...]
    source: str
    skipped: tuple[str, ...] = ()

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
    made = scenes.samples(count, seed=seed, split=split)
    samples = tuple(
        Sample(sample.image, sample.question, f"scene {sample.scene_seed}", sample.answer, sample.kind)
        for sample in made
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


def calibration_samples(
    images: str | None,
    *,
    prompts: Path | None = None,
    count: int = DEFAULT_SAMPLES,
    seed: int = 0,
    note: Note | None = None,
) -> SampleSet:
    """Up to `count` samples in a seeded order, from where `images` says.

    None: generated scenes. Otherwise a folder of pictures, a JSONL file of image and prompt, `hf:owner/name[:split]`,
    or a folder that `datasets` saved. `prompts` is a file of them, one a line, which then take turns.
    Raises InputError for a source that cannot be used or holds too few pictures, UnavailableError for a data set when
    `datasets` is not installed or the hub cannot be reached.
    """
    from calibrate.data import hub_data

    if images is None:
        return scene_samples(count, seed=seed, split="calibration")
    given = None if prompts is None else read_prompts(prompts)
    path = Path(images).expanduser()
    if images.startswith(hub_data.PREFIX) or hub_data.is_saved(path):
        return hub_data.samples(images, prompts=given, count=count, seed=seed, note=note)
    if path.is_dir():
        return folder_samples(path, prompts=given or DEFAULT_PROMPTS, count=count, seed=seed, note=note)
    if path.is_file():
        return jsonl_pictures(path, prompts=given, count=count, seed=seed, note=note)
    raise InputError(
        f"{images} is not there",
        wanted="a folder of pictures, a JSONL file of image and prompt, or hf:owner/name[:split]",
        do="--images DIR",
    )


def folder_samples(
    folder: Path, *, prompts: Sequence[str] = DEFAULT_PROMPTS, count: int, seed: int, note: Note | None = None
) -> SampleSet:
    """Up to `count` pictures of a folder (its subfolders too) in a seeded order, prompts taking turns.

    A picture that cannot be read is named and skipped. Raises InputError if the folder is not there or fewer than
    `LEAST_PICTURES` pictures can be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", wanted="a folder of pictures", do="--images DIR")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)

    def found() -> Iterator[Found]:
        for place in np.random.default_rng(seed).permutation(len(paths)):
            path = paths[place]
            yield Found(path.relative_to(folder).as_posix(), lambda path=path: read_picture(path))  # type: ignore[misc]

    return take(found(), prompts, count=count, where=f"in {folder}", source="pictures of a folder", note=note)


def jsonl_pictures(
    path: Path, *, prompts: Sequence[str] | None = None, count: int, seed: int, note: Note | None = None
) -> SampleSet:
    """Up to `count` lines of {"image": path, "prompt": text} in a seeded order; paths are relative to the file.

    `prompts` replace the file's own. A picture that cannot be read is named and skipped, a line that is no such object
    is an error. Raises InputError for that and for too few pictures.
    """
    lines = _jsonl_lines(path, "image, prompt")
    wanted = ("image",) if prompts else ("image", "prompt")
    records = [_jsonl_record(path, number, line, wanted) for number, line in lines]

    def found() -> Iterator[Found]:
        for place in np.random.default_rng(seed).permutation(len(records)):
            image = records[place]["image"]
            prompt = None if prompts else records[place]["prompt"]
            yield Found(image, lambda image=image: read_picture(path.parent / image), prompt)  # type: ignore[misc]

    source = f"lines of {path.name}"
    return take(found(), prompts or DEFAULT_PROMPTS, count=count, where=f"in {path}", source=source, note=note)


def take(
    found: Iterable[Found], prompts: Sequence[str], *, count: int, where: str, source: str, note: Note | None
) -> SampleSet:
    """The first `count` pictures that can be read; the others are named and skipped.

    Raises InputError if fewer than `LEAST_PICTURES` (or `count`) can be read.
    """
    samples: list[Sample] = []
    skipped: list[str] = []
    for one in found:
        if len(samples) == count:
            break
        try:
            image = one.read()
        except InputError as error:
            skipped.append(one.name)
            if note is not None:
                note(f"skipped: {error.got}")
            continue
        samples.append(Sample(image, one.prompt or prompts[len(samples) % len(prompts)], one.name))
    least = min(LEAST_PICTURES, count)
    if len(samples) < least:
        raise InputError(
            f"{len(samples)} readable pictures {where} "
            f"({len(skipped)} unreadable, {len(samples) + len(skipped)} found)",
            wanted=f"at least {least}: {', '.join(PICTURE_SUFFIXES)}",
            do="give a source with more pictures, or leave --images out for generated scenes",
        )
    return SampleSet(tuple(samples), source, tuple(skipped))


def read_picture(source: Path | bytes, name: str = "") -> Image.Image:
    """A picture, a file or its bytes, as RGB. Raises InputError for what is not a whole picture, or a huge one."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            rgb: Image.Image = picture.convert("RGB")
            return rgb
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        where = name or (source if isinstance(source, Path) else "in memory")
        reason = "not a picture" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(f"cannot read the picture {where}: {reason}", wanted="a whole picture file") from error


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt a line, blank lines left out. Raises InputError for a file that holds none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the prompts {path}: {error}", wanted="a text file, one prompt a line") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise InputError(f"{path} holds no prompt", wanted="one prompt a line", do="write some, or leave --prompts out")
    return prompts


def jsonl_samples(path: Path, *, count: int | None = None) -> SampleSet:
    """Lines of {"image": path, "prompt": text, "answer": text, "kind": text}; paths are relative to the file.

    Raises InputError that names the line for anything else: a measurement must not drop samples in silence.
    """
    lines = _jsonl_lines(path, "image, prompt, answer")[:count]
    samples = []
    for number, line in lines:
        record = _jsonl_record(path, number, line, ("image", "prompt", "answer"))
        image = read_picture(path.parent / record["image"])
        samples.append(Sample(image, record["prompt"], record["image"], record["answer"], record.get("kind", "")))
    return SampleSet(tuple(samples), f"lines of {path.name}")


def _jsonl_lines(path: Path, keys: str) -> list[tuple[int, str]]:
    """The lines that hold something, with their numbers."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}", wanted=f"a JSONL file of {keys}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise InputError(f"{path} holds no samples", wanted=f"a JSONL file of {keys}")
    return numbered


def _jsonl_record(path: Path, number: int, line: str, keys: Sequence[str]) -> dict[str, str]:
    """One line with `keys`, and `kind` where it is given; all of them text."""
    example = {"image": "cat.png", "prompt": "What is it?", "answer": "a cat"}
    try:
        record = json.loads(line)
        found = {key: record[key] for key in keys} | ({"kind": record["kind"]} if "kind" in record else {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else "not a JSON object"
        raise InputError(
            f"{path} line {number}: {reason}",
            wanted=json.dumps({key: example[key] for key in keys}),
            do="mend the line",
        ) from error
    if not all(isinstance(value, str) for value in found.values()):
        raise InputError(f"{path} line {number}: a value is not text", wanted=f"{', '.join(keys)} as text")
    return found


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
    """Token ids and image features [V,C] of every sample; `vision` maps pixel_values [B,3,h,w] to features [B,V,C].

    A picture that occurs in several samples goes through the vision tower once.
    """
    prepared: list[Prepared] = []
    features: dict[bytes, torch.Tensor] = {}
    for number, sample in enumerate(samples):
        encoded = encoder.encode([sample.image], [sample.prompt])
        pixels = np.asarray(encoded.pixel_values, dtype=np.float32)
        key = pixels.tobytes()
        if key not in features:
            with torch.inference_mode():
                features[key] = vision(torch.from_numpy(pixels))[0]
        ids = torch.as_tensor(np.asarray(encoded.input_ids[0]), dtype=torch.int64)
        prepared.append(Prepared(ReferenceInput(ids, features[key]), pixels[0] if len(pixels) == 1 else pixels))
        if progress is not None:
            progress(number + 1, len(samples))
    return prepared
