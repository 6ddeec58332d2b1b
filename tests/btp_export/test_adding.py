"""Adding a family, a device or a command is adding one file: three made-up ones are found and work in every command.

The files lie in tests/btp_export/adding; each is copied into a temporary folder, which joins the folders that the
packages look into.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from btp_export import cli

FILES = Path(__file__).parent / "adding"
ROOMS = {
    "btp_export.families": "vipllava",
    "engines.targets": "desk_board",
    "btp_export.commands": "hello",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the three files lie, in a folder named after each package, which looks into it for this file's tests."""
    folder = tmp_path_factory.mktemp("adding")
    with pytest.MonkeyPatch.context() as patch:
        for package, module in ROOMS.items():
            (folder / package).mkdir()
            shutil.copyfile(FILES / f"{module}.py", folder / package / f"{module}.py")
            opened = importlib.import_module(package)
            patch.setattr(opened, "__path__", [*opened.__path__, str(folder / package)])
        yield folder
    for package, module in ROOMS.items():
        if sys.modules.pop(f"{package}.{module}", None):
            delattr(importlib.import_module(package), module)


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    """The made-up family's tiny model, exported with its own settings of btp-paper."""
    out = folder / "bundle"
    command = ["export", "--model", "vip-tiny", "--dummy-weights", "--plan", "btp-paper", "--out", str(out)]
    assert cli.main([*command, "--text-tokens", "32", "--max-new-tokens", "4", "--precision", "float32"]) == 0
    return out


@pytest.fixture
def document(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`document("plan", "--list")` is what the command prints with --json."""

    def run(*arguments: str) -> Any:
        capsys.readouterr()
        assert cli.main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_the_help_names_them(folder: Path) -> None:
    """In an interpreter of its own: help texts are made when the commands are imported."""
    places = "; ".join(
        f"importlib.import_module({package!r}).__path__.append({str(folder / package)!r})" for package in ROOMS
    )
    script = f"import importlib, sys; {places}; from btp_export.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script, "--help"],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Greet somebody" in done.stdout and "vip-tiny" in done.stdout


def test_lists_and_errors_name_them(document: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    presets = {entry["name"]: entry["summary"] for entry in document("plan", "--list")["presets"]}
    assert "vipllava" in presets["btp-paper"], "a family with released settings"
    assert cli.main(["export", "--model", "vip-tinny"]) == 2
    assert "--model vip-tiny" in capsys.readouterr().err, "a close name"


def test_the_command_runs(document: Callable[..., Any]) -> None:
    assert document("hello", "world") == {"format": "btp-greeting/1", "hello": "world"}


def test_the_family_is_exported_and_verified(document: Callable[..., Any], bundle: Path) -> None:
    plan = json.loads((bundle / "plan.json").read_text())
    assert plan["model_type"] == "vipllava" and plan["image_tokens"] == 36
    assert [(stage["layer"], stage["keep"]) for stage in plan["stages"]] == [(2, 12), (4, 0)], "its own settings"
    verified = document("verify", str(bundle), "--samples", "2", "--threads", "1")
    assert verified["passed"] and verified["tokens_equal"] and set(verified["kept_agreement"]) == {1.0}


def test_its_vision_graph_is_transformers_own(bundle: Path) -> None:
    """Verification takes the family's word for the tower; this compares with the whole model of transformers."""
    import onnxruntime
    import torch
    from safetensors.torch import load_file
    from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

    weights = bundle / "graphs" / "weights"
    state = {name: tensor for path in weights.glob("model*.safetensors") for name, tensor in load_file(path).items()}
    config = json.loads((bundle / "processor" / "config.json").read_text())
    model = VipLlavaForConditionalGeneration(VipLlavaConfig.from_dict(config)).float().eval()
    model.load_state_dict(state)
    pixels = torch.randn(1, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output)).numpy()
    session = onnxruntime.InferenceSession(bundle / "graphs" / "vision.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_engines_are_planned_for_the_device(
    document: Callable[..., Any], bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = document("build", str(bundle), "--target", "desk-board", "--dry-run")
    assert planned["target"] == "desk-board" and planned["findings"] == []
    assert cli.main(["build", str(bundle), "--target", "desk-bord", "--dry-run"]) == 2
    assert "--target desk-board" in capsys.readouterr().err
