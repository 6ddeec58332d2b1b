"""Running a bundle: pictures and prompts in, text out.

    model = btp_export.load("demo-bundle")
    model.generate(["cat.png"], ["what color is the circle ?"])[0].text

`generate` does everything; `encode`, `prefill` and `decode_step` are its parts, for measuring and checking.
"""

import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from btp_export.arguments import checked
from btp_export.model.pictures import each_once, fitted, require_fit
from btp_export.model.prompting import Encoded, Prompter
from btp_export.running.detokenise import Detokeniser, OnText, TextPieces
from btp_export.running.embedding import TokenEmbedding, filled
from btp_export.running.generation import Answer, answers_for, generate
from btp_export.running.memory_fit import check_fits_memory
from btp_export.running.opening import open_graphs
from btp_export.running.sampling import Sampling
from engines.chain import Chain
from engines.runners.interface import Loader, Runner
from graphs import names
from graphs.building.rope import token_tables
from graphs.files.bundle import ROPE_WEIGHTS, Bundle
from graphs.files.checkpoint import open_tensors
from graphs.files.pictures import open_picture, to_rgb
from graphs.pruning import kept_tokens
from graphs.records.errors import InputError
from graphs.records.progress import Note
from graphs.records.shapes import ShapeProfile
from graphs.records.stored_weights import Activations

if TYPE_CHECKING:
    from PIL import Image

    Pictures = Sequence[Image.Image | Path | str] | Image.Image | Path | str

Array = np.ndarray[Any, np.dtype[Any]]
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Prefill:
    """A batch of n samples after its prefill; the model's caches hold it until the next one.

    logits: [n, vocab] float32 of each sample's last token.
    kept: for each stage, [n, k] indices into the V image tokens, ascending; [n, 0] where it keeps none.
    kept_relative: the same as indices into the tokens that the stage chose from.
    lengths: for each segment, [n] valid cache rows.
    prefill_ms: the decoder chain with selection and head, without vision (with it if the bundle is one whole graph).
    select_ms: one for each stage; empty if the bundle is one whole graph. vision_ms: None then, and where the vision
    graph did not have to run.
    """

    logits: Array
    kept: tuple[Array, ...]
    kept_relative: tuple[Array, ...]
    lengths: tuple[Array, ...]
    prefill_ms: float
    select_ms: tuple[float, ...]
    vision_ms: float | None
    number: int


@dataclass(frozen=True)
class Generation:
    """One answer. Times are those of the batch it was part of.

    text: what was generated, without special tokens. token_ids: all ids, the end token included if it came.
    tokens_kept: image tokens kept by each stage. kept: for each stage, indices into the V image tokens.
    decode_ms_per_token: mean over the decode steps, None if the answer was a single token.
    vision_ms: None where the pictures were those of the batch before, and for a bundle that is one whole graph.
    unknown_tokens: how many tokens of the prompt the tokenizer does not know.
    """

    text: str
    token_ids: tuple[int, ...]
    tokens_kept: tuple[int, ...]
    kept: tuple[Array, ...]
    prefill_ms: float
    decode_ms_per_token: float | None
    select_ms: tuple[float, ...]
    vision_ms: float | None
    unknown_tokens: int = 0


