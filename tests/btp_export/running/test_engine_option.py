"""`--target` of run, verify and bench, on a GPU and a TensorRT in host memory; and what is said where there is none."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from btp_export.cli import main
from btp_export.running.runtime import load
from engines.tensorrt.prepare.prepared_graphs import Choices
from engines.tensorrt.records import UNPRUNED, engines_folder
from graphs.files.bundle import Bundle
from tests.engines.runners.host_cuda import HostCuda
from tests.engines.tensorrt.run.engine_folders import STAGES, TARGET, machine_with_gpu, new_process, write_engines
from tests.plans import tiny_plan


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    new_process(monkeypatch)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> HostCuda:
    return machine_with_gpu(monkeypatch)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with engines, the unpruned ones among them."""
    plan = tiny_plan(*STAGES)
    root = tmp_path_factory.mktemp("engines") / "bundle"
    shutil.copytree(tiny_bundle(plan).root, root)
    made = Bundle.open(root)
    choices = Choices(opset=18, plugins=False, weights="shared")
    folder = engines_folder(made, TARGET)
    write_engines(made, folder, choices)
    write_engines(made.without_pruning(), folder / UNPRUNED, choices)
    return made


@pytest.fixture
def picture(pictures: list[Image.Image], tmp_path: Path) -> Path:
    pictures[0].save(tmp_path / "a.png")
    return tmp_path / "a.png"


def run(bundle: Bundle, picture: Path, *more: str) -> int:
    return main(["run", str(bundle.root), "--image", str(picture), "--prompt", "what color is it ?", *more])


def test_run_says_the_same(
    bundle: Bundle, picture: Path, machine: HostCuda, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for more in ((), ("--target", TARGET)):
        assert run(bundle, picture, "--json", *more) == 0
        answers.append(json.loads(capsys.readouterr().out))
    for key in ("text", "token_ids", "kept", "tokens_kept"):
        assert answers[0][key] == answers[1][key]
    assert "cudaGraphLaunch" in machine.calls


def test_load(bundle: Bundle, pictures: list[Image.Image], machine: HostCuda) -> None:
    model = load(bundle, target=TARGET)
    answers = model.generate(pictures[:2], ["what color is it ?", "how many ?"])
    plain = load(bundle, threads=1).generate(pictures[:2], ["what color is it ?", "how many ?"])
    assert [one.token_ids for one in answers] == [one.token_ids for one in plain]


def test_verify(bundle: Bundle, machine: HostCuda, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(bundle.root), "--target", TARGET, "--samples", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and found["engine"] == TARGET
    assert [graph["name"] for graph in found["graphs"]] == [graph.name for graph in bundle.graphs()]


def test_bench(bundle: Bundle, machine: HostCuda, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(bundle.root), "--target", TARGET, "--rounds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["engine"] == TARGET and len(found["select_ms"]) == 2
    assert found["cache_bytes"]["full"] > found["cache_bytes"]["pruned"]


def test_bench_wants_engines_it_can_tell_apart(
    bundle: Bundle, machine: HostCuda, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(bundle.root, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines"))
    other = Bundle.open(tmp_path / "bundle")
    folder = engines_folder(other, TARGET)
    write_engines(other, folder, Choices(opset=18, plugins=False, assemble="whole"))
    assert main(["bench", str(other.root), "--target", TARGET]) == 2
    assert "--assemble segments" in capsys.readouterr().err
    shutil.rmtree(folder)
    write_engines(other, folder, Choices(opset=18, plugins=False))
    assert main(["bench", str(other.root), "--target", TARGET]) == 2
    assert "no engines at" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "verify", "bench"])
def test_what_is_missing_is_said(
    command: str, bundle: Bundle, tiny_bundle: Any, picture: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    extra = ["--image", str(picture), "--prompt", "what ?"] if command == "run" else []

    def said(root: Path, target: str, *more: str) -> tuple[int, str]:
        code = main([command, str(root), *extra, "--target", target, *more])
        return code, capsys.readouterr().err

    code, text = said(tiny_bundle().root, TARGET)
    assert code == 2 and "no engines at" in text and f"btp-export build BUNDLE --target {TARGET}" in text
    code, text = said(bundle.root, "jetson-orin")
    assert code == 2 and "unknown target" in text
    code, text = said(bundle.root, TARGET, "--threads", "2")
    assert code == 2 and "leave --threads out" in text
    monkeypatch.setattr("engines.runners.cuda.library", lambda: HostCuda(devices=0))
    code, text = said(bundle.root, TARGET)
    assert code == 3 and "no GPU 0" in text and "Traceback" not in text
