"""Real engines of every family's small random model, and of the demo, by TensorRT for RTX for GPUs that are not here.

What an engine holds is compared with the bundle: its own .onnx files (read by onnx), its manifest, and bytes on disk.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest

from btp_export.families import known_families
from engines.targets import find_target
from engines.tensorrt.build.build import Result, build
from engines.tensorrt.build.machine import machine_for
from engines.tensorrt.prepare.build_plan import Wishes, plan_build
from engines.tensorrt.records import EngineGraph, EnginesRecord
from graphs.files.bundle import Bundle
from graphs.records.match_plan import spec_at
from graphs.records.plan import PruningPlan, Stage
from tests.engines.tensorrt import building
from tests.engines.tensorrt.build.conftest import LAYERS


@pytest.fixture(autouse=True)
def _rtx() -> None:
    building.need_rtx()


def _llava(demo: Path, folder: Path) -> None:
    from tests.conftest import make_tiny

    make_tiny(demo, folder, num_hidden_layers=LAYERS)


def _llava_next(demo: Path, folder: Path) -> None:
    from tests.btp_export.families.test_llava_next import make_next

    make_next(demo, folder, num_hidden_layers=LAYERS)


def _qwen(demo: Path, folder: Path) -> None:
    from tests.btp_export.families.qwen import make_qwen

    folder.mkdir()
    make_qwen(folder, text={"num_hidden_layers": LAYERS})


MODELS: dict[str, Callable[[Path, Path], None]] = {"llava": _llava, "llava_next": _llava_next, "qwen2_5_vl": _qwen}


@dataclass(frozen=True)
class Variant:
    """What is exported and how it is built."""

    target: str
    opset: int
    precision: str
    assemble: str
    weights: str
    plugins: str

    def __str__(self) -> str:
        return f"{self.target}-{self.opset}-{self.precision}-{self.assemble}-{self.weights}-{self.plugins}"

    @property
    def wishes(self) -> Wishes:
        return Wishes(None, self.assemble, self.weights, self.plugins)  # type: ignore[arg-type]


FUSED, PLAIN = (23, "float16"), (18, "float32")
# Each family once with plugins and once from the portable bodies, the other operator set, GPU and weights.
CASES = [
    *((family, Variant("rtx-ada", *FUSED, "segments", "baked", "python")) for family in ("llava", "qwen2_5_vl")),
    *((family, Variant("rtx-blackwell", *PLAIN, "whole", "shared", "none")) for family in ("llava", "qwen2_5_vl")),
    ("llava_next", Variant("rtx-ada", *FUSED, "whole", "baked", "none")),
    ("llava_next", Variant("rtx-blackwell", *PLAIN, "whole", "shared", "python")),
    ("llava", Variant("rtx-blackwell", 23, "bfloat16", "whole", "shared", "none")),
]


def staged(spec: Any) -> PruningPlan:
    """Two stages, one by diversity with seeds and one that keeps nothing, on the middle layers."""
    tokens = spec.vision.image_tokens
    keep = tokens // 2
    first = Stage(
        layer=2, keep=keep, attention_quota=keep // 4, diversity_quota=keep // 4, pool=keep, boundary=keep, seeds=4
    )
    return PruningPlan(
        model_type=spec.model_type,
        num_layers=spec.decoder.num_layers,
        image_tokens=tokens,
        grid=spec.vision.grid,
        blocks=spec.vision.blocks,
        stages=(first, Stage(layer=spec.decoder.num_layers - 1, keep=0)),
    )


@pytest.fixture(scope="module")
def bundles(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, str], Bundle]:
    """`bundles(family, opset, precision)`: a pruned bundle, exported once."""
    from btp_export.exporting import Options, export_bundle, make_profiles
    from btp_export.model.open_model import open_model

    collected: dict[tuple[str, int, str], Bundle] = {}

    def make(family: str, opset: int, precision: str) -> Bundle:
        key = (family, opset, precision)
        if key not in collected:
            folder = tmp_path_factory.mktemp(family)
            MODELS[family](demo_checkpoint, folder / "model")
            model = open_model(str(folder / "model"))
            options = Options(opset=opset, precision=precision, text_tokens=16, new_tokens=12)  # type: ignore[arg-type]
            plan = staged(spec_at(model.spec, make_profiles(model, options)[0]))
            collected[key] = export_bundle(model, plan, folder / "bundle", options)
        return collected[key]

    return make


def built(bundle: Bundle, variant: Variant) -> Result:
    target = find_target(variant.target)
    builder = machine_for(target, variant.wishes)
    assert builder.library is not None
    plan = plan_build(bundle, target, builder.wishes)
    return build(plan, builder.library, wish=variant.plugins)


def test_every_family_is_built_here() -> None:
    assert sorted(MODELS) == known_families() == sorted({family for family, _ in CASES})


@pytest.mark.parametrize(("family", "variant"), CASES, ids=str)
def test_engines_are_what_the_bundle_says(
    family: str, variant: Variant, bundles: Callable[[str, int, str], Bundle]
) -> None:
    bundle = bundles(family, variant.opset, variant.precision)
    result = built(bundle, variant)
    record = EnginesRecord.load(bundle.root / "engines" / variant.target)
    assert record == result.record
    assert (record.opset, record.weights, record.assemble) == (variant.opset, variant.weights, variant.assemble)
    assert record.plugins.form == variant.plugins
    names = ["vision", "prefill_0", "select_0", "prefill_1", "select_1", "prefill_2", "head", "decode"]
    assert [graph.name for graph in record.graphs] == (
        names if variant.assemble == "segments" else ["prefill", "decode"]
    )
    for graph in record.graphs:
        check_engine(result.folder, graph, find_target(variant.target).compute_capability)
        check_tensors(bundle, graph, variant)
        check_plugins(bundle, graph, variant)


def check_engine(folder: Path, graph: EngineGraph, capability: str) -> None:
    """The file on disk is the recorded one, built from the recorded graph."""
    assert graph.engine is not None and graph.engine.compute_capability == capability
    content = (folder / graph.engine.file).read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (graph.engine.size, graph.engine.sha256)
    assert hashlib.sha256((folder / graph.onnx.file).read_bytes()).hexdigest() == graph.engine.graph_sha256
    assert graph.engine.layers and graph.engine.seconds > 0
    assert not list(folder.glob(".building-*"))


def check_tensors(bundle: Bundle, graph: EngineGraph, variant: Variant) -> None:
    """Inputs and outputs are those of the manifest; the decoder's matrices are in the engine, or inputs of it."""
    assert graph.engine is not None
    if variant.assemble == "segments" or graph.name == "decode":
        manifest = bundle.graph(graph.name)
        assert set(graph.inputs) == set(manifest.inputs) and graph.outputs == manifest.outputs
    if variant.weights == "baked":
        assert graph.weight_inputs == () and graph.engine.size > graph.estimate.weight_bytes
        return
    start, stop = (0, bundle.spec.decoder.num_layers) if graph.name in ("prefill", "decode") else graph.layers or (0, 0)
    wanted = {
        ref.name
        for layer in range(start, stop)
        for ref in bundle.checkpoint().tensors.values()
        if ref.name.startswith(f"language_model.layers.{layer}.") and len(ref.shape) == 2
    }
    sources = {source.tensor for tensor in graph.weight_inputs for source in tensor.sources}
    assert {name for name in sources if ".layers." in name and name.startswith("language_model.")} == wanted


