"""A bundle as a model of lmms-eval, the harness with MME, MMBench, POPE, GQA, ScienceQA, MM-Vet and many more.

    lmms-eval --model btp_export --model_args bundle=llava-1.5-7b-bundle --tasks pope,gqa

lmms-eval finds `manifest` by the entry point of the group "lmms_eval.models" (pyproject.toml). This module is imported
by lmms-eval alone: nothing else here needs it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from btp_export.console import note
from btp_export.model.pictures import fitted
from btp_export.planning.plan_files import CALIBRATED
from btp_export.running.generation import Answer
from btp_export.running.runtime import BundleModel, load
from graphs.building.derived_bundles import derive
from graphs.files.bundle import Bundle
from graphs.files.folders import scratch_beside
from graphs.files.pictures import to_rgb
from graphs.records.errors import InputError

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance
    from PIL import Image

PLACEHOLDER = "<image>"  # what lmms-eval's tasks write where a picture belongs, whatever the model's own token is


def manifest() -> ModelManifest:
    """What lmms-eval's model registry wants to know."""
    return ModelManifest(model_id="btp_export", simple_class_path=f"{__name__}.BtpExport")


class BtpExport(lmms):  # type: ignore[misc]
    """A bundle answering lmms-eval's requests, through the exported graphs.

    Args (the `key=value` of --model_args):
        bundle: its folder.
        plan: the bundle's own plan (btp), none, a preset or a plan file; another plan than the bundle's is derived.
        compression: budget of a preset; without it presets get the average tokens of the bundle's own plan.
        profile, threads, device: as `btp-export run` takes them; pictures that do not fit the profile are scaled to it.
        batch_size, max_batch_size: lmms-eval's own; the batch is the profile's, so only 1 or that number are taken.

    Raises InputError and UnavailableError as btp_export.load does.
    """

    is_simple = True

    def __init__(
        self,
        bundle: str,
        plan: str = CALIBRATED,
        compression: float | None = None,
        profile: str | None = None,
        threads: int | None = None,
        device: str = "cpu",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self._cleanup = contextlib.ExitStack()
        opened = _with_plan(Bundle.open(Path(bundle)), plan, compression, self._cleanup)
        self.model: BundleModel = load(opened, profile=profile, threads=threads, device=device)
        self._warned = False
        if str(batch_size) not in ("auto", "1", str(self.model.profile.batch)):
            raise InputError(
                f"--batch_size {batch_size}",
                wanted=f"{self.model.profile.batch}, the batch of profile {self.model.profile.name}",
                do="btp-export export --batch B",
            )

    def clean(self) -> None:
        """Release what the derived plan took on disk."""
        self._cleanup.close()
        super().clean()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers; requests with the same settings share batches.

        Raises InputError for a request without exactly one picture, or a prompt that does not fit the bundle.
        """
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(place)
        for places in groups.values():
            settings = requests[places[0]].args[1]
            temperature, top_p = _sampling(settings)
            asked = [_question(request, self.task_dict) for request in (requests[place] for place in places)]
            generations = self.model.generate(
                [picture for picture, _ in asked],
                [prompt for _, prompt in asked],
                max_new_tokens=self._room(settings.get("max_new_tokens")),
                temperature=temperature,
                top_p=top_p,
                resize=True,
            )
            for place, answer in zip(places, generations, strict=True):
                answers[place] = _until(answer.text, settings.get("until"))
                self.cache_hook.add_partial("generate_until", requests[place].args[:2], answers[place])
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(mean negative log probability of the continuation's tokens, whether greedy decoding gives it) of each.

        lmms-eval takes the choice with the *smallest* value: its models give a loss here, whatever the method's name.
        """
        # lmms-eval 0.7.3 makes a string of every answer that is not wrapped, pairs included, and then fails on it.
        return [GenerationResult(text=self._likelihood(request)) for request in requests]

    def generate_until_multi_round(self, requests: list[Instance]) -> NoReturn:
        """Refused: a bundle answers one question about one picture, its prompt bucket holds no earlier rounds."""
        raise InputError(
            f"{len(requests)} requests of several rounds",
            wanted="tasks of one question and one answer",
            do="leave it out",
        )

    def _room(self, wanted: int | None) -> int:
        """New tokens: what the task asks for, at most what the caches hold; said once if that is less."""
        room = self.model.profile.new_tokens
        if wanted is not None and wanted > room and not self._warned:
            self._warned = True
            note(
                f"the task asks for up to {wanted} new tokens, the bundle has room for {room}: longer answers are cut "
                "(btp-export export --max-new-tokens N)"
            )
        return min(room, wanted or room)

    def _likelihood(self, request: Instance) -> tuple[float, bool]:
        picture, prompt = _question(request, self.task_dict)
        _, target, _, *where = request.args
        continuation = target if isinstance(target, str) else target(_document(self.task_dict, *where))
        ids = self.model.prompter.token_ids(continuation)
        room = self.model.profile.new_tokens
        if not 1 <= len(ids) <= room:
            raise InputError(
                f"a continuation of {len(ids)} tokens",
                wanted=f"1 to {room}",
                do="export with a larger --max-new-tokens",
            )
        pictures, _ = fitted([picture], self.model.spec, self.model.profile)
        encoded = self.model.prompter.encode(pictures, [prompt], profile=self.model.profile)
        prefill = self.model.prefill(encoded, same_pictures=True)  # each choice is asked about the same one
        scored = _Continuation(ids)
        self.model.complete(prefill, [Answer(scored.next_token, frozenset(), room=len(ids))])
        return scored.loss / len(ids), scored.is_greedy


@dataclass
class _Continuation:
    """Given tokens in place of chosen ones, and how likely the model finds them."""

    ids: Sequence[int]
    loss: float = 0.0
    is_greedy: bool = True

    def next_token(self, before: Sequence[int], logits: Any) -> int:
        """The next given token; its negative log probability is added to the loss."""
        token, row = self.ids[len(before)], logits.astype(np.float64)
        self.loss += float(np.logaddexp.reduce(row) - row[token])
        self.is_greedy = self.is_greedy and int(row.argmax()) == token
        return token


def _with_plan(bundle: Bundle, plan: str, compression: float | None, cleanup: contextlib.ExitStack) -> Bundle:
    from btp_export.exporting import vision_with_attention
    from btp_export.measuring.evaluate import resolve_plans

    chosen = resolve_plans(bundle, [plan], compression)[plan]
    if chosen == bundle.plan:
        return bundle
    folder = cleanup.enter_context(scratch_beside(bundle.root)) / "bundle"
    return derive(bundle, chosen, folder, vision=vision_with_attention, sync=False)


def _document(tasks: Any, doc_id: int, task: str, split: str) -> Any:
    return tasks[task][split][doc_id]


def _question(request: Instance, tasks: Any) -> tuple[Image.Image, str]:
    """The picture and the text of a request; a picture placeholder in the text is the chat template's business."""
    context, _, pictures_of, document, task, split = request.args
    pictures = pictures_of(_document(tasks, document, task, split)) or []
    films = any(isinstance(picture, str) for picture in pictures)
    if len(pictures) != 1 or films:
        raise InputError(
            f"task {task}, document {document}: {'a video' if films else f'{len(pictures)} pictures'}",
            wanted="exactly one picture for each question",
            do="choose tasks of one picture (scienceqa_img instead of scienceqa)",
        )
    return to_rgb(pictures[0]), context.replace(PLACEHOLDER, "").strip()


def _sampling(settings: dict[str, Any]) -> tuple[float, float]:
    """Temperature and top_p of a task; num_beams above 1 is refused, because it would be another decoder."""
    if (settings.get("num_beams") or 1) > 1:
        raise InputError(f"num_beams {settings['num_beams']}", wanted="1", do="--gen_kwargs num_beams=1")
    temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample", True) else 0.0
    return temperature, float(settings.get("top_p") or 1.0)


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """The answer up to the first of the task's stop texts."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        if stop:
            text = text.split(stop, 1)[0]
    return text.strip()
