"""Bundles that are larger than memory: when to stream, and generating with one part of a graph open at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engines.verify.streamed_graphs import Batch, BatchRun, FreeRunner, StreamedRunner
from graphs import names
from graphs.building.graph_parts import has_bfloat16, read_graph, wide_weights
from graphs.building.rope import token_tables
from graphs.files.atomic import size_text
from graphs.files.bundle import ROPE_WEIGHTS, Bundle
from graphs.files.checkpoint import open_tensors
from graphs.files.memory import LIBRARIES, available_memory
from graphs.files.resume import Sequence as Steps
from graphs.pruning import kept_tokens
from graphs.records.errors import InputError
from graphs.records.progress import Report

if TYPE_CHECKING:
    from btp_export.model.prompting import Encoded
    from engines.runners.onnxruntime import OrtLoader
    from engines.verify.verification import FreeRun

STREAM_ABOVE = 3 * 2**30  # bytes of weights in float32 over which graphs are opened part by part


def open_bytes(files: Mapping[str, Path]) -> int:
    """Weights of all graphs together in float32, in which ONNX Runtime computes on a CPU."""
    return sum(wide_weights(read_graph(path)) for path in files.values())


def must_stream(files: Mapping[str, Path], device: str) -> bool:
    """Whether the graphs are too large to be open together, or of a type that this device has no kernels for."""
    return open_bytes(files) > STREAM_ABOVE or (device == "cpu" and has_bfloat16(read_graph(files[names.DECODE])))


def too_large(bundle: Bundle, profile: str | None = None, *, models: int = 1) -> str | None:
    """Why the bundle cannot be run as a whole on the CPU of this machine, None if it can.

    `models` are how many of its size are open at a time (another plan's graphs take about as much).
    """
    files = {graph.name: bundle.root / graph.file for graph in bundle.graphs(profile)}
    needed, there = models * open_bytes(files) + LIBRARIES, available_memory()
    if there is None or needed <= max(there, STREAM_ABOVE):
        return None
    return (
        f"{bundle.spec.name} in float32, as ONNX Runtime computes on the CPU, needs about {size_text(needed)} of "
        f"memory, {size_text(there)} are available"
    )


def check_fits_memory(bundle: Bundle, profile: str | None, device: str, *, models: int = 1) -> None:
    """Raise InputError if the graphs are to be open together on the CPU and memory does not hold them."""
    if device == "cpu" and (reason := too_large(bundle, profile, models=models)) is not None:
        raise InputError(
            reason,
            wanted="enough memory for all graphs at once",
            do="--device cuda, or a machine with more memory; btp-export verify needs only one layer at a time",
        )


def streaming_bytes(bundle: Bundle, profile: str, samples: int) -> int:
    """About how much memory verifying with one layer at a time takes: a layer twice, and what flows."""
    spec, shape = bundle.spec.decoder, bundle.profile(profile)
    layer, head = 4 * spec.layer_elements, 4 * spec.head_elements
    caches = 2 * 4 * spec.head_dim * spec.num_kv_heads * sum(
        shape.capacity_with(tokens) for tokens in bundle.plan_for(profile).tokens_per_layer()
    )  # fmt: skip
    rows = 4 * shape.total_tokens * (4 * spec.hidden_size + 3 * spec.intermediate_size)
    return LIBRARIES + max(layer + layer // 2, head + head // 2) + samples * caches + shape.batch * rows


def free_runs(
    bundle: Bundle,
    profile: str,
    files: Mapping[str, Path],
    encoded: Encoded,
    loader: OrtLoader,
    *,
    tokens: int,
    steps: Steps | None = None,
    progress: Report | None = None,
) -> list[FreeRun]:
    """What the bundle's graphs answer to the samples, greedily, `tokens` tokens or up to an end token."""
    from engines.verify.verification import FreeRun

    chosen, plan = bundle.profile(profile), bundle.plan_for(profile)
    tensors = open_tensors(bundle.weights / ROPE_WEIGHTS)
    rope = token_tables((tensors["cos"].read(), tensors["sin"].read()), bundle.spec.decoder, chosen)
    embed = _embedding(bundle)
    runner = FreeRunner(
        files,
        plan=plan,
        profile=chosen,
        rope=rope,
        open_graph=lambda path, told: StreamedRunner(path, loader, progress=told),
        embed=embed,
        steps=steps,
        progress=progress,
    )
    places = [range(first, first + chosen.batch) for first in range(0, len(encoded), chosen.batch)]
    filled = [[min(place, len(encoded) - 1) for place in part] for part in places]
    runs = runner.run(
        [_batch(encoded, part, embed, chosen.text_tokens) for part in filled],
        tokens=tokens,
        ends=bundle.spec.eos_token_ids,
    )
    ends, keeps = bundle.spec.eos_token_ids, [stage.keep for stage in plan.stages]
    answers = [
        FreeRun(_until_end(run.tokens[place], ends), _kept(run, place, keeps))
        for run in runs
        for place in range(chosen.batch)
    ]
    return answers[: len(encoded)]


def _embedding(bundle: Bundle) -> Callable[[np.ndarray], np.ndarray]:
    """Rows [n, C] of ids [n] in float32; only these are read from the file."""
    table = bundle.checkpoint()["language_model.embed_tokens.weight"].read()
    return lambda ids: np.asarray(table[ids]).astype(np.float32)


def _batch(encoded: Encoded, places: Sequence[int], embed: Callable[[np.ndarray], np.ndarray], room: int) -> Batch:
    prefix, image = encoded.prefix_tokens, encoded.image_tokens
    ids = [np.asarray(encoded.input_ids[place]) for place in places]
    text = [embed(row[prefix + image :]) for row in ids]
    padded = [np.concatenate([rows, np.zeros((room - len(rows), rows.shape[1]), rows.dtype)]) for rows in text]
    return Batch(
        encoded.pixels(list(places)),
        np.stack([embed(row[:prefix]) for row in ids]),
        np.stack(padded),
        np.array([len(row) - 1 for row in ids], np.int32),
    )


def _until_end(ids: Sequence[int], ends: Sequence[int]) -> tuple[int, ...]:
    for place, token in enumerate(ids):
        if token in ends:
            return tuple(ids[: place + 1])
    return tuple(ids)


def _kept(run: BatchRun, place: int, keeps: Sequence[int]) -> list[kept_tokens.Indices]:
    """For each stage indices into all V image tokens."""
    given = {stage: indices[place] for stage, indices in run.kept.items()}
    return kept_tokens.absolute(kept_tokens.every_stage(given, keeps))
