"""From pictures and prompts to what the graphs take, through the model's own processor and chat template.

A bundle says in processor/preprocess.json what its processor does. A checkpoint, and a bundle of earlier versions, has
transformers' files only, and transformers reads them. Nothing is fetched from the network and no code from the model's
folder is run.
"""

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from btp_export.families import family_of
from btp_export.families._chat import conversation_text, refuse_placeholders
from btp_export.model.pictures import each_once
from btp_export.preprocess.processor import Processor, read_processor
from graphs.files.paths import require_text
from graphs.records.errors import InputError, UnavailableError
from graphs.records.preprocess import PREPROCESS
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import ModelSpec


@dataclass(frozen=True)
class Encoded:
    """A batch of n samples.

    input_ids: for each sample, int64 [P + V + t], image tokens expanded, t tokens after the image (t differs).
    pixel_values: float32, the samples' own one after another as transformers' processor returns them: [n, 3, h, w], or
        what else the model takes (ShapeProfile.pixel_shape).
    unknown: for each sample, how many tokens of the text the tokenizer does not know.
    """

    input_ids: tuple[np.ndarray[Any, np.dtype[np.int64]], ...]
    pixel_values: np.ndarray[Any, np.dtype[np.float32]]
    prefix_tokens: int
    image_tokens: int
    unknown: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample, P + V + t."""
        return tuple(len(ids) for ids in self.input_ids)

    @property
    def text_lengths(self) -> tuple[int, ...]:
        """Tokens after the image of each sample, t."""
        return tuple(length - self.prefix_tokens - self.image_tokens for length in self.lengths)

    def part(self, samples: range) -> "Encoded":
        """Only these samples."""
        return replace(
            self,
            input_ids=tuple(self.input_ids[n] for n in samples),
            pixel_values=self.pixels(samples),
            unknown=tuple(self.unknown[n] for n in samples),
        )

    def pixels(self, samples: Iterable[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """`pixel_values` of these samples, one after another."""
        rows = len(self.pixel_values) // len(self)
        return np.concatenate([self.pixel_values[n * rows : (n + 1) * rows] for n in samples])

    @staticmethod
    def joined(samples: "Sequence[Encoded]") -> "Encoded":
        """Samples that were encoded one by one, for the same profile, as one batch."""
        return replace(
            samples[0],
            input_ids=tuple(ids for sample in samples for ids in sample.input_ids),
            pixel_values=np.concatenate([sample.pixel_values for sample in samples]),
            unknown=tuple(count for sample in samples for count in sample.unknown),
        )

    def check(self, profile: ShapeProfile, *, most: int | None = None) -> None:
        """Raise InputError unless every sample fits the profile's image tokens, pixels and text bucket.

        `most` positions is what the model has: where no bucket would be large enough, the advice is another.
        """
        self.check_picture(profile)
        for text in self.text_lengths:
            if text > profile.text_tokens:
                bucket = -(-text // 16) * 16  # with room for a prompt that is a few tokens longer
                room = None if most is None else most - profile.max_positions + profile.text_tokens
                larger = f", or export again with --text-tokens {bucket}" if room is None or bucket <= room else ""
                raise InputError(
                    f"the prompt has {text} tokens after the image",
                    wanted=f"at most {profile.text_tokens} (text bucket of profile {profile.name})",
                    do=f"shorten the prompt{larger}",
                )

    def check_picture(self, profile: ShapeProfile) -> None:
        """Raise InputError unless the samples have the profile's image tokens and pixels."""
        rows, *rest = profile.pixel_input(self.pixel_values.shape[1])
        shape = (rows // profile.batch * len(self), *rest)
        if self.image_tokens != profile.image_tokens or self.pixel_values.shape != shape:
            got, wanted = (" x ".join(map(str, size)) for size in _sizes(self.pixel_values.shape, shape))
            raise InputError(
                f"the processor makes {self.image_tokens} image tokens from {got} pixels",
                wanted=f"{profile.image_tokens} tokens from {wanted} pixels (profile {profile.name})",
                do="restore the processor files that the bundle was exported with",
            )


class Prompter:
    """A model's processor and chat template; the processor is what the folder says unless another one is given.

    Raises InputError if the folder holds no usable processor, UnavailableError if only transformers could read it.
    """

    def __init__(self, processor_folder: Path, spec: ModelSpec, processor: Processor | None = None) -> None:
        self.folder, self.spec = processor_folder, spec
        self.processor = open_processor(processor_folder) if processor is None else processor
        self.tokens, self.image_token = self.processor.tokens, self.processor.image_token

    def encode(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        *,
        raw: bool = False,
        system: str | None = None,
        profile: ShapeProfile | None = None,
    ) -> Encoded:
        """One sample for each picture (upright, in RGB: graphs/files/pictures.py) and prompt.

        A prompt is put into the chat template after the picture; with `raw` it is the whole text as the model sees it
        and holds the image placeholder once. `system` takes the place of the system message that the bundle was made
        for, and must be as many tokens long. With `profile` the samples are checked to fit it.

        Raises InputError for an empty prompt, a raw prompt without the placeholder, a text that does not have the
        prefix length P of the bundle, or a sample that does not fit the profile.
        """
        if len(images) != len(prompts) or not images:
            raise InputError(f"{len(images)} pictures and {len(prompts)} prompts", wanted="one picture for each prompt")
        texts = [self.text(prompt, raw=raw, system=system) for prompt in prompts]
        return self._encoded(images, texts, system, profile)

    def conversation(
        self,
        image: Image.Image,
        prompt: str,
        later: Sequence[str],
        *,
        system: str | None = None,
        profile: ShapeProfile | None = None,
    ) -> Encoded:
        """One sample that goes on after the first question: `later` is in turn an answer and the next question.

        Everything else, and what is raised, as for `encode`.
        """
        return self._encoded([image], [self.text(prompt, later=later, system=system)], system, profile)

    def _encoded(
        self, images: Sequence[Image.Image], texts: Sequence[str], system: str | None, profile: ShapeProfile | None
    ) -> Encoded:
        """Samples of whole texts; see `encode`."""
        ids = tuple(self._ids(image, text) for image, text in zip(images, texts, strict=True))
        pixels = each_once(self.processor.pixels, images)
        image_tokens = self._span(ids, system)
        unknown = self.processor.steps.text.unknown_id
        encoded = Encoded(
            input_ids=ids,
            pixel_values=np.concatenate(pixels).astype(np.float32, copy=False),
            prefix_tokens=self.spec.prefix_tokens,
            image_tokens=image_tokens,
            unknown=tuple(0 if unknown is None else int((row == unknown).sum()) for row in ids),
        )
        if profile is not None:
            encoded.check(profile, most=self.spec.decoder.max_positions)
        return encoded

    def text(self, prompt: str, *, later: Sequence[str] = (), raw: bool = False, system: str | None = None) -> str:
        """The whole text as the model sees it, with the image placeholder once; `system` and `later` as in `encode` and
        `conversation`.
        """
        for said in (prompt, *later):
            if not said.strip():
                raise InputError("the prompt is empty", wanted="a question or an instruction", do='--prompt "..."')
            require_text(said, "the prompt")
        if not raw:
            for said in (prompt, *later):
                refuse_placeholders(self.processor, said)
            chosen = self.spec.system if system is None else system
            return conversation_text(self.processor, prompt, later=later, system=chosen)
        if system is not None:
            raise InputError("--system with --raw-prompt", wanted="one of them", do="write it into the raw prompt")
        if (count := prompt.count(self.image_token)) != 1:
            raise InputError(
                f"the raw prompt holds the image placeholder {self.image_token} {count} times",
                wanted="once",
                do=f"write {self.image_token} where the image belongs",
            )
        refuse_placeholders(self.processor, prompt.replace(self.image_token, ""))
        return prompt

    def token_ids(self, text: str) -> list[int]:
        """The tokens of a text by itself, without begin or end."""
        return self.tokens.ids(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special ones."""
        return self.tokens.text(ids)

    def ids(self, image: Image.Image, prompt: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Token ids of one sample (the picture in RGB), [P + V + t], not checked."""
        return self._ids(image, self.text(prompt))

    def _ids(self, image: Image.Image, text: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        tokens = family_of(self.spec).layout(self.spec, (image.height, image.width)).image_tokens
        return np.array(self.processor.ids(text, tokens), np.int64)

    def _span(self, ids: Sequence[np.ndarray[Any, Any]], system: str | None) -> int:
        """Image tokens V, after checking that they stand together, right after the prefix, with text behind them."""
        counts = set()
        for row in ids:
            # The graphs take the picture's rows from one place, P to P + V, which is fixed when they are built.
            places = np.flatnonzero(row == self.spec.image_token_id)
            if len(places) == 0 or places[-1] - places[0] + 1 != len(places):
                raise InputError(
                    f"the processor makes {len(places)} image tokens that do not stand together",
                    wanted="one contiguous run of image tokens",
                    do="use one picture for each prompt",
                )
            if places[0] != self.spec.prefix_tokens:
                raise InputError(
                    f"{places[0]} tokens before the image" + ("" if system is None else " with this system message"),
                    wanted=f"{self.spec.prefix_tokens}, what the bundle is built for",
                    do="begin a raw prompt as the chat template does, or leave out --raw-prompt"
                    if system is None
                    else f"export a bundle for it: btp-export export --model NAME --system {shlex.quote(system)}",
                )
            if places[-1] + 1 == len(row):
                raise InputError(
                    "no text after the image", wanted="the question after it", do="put the text behind the image"
                )
            counts.add(len(places))
        if len(counts) != 1:
            raise InputError(
                f"pictures of {', '.join(map(str, sorted(counts)))} image tokens in one batch",
                wanted="pictures that make the same number of image tokens",
                do="run them one by one",
            )
        return int(counts.pop())


def open_processor(folder: Path) -> Processor:
    """The processor of a bundle's folder, by transformers where an earlier version wrote no preprocess.json.

    Raises InputError if it is not usable, UnavailableError if transformers is needed and not installed.
    """
    if (folder / PREPROCESS).is_file():
        return read_processor(folder)
    from btp_export.families._describe import checkpoint_processor

    try:
        return checkpoint_processor(folder)
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"{folder} has no {PREPROCESS}, so an earlier version exported it, and {error.name} is not installed",
            wanted=f"{PREPROCESS}, or transformers, which reads the other files",
            do="export the bundle again, or pip install 'btp-export[export]'",
        ) from error


def _sizes(*shapes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """What distinguishes shapes of pixels: height and width of [n,3,h,w], everything else of others."""
    plain = all(len(shape) == 4 for shape in shapes)
    return (shape[2:] if plain else shape for shape in shapes)
