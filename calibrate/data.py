"""What a model is calibrated and measured on: pictures with prompts, of generated scenes, a folder or a JSONL file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from calibrate import scenes
from calibrate.records import ReferenceInput
from graphs.errors import InputError

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

Note = Callable[[str], None]


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
    """Generated scenes with questions (calibrate/scenes.py); splits never share a scene."""
    made = scenes.samples(count, seed=seed, split=split)
    samples = tuple(
        Sample(sample.image, sample.question, f"scene {sample.scene_seed}", sample.answer, sample.kind)
        for sample in made
    )
    return SampleSet(samples, f"generated scenes, split {split}, seed {seed}")


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
    order = np.random.default_rng(seed).permutation(len(paths))
    samples: list[Sample] = []
    skipped: list[str] = []
    for place in order:
        if len(samples) == count:
            break
        name = paths[place].relative_to(folder).as_posix()
        try:
            image = read_picture(paths[place])
        except InputError as error:
            skipped.append(name)
            if note is not None:
                note(f"skipped: {error.got}")
            continue
        samples.append(Sample(image, prompts[len(samples) % len(prompts)], name))
    least = min(LEAST_PICTURES, count)
    if len(samples) < least:
        raise InputError(
            f"{len(samples)} readable pictures in {folder} ({len(skipped)} unreadable, {len(paths)} found)",
            wanted=f"at least {least}: {', '.join(PICTURE_SUFFIXES)}",
            do="give a folder with more pictures, or leave --images out for generated scenes",
        )
    return SampleSet(tuple(samples), "pictures of a folder", tuple(skipped))


def read_picture(path: Path) -> Image.Image:
    """A picture as RGB. Raises InputError for a file that is not a whole picture, or a huge one."""
    try:
        with Image.open(path) as picture:
            rgb: Image.Image = picture.convert("RGB")
            return rgb
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise InputError(f"cannot read the picture {path}: {error}", wanted="a whole picture file") from error


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
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}", wanted="a JSONL file of image, prompt, answer") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()][:count]
    if not numbered:
        raise InputError(f"{path} holds no samples", wanted="a JSONL file of image, prompt, answer")
    samples = tuple(_jsonl_sample(path, number, line) for number, line in numbered)
    return SampleSet(samples, f"lines of {path.name}")


def _jsonl_sample(path: Path, number: int, line: str) -> Sample:
    try:
        record = json.loads(line)
        image, prompt, answer = (record[key] for key in ("image", "prompt", "answer"))
        kind = record.get("kind", "")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else "not a JSON object"
        raise InputError(
            f"{path} line {number}: {reason}",
            wanted='{"image": "cat.png", "prompt": "What is it?", "answer": "a cat"}',
            do="mend the line",
        ) from error
    if not all(isinstance(value, str) for value in (image, prompt, answer, kind)):
        raise InputError(f"{path} line {number}: a value is not text", wanted="image, prompt, answer as text")
    return Sample(read_picture(path.parent / image), prompt, image, answer, kind)


@dataclass(frozen=True)
class Prepared:
    """A sample ready to run: what the reference takes, and its pixels [3,h,w] float32."""

    input: ReferenceInput
    pixel_values: np.ndarray


def prepare(
    samples: Sequence[Sample],
    encoder: Encoder,
    vision: torch.nn.Module,
    *,
    progress: Callable[[int, int], None] | None = None,
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
        prepared.append(Prepared(ReferenceInput(ids, features[key]), pixels[0]))
        if progress is not None:
            progress(number + 1, len(samples))
    return prepared
