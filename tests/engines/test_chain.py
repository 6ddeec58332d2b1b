"""The chain under the runtime: what it refuses, and image features that are used again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.chain import Batch, Chain, PrefillRun
from engines.runners.onnxruntime import OrtLoader
from graphs.files.bundle import ROPE_WEIGHTS, Bundle
from graphs.files.checkpoint import open_tensors
from graphs.records.errors import InputError


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Any) -> Bundle:
    bundle: Bundle = tiny_bundle()
    return bundle


def parts(bundle: Bundle) -> dict[str, Any]:
    rope = open_tensors(bundle.weights / ROPE_WEIGHTS)
    return {
        "graphs": {graph.name: bundle.root / graph.file for graph in bundle.graphs()},
        "plan": bundle.plan,
        "profile": bundle.profile(),
        "rope": (rope["cos"].read(), rope["sin"].read()),
        "loader": OrtLoader(threads=1),
    }


def inputs(bundle: Bundle) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    profile, hidden = bundle.profile(), bundle.spec.decoder.hidden_size

    def noise(*shape: int) -> Any:
        return rng.standard_normal(shape, dtype=np.float32)

    rows = (noise(1, profile.prefix_tokens, hidden), noise(1, profile.text_tokens, hidden))
    return noise(1, 3, *profile.image_size), *rows, np.array([profile.total_tokens - 1])


def test_features_stand_in_for_the_vision_graph(bundle: Bundle) -> None:
    chain = Chain(**parts(bundle))
    pixels, *rest = inputs(bundle)
    first = chain.prefill(Batch(pixels, *rest))
    features = chain.vision_outputs
    assert not np.allclose(chain.prefill(Batch(pixels + 1, *rest)).logits, first.logits)
    again = chain.prefill(Batch(np.zeros_like(pixels), *rest), vision=features)
    np.testing.assert_array_equal(again.logits, first.logits)
    assert "vision" in first.milliseconds and "vision" not in again.milliseconds


@pytest.mark.parametrize("samples", [1, 2])
def test_the_vision_graph_does_not_run_again_for_the_same_pictures(samples: int, tiny_bundle: Any) -> None:
    """Only for those of the prefill before: not after others, nor where features were given, nor after a failure."""
    bundle = tiny_bundle(**({} if samples == 1 else {"batch": samples}))
    pixels, *rest = (np.repeat(value, samples, axis=0) for value in inputs(bundle))
    others = pixels[::-1] + np.arange(1, samples + 1, dtype=np.float32).reshape(-1, 1, 1, 1)
    texts = [Batch(pixels, rest[0], rest[1] * factor, rest[2]) for factor in (1, 2, -1)]
    wanted = [Chain(**parts(bundle)).prefill(batch) for batch in texts]
    chain = Chain(**parts(bundle))

    def seen(batch: Batch, right: PrefillRun, **settings: Any) -> bool:
        """Whether the vision graph did not run; logits and kept tokens are right in any case."""
        run = chain.prefill(batch, **settings)
        np.testing.assert_array_equal(run.logits, right.logits)
        for stage, kept in right.kept.items():
            np.testing.assert_array_equal(run.kept[stage], kept)
        return "vision" not in run.milliseconds

    once = [seen(batch, right, same_pictures=True) for batch, right in zip(texts, wanted, strict=True)]
    assert once == [False, True, True]
    chain.decode(rest[1][:, 0])
    assert seen(texts[0], wanted[0], same_pictures=True)
    assert not seen(texts[0], wanted[0])  # nobody asked for it
    features = chain.vision_outputs
    elsewhere = Batch(others, *rest)
    right = Chain(**parts(bundle)).prefill(elsewhere)
    assert not seen(elsewhere, right, same_pictures=True)
    assert seen(texts[1], wanted[1], vision=features)  # whatever its pixels are
    assert not seen(elsewhere, right, same_pictures=True)
    with pytest.raises(ValueError, match="an input of shape"):
        chain.prefill(Batch(others, rest[0], rest[1][:, 1:], rest[2]), same_pictures=True)
    assert not seen(elsewhere, right, same_pictures=True)


def test_a_whole_graph_runs_all_of_it(tiny_bundle: Any) -> None:
    bundle = tiny_bundle(assemble="whole")
    chain, batch = Chain(**parts(bundle)), Batch(*inputs(bundle))
    runs = [chain.prefill(batch, same_pictures=True) for _ in range(2)]
    np.testing.assert_array_equal(runs[0].logits, runs[1].logits)
    assert not np.allclose(
        chain.prefill(Batch(batch.pixel_values + 1, *inputs(bundle)[1:]), same_pictures=True).logits, runs[0].logits
    )


def test_padding_changes_nothing(bundle: Bundle) -> None:
    """Rows right of the last token may hold anything."""
    chain = Chain(**parts(bundle))
    pixels, prefix, text, last = inputs(bundle)
    short = last - 6
    one = chain.prefill(Batch(pixels, prefix, text, short))
    step = chain.decode(text[:, 0]).copy()
    text[:, -6:] = 1e3
    two = chain.prefill(Batch(pixels, prefix, text, short))
    np.testing.assert_allclose(two.logits, one.logits, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(chain.decode(text[:, 0]), step, rtol=1e-6, atol=1e-6)


def test_incomplete_parts_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    given = parts(bundle)
    without = {name: path for name, path in given["graphs"].items() if name != "head"}
    with pytest.raises(InputError, match="no graph head"):
        Chain(**given | {"graphs": without})
    with pytest.raises(InputError, match=r"no graph .*absent\.onnx"):
        Chain(**given | {"graphs": given["graphs"] | {"head": tmp_path / "absent.onnx"}})
    with pytest.raises(InputError, match="rotary tables for 10 positions"):
        Chain(**given | {"rope": tuple(table[:10] for table in given["rope"])})
    with pytest.raises(InputError, match="graph decode does not fit the plan"):
        Chain(**given | {"profile": given["profile"].model_copy(update={"new_tokens": 5})})
    swapped = given["graphs"] | {"head": given["graphs"]["prefill_0"]}
    with pytest.raises(InputError):
        Chain(**given | {"graphs": swapped})


@pytest.mark.parametrize("alignment", [64, 1 << 30])
def test_caches_in_one_piece_or_apart(bundle: Bundle, alignment: int) -> None:
    """Where the layers of a segment lie is not to be seen in any result."""
    collected = []
    for chosen in (1 << 30, alignment):
        chain = Chain(**parts(bundle), alignment=chosen)
        pixels, prefix, text, last = inputs(bundle)
        logits = [chain.prefill(Batch(pixels, prefix, text, last - 5)).logits]
        for step in range(3):
            logits.append(chain.decode(np.full((1, bundle.spec.decoder.hidden_size), 0.1 * step, np.float32)).copy())
        caches = [cache for pair in chain.caches.values() for cache in pair]
        collected.append([*logits, *(cache.read() for cache in caches)])
        ends = [cache.pointer + cache.read().nbytes for cache in caches]
        joined = [cache.pointer == end for cache, end in zip(caches[1:], ends, strict=False)]
        assert all(joined) == (chosen == 64)
    for got, wanted in zip(*collected, strict=True):
        np.testing.assert_array_equal(got, wanted)
