"""Graphs in parts: the parts are the graph, and streamed verification finds what the ordinary one finds."""

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from btp_export import cli
from btp_export.measuring.verify import verify_bundle
from btp_export.results.verification import Verification
from btp_export.running.memory_fit import Streaming
from engines.runners.onnxruntime import OrtLoader
from engines.verify.gates import GATES
from engines.verify.streamed_graphs import StreamedRunner
from graphs.building.graph_builder import GraphBuilder
from graphs.building.graph_parts import has_bfloat16, split, wide_weights, widen
from graphs.files.bundle import Bundle
from graphs.files.onnx_file import read_graph
from tests.children import exit_code
from tests.engines.verify.test_verification import EARLY, PLAN, TEXT

STREAMED = Streaming(above=0, part_bytes=0)  # every bundle, one layer at a time


@pytest.fixture(autouse=True)
def own_checkpoints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Checkpoints go to a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["prefill_0", "prefill_1", "decode", "head", "select_0", "vision"])
@pytest.mark.parametrize("opset", [23, 18])
def test_the_parts_are_the_graph(name: str, opset: int, tiny_bundle: Any) -> None:
    path = tiny_bundle(PLAN, opset=opset).graph_path(name)
    model = read_graph(path)
    parts = split(model, 0)
    assert [node.name for part in parts for node in part.model.graph.node] == [node.name for node in model.graph.node]
    assert sum(part.weights for part in parts) >= wide_weights(model)
    layers = {"prefill_0": 2, "prefill_1": 2, "decode": 7}.get(name, 1)  # decode: six layers, then the output matrix
    assert len(parts) in (layers, layers + 1)  # the last reshape may stand alone
    loader = OrtLoader(threads=1)
    for part in parts:
        opened = loader.open_model(part.model.SerializeToString(), path)
        assert set(opened.inputs) == set(part.inputs) and set(opened.outputs) == set(part.outputs)
    (whole,) = split(model, 2**40)
    assert whole.weights == wide_weights(model)


@pytest.mark.parametrize("name", ["prefill_0", "decode"])
def test_parts_compute_what_the_whole_computes(name: str, tiny_bundle: Any) -> None:
    bundle, loader = tiny_bundle(PLAN), OrtLoader(threads=1)
    whole, parts = loader(bundle.graph_path(name)), StreamedRunner(bundle.graph_path(name), loader, most=0)
    rng = np.random.default_rng(0)
    feeds = [
        {
            part: np.full(spec.shape, 20, np.int32) if spec.dtype == np.int32
            else rng.standard_normal(spec.shape).astype(spec.dtype)
            for part, spec in whole.inputs.items()
        }
        for _ in range(3)
    ]  # fmt: skip
    assert parts.inputs == dict(whole.inputs) and parts.outputs == dict(whole.outputs)
    got: list[dict[str, Any]] = [{}, {}, {}]
    parts.run_each(feeds, lambda place, made: got[place].update(made))
    for feed, outputs in zip(feeds, got, strict=True):
        wanted = whole.run(feed)
        assert wanted.keys() == outputs.keys()
        for output, value in wanted.items():
            np.testing.assert_allclose(outputs[output], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("plan", "options"),
    [(None, {}), (PLAN, {}), (PLAN, {"batch": 2}), (PLAN, {"opset": 18}), (PLAN, {"assemble": "whole"}), (EARLY, {}),
     (TEXT, {}), (PLAN, {"precision": "float16"}), (PLAN, {"precision": "bfloat16"})],
    ids=["unpruned", "pruned", "batch", "opset 18", "whole", "layer 0", "similar-text", "float16", "bfloat16"],
)  # fmt: skip
def test_bundles_of_all_kinds_verify_streamed(
    plan: Any, options: dict[str, Any], tiny_bundle: Any, tmp_path: Path
) -> None:
    bundle = tiny_bundle(plan, **options)
    result = verify_bundle(bundle, samples=2, threads=1, tokens=3, streaming=STREAMED)
    assert result.failures == () and result.passed and result.streamed
    assert [graph.name for graph in result.graphs] == [graph.name for graph in bundle.graphs()]
    half = options.get("precision") == "float16"
    exact = [graph for graph in result.graphs if graph.name != "vision"]
    assert half or all(1 - graph.cosine < 1e-9 for graph in exact)
    assert not (tmp_path / "cache" / "btp-export" / "work").exists()
    if options.get("precision") != "bfloat16":  # for which there are no kernels here
        ordinary = verify_bundle(bundle, samples=2, threads=1, tokens=3)
        assert ordinary.passed and not ordinary.streamed
        assert half or ordinary.kept_agreement == result.kept_agreement


def test_widened_bfloat16_has_no_bfloat16_but_its_weights(tiny_bundle: Any) -> None:
    model = read_graph(tiny_bundle(PLAN, precision="bfloat16").graph_path("prefill_0"))
    assert has_bfloat16(model) and not has_bfloat16(widen(model))
    assert has_bfloat16(model), "the model itself is not changed"


def test_widened_bfloat16_has_all_of_a_factor(tmp_path: Path) -> None:
    """Rounded to bfloat16, the 1 / sqrt(32) that scales a query is off by 1e-4: far too large for float32's gates."""
    b = GraphBuilder("scaled", opset=23, precision="bfloat16")
    b.output(b.scaled(b.input("x", (1, 64)), 32**-0.5, "y"), "y")
    path = tmp_path / "scaled.onnx"
    onnx.save(widen(ir.to_proto(b.build().model)), path)
    x = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
    np.testing.assert_allclose(OrtLoader(threads=1)(path).run({"x": x})["y"], x / np.sqrt(32), rtol=1e-6)