def load(
    bundle: "Bundle | Path | str",
    *,
    profile: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    target: str | None = None,
    activations: Activations = "int8",
    cuda_graphs: bool = True,
    beside: "BundleModel | None" = None,
    note: Note = lambda text: None,
) -> "BundleModel":
    """Open a bundle for running: its graphs in ONNX Runtime, or the engines built from them for a target.

    Args:
        bundle: its folder, or an opened Bundle.
        profile: name of a shape profile; the first if left out.
        threads: threads inside an operator; all cores if left out. Engines have none.
        device: "cpu", "cuda", "cuda:<number>" or "auto"; engines run on the first GPU if nothing else is said.
        target: run the engines built for this device, which lie in the bundle, see docs/engines.md.
        activations: what ONNX Runtime multiplies four-bit weights with: rows rounded to int8, or float32 rows.
        cuda_graphs: whether a prefill and a decode step of engines are CUDA graphs. note: told where they cannot be.
        beside: a model with these settings that is open already; what both have is not opened again, see BundleModel.

    Raises InputError for a bundle that is missing, damaged, without that profile or without engines, and
    UnavailableError if its graphs or engines cannot run on this device.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
    chosen = opened.profile(profile).name
    loader, graphs = open_graphs(
        opened,
        chosen,
        threads=threads,
        device=device,
        target=target,
        activations=activations,
        cuda_graphs=cuda_graphs,
        note=note,
    )
    if target is None:
        check_fits_memory(opened, chosen, device, activations=activations)
    return BundleModel(opened, loader, profile=chosen, graphs=graphs, beside=beside)


def _alone(method: "Callable[Concatenate[BundleModel, P], T]") -> "Callable[Concatenate[BundleModel, P], T]":
    """A method that one thread runs at a time: the others wait until it is done."""

    @functools.wraps(method)
    def call(self: "BundleModel", /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._lock:
            return method(self, *args, **kwargs)

    return call


class BundleModel:
    """A bundle's graphs, ready to run. It holds one batch at a time: its caches are those of the latest prefill.

    Several threads may call it; one call runs at a time and the others wait. A thread whose `prefill` was followed by
    another's gets an InputError from `decode_step`, never the other's text. Two models answer at the same time.
    """

    def __init__(
        self,
        bundle: Bundle,
        loader: Loader,
        *,
        profile: str | None = None,
        graphs: Mapping[str, Path] | None = None,
        beside: "BundleModel | None" = None,
    ) -> None:
        """`graphs` are the files that the loader opens, by name; the bundle's own if left out.

        `beside` is another model of the same backend, device and settings: the vision graph, which no plan changes, is
        opened once for both where it is the same, and they are not to run at the same time.
        """
        self._lock = threading.RLock()
        self.bundle, self.spec = bundle, bundle.spec
        self.profile, self.plan = bundle.profile(profile), bundle.plan_for(profile)
        rope = open_tensors(bundle.weights / ROPE_WEIGHTS)
        own = {graph.name: bundle.root / graph.file for graph in bundle.graphs(self.profile.name)}
        self.chain = Chain(
            own if graphs is None else graphs,
            plan=self.plan,
            profile=self.profile,
            rope=token_tables((rope["cos"].read(), rope["sin"].read()), self.spec.decoder, self.profile),
            loader=loader,
            opened={} if beside is None else self._shared_with(beside),
        )
        self._embedding = TokenEmbedding(bundle, self.chain.dtype)
        self._prefills = 0

    def _shared_with(self, other: "BundleModel") -> dict[str, Runner]:
        """The vision graph that the other model has open, if it is this one's with the same weights."""
        if names.VISION not in other.chain.runners or self.bundle.manifest.weights != other.bundle.manifest.weights:
            return {}
        own, others = (
            {graph.name: graph.sha256 for graph in each.bundle.graphs(each.profile.name)} for each in (self, other)
        )
        same = own.get(names.VISION) == others[names.VISION]
        return {names.VISION: other.chain.runners[names.VISION]} if same else {}

    @cached_property
    def prompter(self) -> Prompter:
        """The model's processor, opened at first use."""
        return Prompter(self.bundle.processor, self.spec)

    @_alone
    @checked()
    def generate(
        self,
        images: "Pictures",
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        raw_prompt: bool = False,
        system: str | None = None,
        resize: bool = False,
        on_text: OnText | None = None,
    ) -> list[Generation]:
        """One answer for each picture and prompt; a single picture serves all prompts, and the other way round.

        More samples than the profile's batch are run in several batches; the vision graph does not run again for
        pictures that are those of the batch before. Sample i draws from its own generator, seeded with (seed, i), so
        its answer does not depend on its batch.

        Args:
            images: pictures or their files.
            prompts: questions; with `raw_prompt` whole texts that hold the image placeholder.
            max_new_tokens: at most the profile's new tokens, which is the default.
            temperature: 0 is greedy, see btp_export.running.sampling.
            top_p: draw only from the most probable tokens that together reach this share.
            seed: of the sampling.
            raw_prompt: do not use the chat template.
            system: a message before the question, as many tokens long as the one that the bundle was exported for.
            resize: scale pictures that do not fit the profile's size to it.
            on_text: called with (sample, piece of text) as text comes; the pieces of a sample make up its text.

        Raises InputError for what cannot be run, CheckError if a graph did not prune as planned.
        """
        room = room_in(self.profile, max_new_tokens)
        chosen_by = Sampling(temperature, top_p, seed)
        pictures, texts = paired(images, prompts)
        if resize:
            pictures, _ = fitted(pictures, self.spec, self.profile)
        else:
            require_fit(pictures, self.spec, self.profile)
        encoded = self.prompter.encode(pictures, texts, raw=raw_prompt, system=system, profile=self.profile)
        return self.answer(encoded, room=room, chosen_by=chosen_by, on_text=on_text)

    @_alone
    def answer(
        self, encoded: Encoded, *, room: int, chosen_by: Sampling, on_text: OnText | None = None
    ) -> list[Generation]:
        """One answer for each sample, of at most `room` tokens, in as many batches as it takes; see `generate`."""
        answers: list[Generation] = []
        for first in range(0, len(encoded), self.profile.batch):
            samples = range(first, min(first + self.profile.batch, len(encoded)))
            answers += self._generate(encoded, samples, room, chosen_by, on_text)
        return answers

    @_alone
    def encode(
        self,
        images: "Sequence[Image.Image]",
        prompts: Sequence[str],
        *,
        raw: bool = False,
        system: str | None = None,
    ) -> Encoded:
        """Token ids and pixels of the samples. Raises InputError if one does not fit the bundle."""
        pictures = each_once(to_rgb, images)
        require_fit(pictures, self.spec, self.profile)
        return self.prompter.encode(pictures, prompts, raw=raw, system=system, profile=self.profile)

    @_alone
    def prefill(
        self, encoded: Encoded, *, vision: Mapping[str, Array] | None = None, same_pictures: bool = False
    ) -> Prefill:
        """Run the samples up to their first logits; at most as many as the profile's batch.

        `vision` is `chain.vision_outputs` after an earlier prefill of the same pictures, to save the vision graph. With
        `same_pictures` it is saved too where they are those of the latest prefill.
        A smaller batch is filled up with its last sample, whose results are dropped. Raises CheckError if a stage did
        not keep exactly its tokens.
        """
        count, batch = len(encoded), self.profile.batch
        if count > batch:
            raise InputError(f"{count} samples", wanted=f"at most {batch}, the batch of profile {self.profile.name}")
        inputs = self._embedding.batch(encoded, self.profile, filled(count, batch))
        run = self.chain.prefill(inputs, vision=vision, same_pictures=same_pictures)
        self._prefills += 1
        own = {stage: indices[:count] for stage, indices in run.kept.items()}
        relative = kept_tokens.every_stage(own, [stage.keep for stage in self.plan.stages], samples=count)
        segmented = names.WHOLE not in run.milliseconds
        stages = range(len(self.plan.stages)) if segmented else range(0)
        return Prefill(
            logits=run.logits[:count],
            kept=tuple(kept_tokens.absolute(relative)),
            kept_relative=tuple(relative),
            lengths=tuple(lengths[:count] for lengths in run.lengths),
            prefill_ms=run.milliseconds["total"],
            select_ms=tuple(run.milliseconds[names.select(stage)] for stage in stages),
            vision_ms=run.milliseconds.get(names.VISION),
            number=self._prefills,
        )

    @_alone
    def decode_step(self, prefill: Prefill, token_ids: Sequence[int]) -> Array:
        """Append one token to each sample: ids [n] -> logits [n, vocab] float32.

        Raises InputError if the caches are full, or hold another batch by now.
        """
        logits: Array = self._step(prefill, token_ids).copy()
        return logits

    def _step(self, prefill: Prefill, token_ids: Sequence[int]) -> Array:
        """`decode_step` without a copy of the logits, which the next step overwrites."""
        count = len(prefill.logits)
        if prefill.number != self._prefills:
            raise InputError("the caches hold a later batch", wanted="the latest prefill", do="prefill again")
        if len(token_ids) != count:
            raise InputError(f"{len(token_ids)} token ids", wanted=f"one for each of the {count} samples")
        ids = [token_ids[sample] for sample in filled(count, self.profile.batch)]
        return self.chain.decode(self._embedding.rows(ids))[:count]

    @_alone
    def greedy(self, prefill: Prefill, encoded: Encoded, room: int) -> list[Answer]:
        """The likeliest answers of at most `room` tokens, by the checkpoint's generation settings."""
        answers = answers_for(self.spec, encoded.input_ids, room=room)
        self.complete(prefill, answers)
        return answers

    @_alone
    def complete(self, prefill: Prefill, answers: Sequence[Answer]) -> list[float]:
        """Grow the answers until each is done; gives the milliseconds of every decode step."""
        times: list[float] = []

        def decode(ids: Sequence[int]) -> Array:
            start = time.perf_counter()
            logits = self._step(prefill, ids)
            times.append((time.perf_counter() - start) * 1000.0)
            return logits

        generate(answers, prefill.logits, decode)
        return times

    # Parts of generate

    def _generate(
        self, encoded: Encoded, samples: range, room: int, chosen_by: Sampling, on_text: OnText | None
    ) -> list[Generation]:
        """The answers of one batch."""
        part = encoded.part(samples)
        prefill = self.prefill(part, same_pictures=True)
        answers = answers_for(self.spec, part.input_ids, room=room, chosen_by=chosen_by, first=samples.start)
        texts = [TextPieces(sample, Detokeniser(self.prompter.tokens), on_text) for sample in samples]
        for answer, text in zip(answers, texts, strict=True):
            answer.on_token = text.add
        times = self.complete(prefill, answers)
        return [
            Generation(
                text=text.detokeniser.text,
                token_ids=tuple(answer.ids),
                tokens_kept=tuple(stage.keep for stage in self.plan.stages),
                kept=tuple(indices[place] for indices in prefill.kept),
                prefill_ms=prefill.prefill_ms,
                decode_ms_per_token=sum(times) / len(times) if times else None,
                select_ms=prefill.select_ms,
                vision_ms=prefill.vision_ms,
                unknown_tokens=part.unknown[place],
            )
            for place, (answer, text) in enumerate(zip(answers, texts, strict=True))
        ]


