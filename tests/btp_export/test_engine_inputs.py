"""The calibration picture that the kit's inputs come from: recorded as fed, one graph open at a time, or a clear no."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from btp_export.engine_inputs import record_calibration
from engines.tensorrt.prepare.prepared_graphs import Choices, prepare
from graphs.files.bundle import Bundle
from graphs.records.errors import UnavailableError


def files_of(bundle: Bundle, **choices: Any) -> dict[str, Path]:
    folder = bundle.root / "graphs"
    paths = {}
    for graph in prepare(bundle, Choices(bundle.manifest.build.opset, plugins=False, **choices)):
        paths[graph.name] = folder / f"{graph.name}.onnx"
        if not paths[graph.name].exists():
            paths[graph.name].write_bytes(graph.serialize())
    return paths


def test_every_input_of_every_graph(tiny_bundle: Any, tmp_path: Path) -> None:
    bundle = tiny_bundle()
    record_calibration(bundle, bundle.profile().name, files_of(bundle), tmp_path / "inputs")
    for graph in bundle.graphs():
        collected = {path.stem: path.stat().st_size for path in (tmp_path / "inputs" / graph.name).iterdir()}
        assert collected == {tensor.name: 4 * int(np.prod(tensor.shape)) for tensor in graph.inputs}
    token = np.fromfile(tmp_path / "inputs" / "decode" / "hidden.bin", "<f4")
    table = bundle.checkpoint()["language_model.embed_tokens.weight"].read()
    assert (np.abs(table - token).max(axis=1) == 0).sum() == 1  # the row of one token, the one that was predicted


def test_prompts_are_shortened_to_the_bucket(tiny_bundle: Any, tmp_path: Path) -> None:
    bundle = tiny_bundle(text_tokens=6)
    record_calibration(bundle, bundle.profile().name, files_of(bundle), tmp_path / "inputs")
    last = np.fromfile(tmp_path / "inputs" / "prefill_0" / "last.bin", "<i4")
    profile = bundle.profile()
    assert profile.prefix_tokens + profile.image_tokens < last[0] < profile.total_tokens


def test_what_this_machine_cannot_run(tiny_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny_bundle()
    files = files_of(bundle)
    monkeypatch.setenv("BTP_MEMORY_GIB", "0.000001")
    with pytest.raises(UnavailableError, match=r"the largest graph needs about .* in ONNX Runtime"):
        record_calibration(bundle, bundle.profile().name, files, tmp_path / "inputs")
    assert not (tmp_path / "inputs").exists()
    monkeypatch.delenv("BTP_MEMORY_GIB")
    build = bundle.manifest.build.model_copy(update={"precision": "bfloat16"})
    narrow = Bundle(bundle.root, bundle.manifest.model_copy(update={"build": build}), bundle.plan)
    with pytest.raises(UnavailableError, match="no bfloat16 kernels"):
        record_calibration(narrow, bundle.profile().name, files, tmp_path / "inputs")
