"""Answers to many questions from the machines of a Ray cluster; what is done is kept for a run that goes on."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btp_export.measuring import answering
from btp_export.spreading import PART, Cluster
from graphs.files.bundle import Bundle
from graphs.files.cache_folder import cache_folder
from graphs.files.resume import Work, digest, work_folder
from graphs.records.progress import Note, Report

if TYPE_CHECKING:
    from btp_export.model.prompting import Encoded
    from btp_export.running.runtime import BundleModel

Part = tuple[list[str], dict[int, list[float]]]  # texts, and for each stage the attention that it kept


def answered(
    cluster: Cluster,
    bundles: Mapping[str, Bundle],
    encoded: Encoded,
    room: int,
    *,
    batch: int,
    settings: Mapping[str, Any],
    report: Report | None,
    note: Note,
) -> dict[str, Part]:
    """What each of the bundles, by key, answers to the samples: as one process does with the same settings.

    `settings` are those of `load`; without a number of threads each part has one.

    Parts hold whole batches, so that every sample is in the batch that it would be in. Raises InputError and
    CheckError as the model does, UnavailableError if the cluster goes away.
    """
    size = -(-PART // batch) * batch
    starts = range(0, len(encoded), size)
    asked = [(key, first) for key in bundles for first in starts]
    decided = {key: bundle.manifest.model_dump_json() for key, bundle in bundles.items()}
    inputs = digest([row.tolist() for row in encoded.input_ids], encoded.pixel_values)
    done: dict[tuple[str, int], Part] = {}
    chosen = {**settings, "threads": settings.get("threads") or 1}
    named = tuple(sorted(chosen.items()))
    with work_folder(cache_folder("work"), digest("answers", decided, inputs, room, named), note) as work:
        for place in asked:
            kept = _kept(work, *place)
            if kept is not None:
                done[place] = kept
        if done:
            note(f"goes on after an interrupted run: {len(done)} of {len(asked)} parts are there")
        left = [place for place in asked if place not in done]
        parts = [(str(bundles[key].root.resolve()), named, _rows(encoded, first, size), room) for key, first in left]
        for number, part in cluster.results(answer, parts, cpus=chosen["threads"]):
            done[left[number]] = part
            if work is not None:
                key, first = left[number]
                work.sequence(f"{key[:16]}-{first}").save(1, {}, [part[0], list(part[1].items())])
            if report is not None:
                report(len(done), len(asked), f"{cluster.cores} cores")
    return {key: _joined([done[key, first] for first in starts]) for key in bundles}


def answer(root: str, settings: tuple[tuple[str, Any], ...], encoded: Encoded, room: int) -> Part:
    """One part, on whichever machine."""
    answers = answering.answer(_model(root, settings), answering.Questions(encoded, room, {}, 0), None)
    return answers.texts, dict(answers.attention_kept)


@functools.lru_cache(maxsize=1)
def _model(root: str, settings: tuple[tuple[str, Any], ...]) -> BundleModel:
    """A process goes through the parts of one bundle, then of the next."""
    from btp_export.running.runtime import load

    return load(Bundle.open(Path(root)), **dict(settings))


def _rows(encoded: Encoded, first: int, size: int) -> Encoded:
    part = encoded.part(range(first, min(first + size, len(encoded))))
    return replace(part, pixel_values=part.pixel_values.copy())


def _kept(work: Work | None, key: str, first: int) -> Part | None:
    step: Any = None if work is None else work.sequence(f"{key[:16]}-{first}").latest()
    return None if step is None else (step.meta[0], {int(stage): shares for stage, shares in step.meta[1]})


def _joined(parts: list[Part]) -> Part:
    texts = [text for part in parts for text in part[0]]
    stages = dict.fromkeys(stage for part in parts for stage in part[1])
    return texts, {stage: [share for part in parts for share in part[1].get(stage, [])] for stage in stages}