def room_in(profile: ShapeProfile, max_new_tokens: int | None) -> int:
    """Tokens that may be generated: so many, or all that the caches hold. Raises InputError for more, or none."""
    room = profile.new_tokens
    if max_new_tokens is None:
        return room
    if not 1 <= max_new_tokens <= room:
        raise InputError(
            f"{max_new_tokens} new tokens",
            wanted=f"1 to {room}, the room in the caches of profile {profile.name}",
            do="export again with a larger --max-new-tokens" if max_new_tokens > room else "ask for one or more",
        )
    return max_new_tokens


def paired(images: "Pictures", prompts: Sequence[str] | str) -> "tuple[list[Image.Image], list[str]]":
    """As many pictures as prompts, the pictures upright and in RGB. Raises InputError where they do not go together."""
    given = (
        list(images) if isinstance(images, Sequence) and not isinstance(images, (str, bytes, bytearray)) else [images]
    )
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None:
        raise InputError(f"a prompt of type {type(wrong).__name__}", wanted="text")
    count = max(len(given), len(texts))
    if 0 in (len(given), len(texts)) or not {len(given), len(texts)} <= {1, count}:
        raise InputError(
            f"{len(given)} pictures and {len(texts)} prompts",
            wanted="one prompt for each picture, one picture for all prompts, or one prompt for all pictures",
            do="ask them in several runs",
        )
    opened = [_opened(item) for item in given]
    return opened * (count // len(opened)), texts * (count // len(texts))


def _opened(item: "Image.Image | Path | str") -> "Image.Image":
    from PIL import Image

    if isinstance(item, (str, Path)):
        return open_picture(Path(item))
    if isinstance(item, Image.Image):
        return to_rgb(item)
    raise InputError(
        f"a picture of type {type(item).__name__}",
        wanted="the name of a file or a PIL image, one or a list of them",
        do="PIL.Image.fromarray(array) for an array, PIL.Image.open for bytes in io.BytesIO",
    )
