"""A chain of engines and what is asked of it, for the tests of the runner."""

from pathlib import Path
from typing import Any

import numpy as np

from engines.chain import Batch, Chain
from graphs.files.bundle import ROPE_WEIGHTS, Bundle
from graphs.files.checkpoint import open_tensors


def chain(bundle: Bundle, graphs: dict[str, Path], loader: Any) -> Chain:
    """The chain of these files."""
    rope = open_tensors(bundle.weights / ROPE_WEIGHTS)
    tables = (rope["cos"].read(), rope["sin"].read())
    return Chain(graphs, plan=bundle.plan, profile=bundle.profile(), rope=tables, loader=loader)


def inputs(bundle: Bundle, seed: int = 0) -> tuple[Any, ...]:
    """What a Batch takes, random."""
    rng = np.random.default_rng(seed)
    profile, hidden = bundle.profile(), bundle.spec.decoder.hidden_size

    def noise(*shape: int) -> Any:
        return rng.standard_normal(shape, dtype=np.float32)

    rows = (noise(1, profile.prefix_tokens, hidden), noise(1, profile.text_tokens, hidden))
    return noise(1, 3, *profile.image_size), *rows, np.array([profile.total_tokens - 3])


def conversation(model: Chain, given: tuple[Any, ...], steps: int = 5) -> list[Any]:
    """Logits of a prefill and of decode steps on rows that depend on the logits before, and all caches.

    A row is as long as the hidden state, all of it from different logits: of a few alone all can be near 0, and the
    norm that comes first would make rounding in them ten times larger at each step.
    """
    run = model.prefill(Batch(*given))
    found = [run.logits, *run.kept.values(), *run.lengths]
    logits, row = run.logits, given[1].shape[::2]
    for _ in range(steps):
        logits = model.decode(np.resize(logits, row).astype(np.float32)).copy()
        found.append(logits)
    return found + [cache.read() for pair in model.caches.values() for cache in pair]


def onnx_graphs(bundle: Bundle) -> dict[str, Path]:
    """The bundle's own graphs by name."""
    return {graph.name: bundle.root / graph.file for graph in bundle.graphs()}
