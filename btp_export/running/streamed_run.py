"""Generating with a bundle that is larger than memory: one part of a graph is open at a time, for all samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btp_export.running.embedding import TokenEmbedding, filled
from btp_export.running.generation import Answer, answers_for, generate
from engines.verify.streamed_chain import StreamedChain
from engines.verify.streamed_graphs import StreamedRunner
from graphs.building.rope import token_tables
from graphs.files.bundle import ROPE_WEIGHTS, Bundle
from graphs.files.checkpoint import open_tensors
from graphs.files.memory import PART_BYTES
from graphs.files.resume import Sequence as Steps
from graphs.pruning import kept_tokens
from graphs.records.progress import Report

if TYPE_CHECKING:
    from btp_export.model.prompting import Encoded
    from engines.runners.onnxruntime import OrtLoader
    from engines.verify.verification import FreeRun

Array = np.ndarray[Any, np.dtype[Any]]


def free_runs(
    bundle: Bundle,
    profile: str,
    files: Mapping[str, Path],
    encoded: Encoded,
    loader: OrtLoader,
    *,
    tokens: int,
    part_bytes: int = PART_BYTES,
    steps: Steps | None = None,
    progress: Report | None = None,
) -> list[FreeRun]:
    """What the bundle's graphs answer to the samples, greedily, `tokens` tokens or up to an end token."""
    from engines.verify.verification import FreeRun

    chosen, plan = bundle.profile(profile), bundle.plan_for(profile)
    embedding = TokenEmbedding(bundle, np.dtype(np.float32))
    batches = [
        [first + place for place in filled(len(encoded) - first, chosen.batch)]
        for first in range(0, len(encoded), chosen.batch)
    ]
    chain = StreamedChain(
        files,
        [embedding.batch(encoded, chosen, samples) for samples in batches],
        plan=plan,
        profile=chosen,
        rope=_rope(bundle, profile),
        open_graph=lambda path, report: StreamedRunner(path, loader, most=part_bytes, progress=report),
        embed=embedding.rows,
        tokens=tokens,
        steps=steps,
        progress=progress,
    )
    answers = answers_for(bundle.spec, encoded.input_ids, room=tokens)
    _generate(chain, answers, [sample for samples in batches for sample in samples])
    keeps = [stage.keep for stage in plan.stages]
    kept = [
        kept_tokens.absolute(kept_tokens.every_stage(indices, keeps, samples=chosen.batch)) for indices in chain.kept
    ]  # for each batch and stage [B,k]
    return [
        FreeRun(answer.ids, [indices[number % chosen.batch] for indices in kept[number // chosen.batch]])
        for number, answer in enumerate(answers)
    ]


def _generate(chain: StreamedChain, answers: Sequence[Answer], places: Sequence[int]) -> None:
    """Grow the answers with the chain; `places` are the samples that stand in its batches, one after another."""
    own = [places.index(sample) for sample in range(len(answers))]
    logits = chain.prefill()
    for tokens in chain.fed:  # what an interrupted run has generated
        for answer, place in zip(answers, own, strict=True):
            answer.take(tokens[place])
    generate(answers, logits[own], lambda ids: chain.decode([ids[sample] for sample in places])[own])


def _rope(bundle: Bundle, profile: str) -> tuple[Array, Array]:
    tensors = open_tensors(bundle.weights / ROPE_WEIGHTS)
    return token_tables((tensors["cos"].read(), tensors["sin"].read()), bundle.spec.decoder, bundle.profile(profile))