def test_a_perturbed_weight_is_found_in_its_graph(tiny_bundle: Any, tmp_path: Path) -> None:
    bundle = tiny_bundle(PLAN)
    root = tmp_path / "bundle"
    shutil.copytree(bundle.root, root)
    model = onnx.load(root / "graphs" / "prefill_1.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.name == "layer_3.mlp.up")
    other = next(name for name in (i.name for i in model.graph.initializer) if "layers.2.mlp.up_proj" in name)
    node.input[1] = other  # the weights of another layer
    onnx.save(model, root / "graphs" / "prefill_1.onnx")
    result = verify_bundle(
        Bundle(root, bundle.manifest, bundle.plan), samples=1, threads=1, tokens=2, streaming=STREAMED
    )
    assert not result.passed
    assert any(text.startswith("prefill_1") for text in result.failures)
    assert not any(text.startswith(("prefill_0", "prefill_2", "decode")) for text in result.failures)


def test_widened_bfloat16_is_held_to_the_gates_it_reports(tiny_bundle: Any, tmp_path: Path) -> None:
    """A fault between the two gates: far too large for float32, which it computes in, and small for bfloat16."""
    bundle = tiny_bundle(PLAN, precision="bfloat16")
    root = tmp_path / "bundle"
    shutil.copytree(bundle.root, root)
    model = onnx.load(root / "graphs" / "prefill_1.onnx", load_external_data=False)
    norm = next(node for node in model.graph.node if node.op_type == "RMSNormalization")
    epsilon = next(attribute for attribute in norm.attribute if attribute.name == "epsilon")
    epsilon.f = 0.05  # the model's is 1e-5 or so
    onnx.save(model, root / "graphs" / "prefill_1.onnx")
    result = verify_bundle(
        Bundle(root, bundle.manifest, bundle.plan), samples=1, threads=1, tokens=2, streaming=STREAMED
    )
    [check] = [graph for graph in result.graphs if graph.name == "prefill_1"]
    gates = GATES["bfloat16"]
    assert check.cosine > gates.cosine and abs(check.norm_ratio - 1) < gates.norm, "bfloat16's gates miss it"
    assert result.gates.cosine == check.gates.cosine == GATES["float32"].cosine > check.cosine
    vision = result.graphs[0]
    assert (vision.name, vision.gates.cosine) == ("vision", gates.cosine), "which ran in parts of its own type"
    assert not result.passed
    assert [text.split(":")[0] for text in result.failures] == ["prefill_1"]


@pytest.mark.parametrize("phase", ["free run: decode", "reference"])
def test_an_interrupted_verification_goes_on(phase: str, tiny_bundle: Any, tmp_path: Path) -> None:
    bundle, notes, calls = tiny_bundle(PLAN), [], []

    def report(done: int, total: int, text: str = "") -> None:
        calls.append(text)
        if calls.count(phase) == 6:
            raise KeyboardInterrupt

    def run(**more: Any) -> Verification:
        return verify_bundle(
            bundle, samples=2, tokens=3, threads=1, note=notes.append, streaming=replace(STREAMED, interval=0.0), **more
        )

    wanted = run()
    with pytest.raises(KeyboardInterrupt):
        run(report=report)
    assert list((tmp_path / "cache" / "btp-export" / "work").glob("*/*/*.json")), "a checkpoint stays behind"
    assert run() == wanted
    assert any("resumed the free run" in text for text in notes)
    assert not (tmp_path / "cache" / "btp-export" / "work").exists()


def verify_until_killed(root: str, printed: Path) -> None:
    """In a child: kill -9 while the last graph of the prefill is checked."""
    os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT), 1)
    sys.stdout = os.fdopen(1, "w", buffering=1)

    def kill_in_the_graphs(done: int, total: int, text: str = "") -> None:
        if "graphs: prefill_2" in text:
            os.kill(os.getpid(), signal.SIGKILL)

    streaming = Streaming(interval=0.0)
    bundle = Bundle.open(Path(root))
    verify_bundle(bundle, samples=1, tokens=2, threads=1, report=kill_in_the_graphs, streaming=streaming)


def test_a_hard_kill_and_then_the_same_result(
    tiny_bundle: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """bfloat16, which is streamed whatever its size: the command has no setting for that."""
    root = str(tiny_bundle(PLAN, precision="bfloat16").root)
    command = ["verify", root, "--samples", "1", "--tokens", "2", "--threads", "1", "--device", "cpu", "--json"]
    assert cli.main(command) == 0
    wanted = json.loads(capsys.readouterr().out)
    printed = tmp_path / "printed"
    assert exit_code(verify_until_killed, root, printed) == -signal.SIGKILL and printed.read_bytes() == b""
    assert list((tmp_path / "cache" / "btp-export" / "work").glob("*/*/*.json")), "a checkpoint stays behind"
    assert cli.main(command) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == wanted
    assert "resumed the check of the graphs" in shown.err and "resumed the free run" in shown.err
    assert not (tmp_path / "cache" / "btp-export" / "work").exists()
