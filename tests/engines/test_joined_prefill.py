"""A prefill's graphs as one session: the same to the last bit as graphs that run one after another."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from btp_export.running.runtime import BundleModel
from engines.chain import Batch, PrefillRun
from engines.runners import on_cpu
from engines.runners.interface import Link
from engines.runners.on_cpu import selection
from engines.runners.on_cpu.around_selection import ROWS_AT, SCORES, STREAM
from engines.runners.on_cpu.layers_at_once import LAYERS
from engines.runners.onnxruntime import OrtLoader
from engines.wiring import links
from graphs import names
from graphs.files.bundle import Bundle
from graphs.records.plan import Stage
from tests.engines.native import builds
from tests.engines.runners.native_cpu import here
from tests.plans import PLAN, tiny_plan

Array = np.ndarray[Any, np.dtype[Any]]
# One that scores by norms and chooses by coverage, one that looks from the last token.
AT_ONCE = tiny_plan(
    Stage(layer=0, keep=20, importance="norm", diversity="coverage", features="centred", weights="scores"),
    Stage(layer=3, keep=9, attention_quota=9, pool=20),
)


def loader(*, joins: bool = True, **options: Any) -> OrtLoader:
    return OrtLoader(threads=2, joins=joins, **{"custom_ops": builds.ort_library()} | options)


def graphs_of(bundle: Bundle) -> list[Link]:
    files = {graph.name: bundle.root / graph.file for graph in bundle.graphs()}
    return links(bundle.plan.segments(), files.__getitem__)


def some(model: BundleModel, seed: int) -> Batch:
    rng, profile = np.random.default_rng(seed), model.profile
    counts = (profile.prefix_tokens, profile.text_tokens)
    rows = [rng.standard_normal((profile.batch, n, model.spec.decoder.hidden_size), np.float32) for n in counts]
    pixels = rng.standard_normal((profile.batch, 3, *profile.image_size), np.float32)
    return Batch(pixels, *rows, last=profile.total_tokens - 1 - 3 * np.arange(profile.batch))


def everything(model: BundleModel, batch: Batch, vision: Any) -> tuple[PrefillRun, list[Array]]:
    """All that a prefill and two steps behind it leave."""
    chain = model.chain
    run = chain.prefill(batch, vision=vision)
    found = [run.logits, *run.kept.values(), *run.lengths, *chain.stage_scores.values()]
    found += [chain.decode(batch.text[:, step]).copy() for step in range(2)]
    return run, [*found, *(cache.read() for pair in chain.caches.values() for cache in pair)]


@here
@pytest.mark.parametrize(("plan", "batch"), [(AT_ONCE, 1), (PLAN, 2), (None, 1)], ids=["at once", "batch", "unpruned"])
def test_nothing_is_different(plan: Any, batch: int, tiny_bundle: Any) -> None:
    bundle = tiny_bundle(plan, **({"batch": batch} if batch > 1 else {}))
    apart, joined = (BundleModel(bundle, loader(joins=joins)) for joins in (False, True))
    assert set(apart.chain.runners) - set(joined.chain.runners) == {link.name for link in graphs_of(bundle)}
    for seed in range(3):
        given = some(apart, seed)
        vision = apart.chain.vision_outputs if seed == 2 else None  # of the run before
        (one, wanted), (other, got) = (everything(model, given, vision) for model in (apart, joined))
        for left, right in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(left, right)
        assert other.milliseconds.keys() == one.milliseconds.keys()
        parts = [other.milliseconds[link.name] for link in graphs_of(bundle)]
        assert min(parts) > 0 and sum(parts) <= other.milliseconds["total"]


@here
def test_few_nodes_are_left(tiny_bundle: Any) -> None:
    found = on_cpu.joined(graphs_of(tiny_bundle(AT_ONCE)), loader()._native)
    assert found is not None
    kinds = [node.op_type for node in found[0].graph.node if node.op_type != "Cast"]
    stages = [selection.BY_ROWS, STREAM, LAYERS, ROWS_AT, SCORES, selection.SELECTION, STREAM, LAYERS]
    assert kinds[: len(stages)] == stages and len(kinds) <= len(stages) + 5  # the head's


@here
def test_what_is_joined(tiny_bundle: Any, tmp_path: Path) -> None:
    """Only where segments are one operator, and graphs fit together."""
    given = graphs_of(tiny_bundle(AT_ONCE))
    runner = loader().join(given)
    assert runner is not None and runner.inputs.keys() == set(names.STREAM)
    roomy = {name for name, spec in runner.outputs.items() if spec.roomy}
    rows = [f"{names.prefill(layer // 3)}.{rows}" for layer in range(6) for rows in names.cache_rows(layer)]
    assert roomy == {*rows}  # the last key before the second stage too, which reads it
    assert loader(custom_ops=None).join(given) is None
    assert loader().join(graphs_of(tiny_bundle(AT_ONCE, precision="float16"))) is None
    assert loader().join([*given[:2], *given[3:]]) is None  # segments of other lengths
    assert loader().join([*given[:-1], Link(names.HEAD, tmp_path / "absent.onnx")]) is None
