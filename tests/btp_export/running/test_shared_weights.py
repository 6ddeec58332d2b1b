"""What two models that are open together hold once: the vision graph, and the weights of a large model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from btp_export.measuring.bench import measure
from btp_export.running import memory_fit
from btp_export.running.runtime import BundleModel, load
from engines.runners import packed_files
from engines.runners.onnxruntime import OrtLoader, OrtRunner
from graphs import names
from graphs.files.bundle import Bundle
from graphs.files.cache_folder import cache_folder
from graphs.files.onnx_file import read_graph
from tests.plans import PLAN

PROMPTS = ["what colour is the star?"]


def answer(model: BundleModel, picture: Image.Image) -> np.ndarray:
    return model.prefill(model.encode([picture], PROMPTS)).logits


def test_a_second_model_takes_the_vision_graph_of_the_first(tiny_bundle: Any, pictures: list[Image.Image]) -> None:
    full, pruned = tiny_bundle(), tiny_bundle(PLAN)
    wanted = answer(load(pruned, threads=1), pictures[1])
    first = load(full, threads=1)
    second = load(pruned, threads=1, beside=first)
    assert second.chain.runners[names.VISION] is first.chain.runners[names.VISION]
    assert second.chain.runners[names.DECODE] is not first.chain.runners[names.DECODE]
    answer(first, pictures[0])  # it leaves nothing behind
    np.testing.assert_array_equal(answer(second, pictures[1]), wanted)
    other = load(tiny_bundle(precision="float16"), threads=1, beside=first)
    assert other.chain.runners[names.VISION] is not first.chain.runners[names.VISION]


def test_bench_opens_the_vision_graph_once(tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    opens = OrtLoader.__call__

    def call(self: OrtLoader, path: Path) -> OrtRunner:
        opened.append(path.stem)
        return opens(self, path)

    monkeypatch.setattr(OrtLoader, "__call__", call)
    measure(tiny_bundle(PLAN), threads=1, rounds=1, warm_up=0)
    assert opened.count(names.VISION) == 1
    assert opened.count(names.DECODE) == 2


def weights_of(bundle: Bundle) -> dict[str, dict[str, int]]:
    """Elements of each stored tensor of each graph, by reading them with onnx."""
    found = {}
    for graph in bundle.graphs():
        model = read_graph(bundle.root / graph.file)
        found[graph.name] = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
    return found


def test_memory_is_counted_as_it_is_held(tiny_bundle: Any) -> None:
    """The vision graph once, whatever the number of models; what is shared once in all graphs."""
    bundle: Bundle = tiny_bundle()
    files: Mapping[str, Path] = {graph.name: bundle.root / graph.file for graph in bundle.graphs()}
    sizes = {name: 4 * sum(tensors.values()) for name, tensors in weights_of(bundle).items()}
    every = sum(sizes.values())
    assert memory_fit.open_bytes(files) == pytest.approx(every, rel=0.01)  # integers are not widened
    assert memory_fit.open_bytes(files, models=2) == pytest.approx(2 * every - sizes[names.VISION], rel=0.01)
    assert memory_fit.open_bytes(files, models=2, shared=True) == memory_fit.open_bytes(files, models=2), "too small"


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_large_models_hold_their_matrices_once(
    precision: str, tiny_bundle: Any, pictures: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sessions of both models map the same files, give the same numbers, and less memory is counted.

    In float16 ONNX Runtime rounds some values between nodes in one way of opening and not in the other.
    """
    full, pruned = tiny_bundle(precision=precision), tiny_bundle(PLAN, precision=precision)
    wanted = [answer(load(bundle, threads=1), pictures[0]) for bundle in (full, pruned)]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for module in (packed_files, memory_fit):
        monkeypatch.setattr(module, "LARGE", 1000)
    apart = memory_fit.open_bytes(files := {graph.name: full.root / graph.file for graph in full.graphs()}, models=2)
    assert not memory_fit.shares_weights(full, full.profile().name, "int8"), "too small a model"
    monkeypatch.setattr(memory_fit, "STREAM_ABOVE", 0)
    assert memory_fit.shares_weights(full, full.profile().name, "int8")
    assert not memory_fit.shares_weights(full, full.profile().name, "float32"), "verify opens a part at a time"
    assert memory_fit.open_bytes(files, models=2, shared=True) < 0.5 * apart

    first = load(full, threads=1)
    made = set(cache_folder("onnxruntime").iterdir())
    second = load(pruned, threads=1, beside=first)
    assert set(cache_folder("onnxruntime").iterdir()) == made, "the second packs nothing"
    in_memory = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line}
    assert in_memory == {str(place / packed_files.DATA_FILE) for place in made}
    for model, logits in zip((first, second), wanted, strict=True):
        difference = np.linalg.norm(answer(model, pictures[0]) - logits) / np.linalg.norm(logits)
        assert difference <= {"float32": 0, "float16": 5e-3}[precision]