def check_plugins(bundle: Bundle, graph: EngineGraph, variant: Variant) -> None:
    """A plugin layer for every custom node that the bundle's own graph has, or none at all."""
    assert graph.engine is not None
    counts = Counter(layer.plugin for layer in graph.engine.layers if layer.plugin)
    if variant.plugins == "none":
        assert not counts
        return
    selects = [graph.name] if graph.name.startswith("select") else ["select_0", "select_1"] * (graph.name == "prefill")
    wanted: Counter[str] = Counter()
    for name in selects:
        model = onnx.load(bundle.graph_path(name), load_external_data=False)
        wanted += Counter(node.op_type for node in model.graph.node if node.domain == "btp")
    assert counts == wanted
    assert graph.name not in ("select_0", "prefill") or wanted == {"BtpSelectTokens": 1, "BtpGatherTokens": 3}


def test_the_demo_bundle(demo_bundle: Any) -> None:
    """576 image tokens in float32, where TensorRT has no fused attention and must take it apart."""
    variant = Variant("rtx-ada", 23, "float32", "segments", "shared", "none")
    bundle = demo_bundle(staged(demo_bundle().spec))
    record = built(bundle, variant).record
    assert record.opset == 23 and all(graph.engine is not None for graph in record.graphs)
    for graph in record.graphs:
        check_tensors(bundle, graph, variant)
        check_plugins(bundle, graph, variant)
