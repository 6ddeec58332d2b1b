"""Decoder graphs with four-bit weights: BtpLinear where the checkpoint has packed weights, run in ONNX Runtime."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from btp_export.model.open_model import open_model
from engines.runners.onnxruntime import OrtLoader
from graphs.building.decoder_graphs import build_decoder_graphs, serialize
from graphs.building.graph_builder import GraphBuilder
from graphs.records.errors import InputError
from tests.graphs.ops.models import run_evaluator
from tests.packed import pack_folder
from tests.plans import PLAN

FORMS = {"zeros": {"zeros": True}, "symmetric": {"zeros": False}, "input scales": {"input_scales": True}}


@pytest.fixture(scope="module", params=list(FORMS))
def folders(request: Any, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A packed checkpoint, and the ordinary one with the numbers that its codes stand for."""
    place = tmp_path_factory.mktemp("packed")
    options = FORMS[request.param]
    meanings = pack_folder(tiny_checkpoint, place / "packed", **options)
    plain = place / "plain"
    plain.mkdir()
    for file in tiny_checkpoint.iterdir():
        (plain / file.name).write_bytes(file.read_bytes())
    tensors = load_file(plain / "model.safetensors")
    for module, matrix in meanings.items():
        columns = np.linspace(0.5, 2, matrix.shape[1]) if options.get("input_scales") else 1.0
        tensors[f"{module}.weight"] = (matrix * columns).astype(np.float32)
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    return place / "packed", plain


def build(folder: Path, out: Path, **options: Any) -> dict[str, Path]:
    """The decoder graphs of a checkpoint as files."""
    model = open_model(str(folder))
    (out / "weights").mkdir(parents=True)
    for file in model.checkpoint.files:
        shutil.copyfile(file, out / "weights" / file.name)
    profile = model.family.profile(model.spec, batch=1, text_tokens=8, new_tokens=4, image_size=None)
    graphs = build_decoder_graphs(model.spec, model.checkpoint, PLAN, profile, **options)
    for graph in graphs:
        (out / f"{graph.name}.onnx").write_bytes(serialize(graph))
    return {graph.name: out / f"{graph.name}.onnx" for graph in graphs}


def random_inputs(runner: Any, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: np.full(spec.shape, 3, spec.dtype) if spec.dtype == np.int32
        else rng.standard_normal(spec.shape).astype(spec.dtype)
        for name, spec in runner.inputs.items()
    }  # fmt: skip


@pytest.mark.parametrize("opset", [18, 23])
def test_graphs_compute_what_those_of_the_dequantised_checkpoint_do(
    folders: tuple[Path, Path], opset: int, tmp_path: Path
) -> None:
    packed, plain = (
        build(folder, tmp_path / name, opset=opset) for folder, name in zip(folders, ("a", "b"), strict=True)
    )
    exact = OrtLoader(accuracy_level=1, threads=1)
    for name in ("prefill_0", "prefill_1", "decode"):
        runners = exact(packed[name]), exact(plain[name])
        inputs = random_inputs(runners[0])
        got, wanted = (runner.run(inputs) for runner in runners)
        rounded = OrtLoader(accuracy_level=4, threads=1)(packed[name]).run(inputs)
        assert got.keys() == wanted.keys()
        for output, values in wanted.items():
            scale = np.abs(values).max()
            np.testing.assert_allclose(got[output], values, atol=2e-5 * scale, rtol=1e-4)
            assert np.abs(rounded[output] - values).max() < 0.1 * scale, "int8 rows are an approximation of the same"
        last = "hidden_out" if name != "decode" else "logits"
        assert not np.array_equal(rounded[last], got[last]), "the level must change something"


def test_the_portable_bodies_compute_the_same(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """As a runtime without MatMulNBits runs them: onnx's own evaluator, on the smallest graph."""
    files = build(folders[0], tmp_path / "graphs", opset=18)
    runner = OrtLoader(accuracy_level=1, threads=1)(files["prefill_2"])
    inputs = random_inputs(runner)
    wanted = runner.run(inputs)
    model = onnx.load(files["prefill_2"])
    assert {node.op_type for node in model.graph.node if node.domain == "btp"} == {"BtpLinear"}
    first = model.graph.output[0].name
    np.testing.assert_allclose(run_evaluator(model, inputs), wanted[first], atol=2e-5 * np.abs(wanted[first]).max())


def test_a_matrix_of_another_shape_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pack_folder(tiny_checkpoint, tmp_path / "packed")
    builder = GraphBuilder("graph", opset=23, checkpoint=open_model(str(tmp_path / "packed")).checkpoint)
    with pytest.raises(InputError, match="96 x 64"):
        builder.linear(builder.input("x", (1, 64)), "language_model.layers.0.mlp.gate_proj", 80, "gate")
