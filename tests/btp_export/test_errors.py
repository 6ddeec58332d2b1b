"""Every wrong input through the whole command line: one clear message, the right exit code, nothing left behind."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from btp_export import cli
from btp_export.cli import main
from graphs.files.bundle import Bundle
from graphs.records.errors import LONGEST, InputError


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Bundle], tmp_path: Path) -> Path:
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle().root, root)
    return root


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *, code: int = 2) -> str:
    """Run, expect the exit code and one to three lines, and give the message."""
    assert main([*arguments, "--json"]) == code
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and 1 <= len(lines) <= 3 and "Traceback" not in captured.err, captured.err
    assert lines[0].startswith("error: ")
    return captured.err


def using(command: str, bundle: Path, picture: Path) -> list[str]:
    more = ["--image", str(picture), "--prompt", "what ?"] if command == "run" else []
    return [command, str(bundle), *more]


COMMANDS = ("verify", "run", "eval", "bench", "report")


@pytest.mark.parametrize("command", COMMANDS)
def test_no_bundle(capsys: pytest.CaptureFixture[str], tmp_path: Path, picture: Path, command: str) -> None:
    assert "no bundle at" in refused(capsys, using(command, tmp_path / "nothing", picture))


@pytest.mark.parametrize("command", COMMANDS)
def test_damaged_manifest(capsys: pytest.CaptureFixture[str], bundle: Path, picture: Path, command: str) -> None:
    manifest = bundle / "manifest.json"
    manifest.write_text(manifest.read_text()[:-10])
    assert "manifest.json is not a valid bundle manifest" in refused(capsys, using(command, bundle, picture))


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_weights(capsys: pytest.CaptureFixture[str], bundle: Path, picture: Path, command: str) -> None:
    (bundle / "graphs" / "weights" / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refused(capsys, using(command, bundle, picture))


@pytest.mark.parametrize("command", COMMANDS)
def test_flipped_weights(capsys: pytest.CaptureFixture[str], bundle: Path, picture: Path, command: str) -> None:
    weights = bundle / "graphs" / "weights" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "model.safetensors was changed" in refused(capsys, using(command, bundle, picture))


def test_unknown_model(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ([], ["export"], ["calibrate"]):
        assert "--model llava-1.5-7b" in refused(capsys, [*command, "--model", "lava-1.5-7b"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [[], ["export"]])
def test_plan_for_another_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_bundle: Callable[..., Bundle], command: list[str]
) -> None:
    plan = tiny_bundle().root / "plan.json"
    said = refused(capsys, [*command, "--model", "demo", "--plan", str(plan), "--out", str(tmp_path / "b")])
    assert "36 image tokens" in said and "576 image tokens" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_target_folder_not_empty(capsys: pytest.CaptureFixture[str], tmp_path: Path, force: list[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for command in ([], ["export"]):
        arguments = [*command, "--model", "demo", "--plan", "none", "--out", str(tmp_path), *force]
        assert "is not empty and is no bundle" in refused(capsys, arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_no_space(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr("graphs.files.atomic.shutil.disk_usage", lambda path: usage)
    said = refused(capsys, ["export", "--model", "demo", "--plan", "none", "--out", str(tmp_path / "b")])
    assert "1.0 MiB free" in said and "--link hard" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (["--compression", "1.5"], "1.5"), (["--keep", "many"], "--keep many"), (["--keep", "5,9"], "9"),
        (["--compression", "0.5", "--keep", "3"], "both"), (["--samples", "0"], "--samples 0"),
        (["--plan", "nothing"], "'nothing'"), (["--plan", "vtw", "--keep", "3"], "--keep"),
        (["--plan", "none", "--compression", "0.5"], "the preset none"),
        (["--plan", "vtw", "--images", "cats"], "--images with --plan vtw"),
        (["--plan", "vtw", "--mix", "scenes=1"], "--mix with --plan vtw"),
    ],
)  # fmt: skip
def test_budgets_that_cannot_be(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_checkpoint: Path, budget: list[str], said: str
) -> None:
    model = ["--model", str(tiny_checkpoint), "--samples", "2"]
    for command in (["export"], []):  # a part, and the whole job
        assert said in refused(capsys, [*command, *model, "--out", str(tmp_path / "b"), *budget])
    assert list(tmp_path.iterdir()) == []


def test_hashing_files_checks_no_engines(capsys: pytest.CaptureFixture[str], bundle: Path) -> None:
    assert "--files with --target l4" in refused(capsys, ["verify", str(bundle), "--files", "--target", "l4"])


def test_messages_of_any_length_are_three_short_lines() -> None:
    error = InputError("x" * 3000, wanted="first\nsecond", do="y" * 2946 + " the end")
    assert [len(line) <= LONGEST for line in error.lines()] == [True] * 3
    assert error.lines()[1] == "wanted: first second" and error.lines()[2].endswith("the end")
    assert len(cli.describe(RuntimeError("z" * 3000))[0][0]) <= LONGEST
