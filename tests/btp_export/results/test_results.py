"""Result documents: their schemas are current, every command's output is one, and reading them loads nothing heavy."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from btp_export.cli import command_names, main
from btp_export.results import schemas
from btp_export.results.answers import RunResult
from btp_export.results.base import Result
from btp_export.results.doctor import Doctor, Version
from btp_export.results.engines import BuildResult
from btp_export.results.evaluation import Evaluation
from btp_export.results.plans import ExportResult, Front, PlanSummary, Presets
from btp_export.results.timing import Bench
from btp_export.results.verification import Verification
from tests.plans import PLAN

ROOT = Path(__file__).parents[3]
SHAPES = ["--text-tokens", "16", "--max-new-tokens", "4"]
Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command with --json and gives what it prints."""

    def command(*arguments: object) -> str:
        assert main([*map(str, arguments), "--json"]) == 0
        return capsys.readouterr().out

    return command


def agrees(kind: type[Result], printed: str) -> None:
    """What is printed is the document, byte for byte, with the keys of its schema and its format first."""
    assert kind.model_validate_json(printed).to_json() == printed
    document = json.loads(printed)
    assert next(iter(document)) == "format" and document["format"] == kind.model_fields["format"].default
    schema = kind.model_json_schema(mode="serialization")
    assert set(schema.get("required", ())) <= document.keys() <= schema["properties"].keys()


def test_the_schemas_are_current() -> None:
    """`make schemas` writes them."""
    folder = ROOT / "docs" / "schemas"
    current = dict(schemas.schema_files())
    assert current == {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def test_every_document_has_a_schema() -> None:
    def below(kind: type[Result]) -> set[type[Result]]:
        return {kind}.union(*map(below, kind.__subclasses__())) if kind.__subclasses__() else {kind}

    ours = {kind for kind in below(Result) if kind.__module__.startswith("btp_export.results.")} - {Result}
    assert ours == set(schemas.DOCUMENTS)
    names = [schemas.DOCUMENTS[kind] for kind in schemas.DOCUMENTS]
    assert all(any(f"`{command}`" in name for name in names) for command in command_names() if command != "serve")


def test_each_command_prints_its_document(
    run: Run, tiny_bundle: Any, tiny_checkpoint: Path, pictures: Any, tmp_path: Path
) -> None:
    bundle, picture = tiny_bundle(PLAN).root, tmp_path / "a.png"
    pictures[0].save(picture)
    agrees(Verification, run("verify", bundle, "--samples", 1, "--tokens", 2))
    agrees(Bench, run("bench", bundle, "--rounds", 1))
    agrees(Evaluation, run("eval", bundle, "--samples", 2, "--plans", "none,btp"))
    agrees(RunResult, run("run", bundle, "--image", picture, "--prompt", "what colour is the star?"))
    prompts = ["--prompt", "what colour is the star?", "--prompt", "is there a red circle?"]
    agrees(RunResult, run("run", bundle, "--image", picture, *prompts))
    agrees(PlanSummary, run("plan", bundle, "--out", tmp_path / "plan.json"))
    agrees(Presets, run("plan", "--list"))
    agrees(BuildResult, run("build", bundle, "--target", "l4", "--dry-run", "--unpruned"))
    agrees(ExportResult, run("export", "--model", tiny_checkpoint, "--plan", "vtw", "--out", tmp_path / "b", *SHAPES))
    agrees(Doctor, run("doctor"))
    agrees(Version, run("--version"))


def test_calibrations_print_their_documents(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["calibrate", "--model", tiny_checkpoint, "--samples", 4]
    agrees(PlanSummary, run(*arguments, "--compression", 0.5))
    front = run(*arguments, "--pareto", "--budgets", "0.5,0.7", "--out", tmp_path / "front")
    agrees(Front, front)
    stored = (tmp_path / "front" / "front.json").read_text()
    agrees(Front, stored)
    assert json.loads(stored) | {"out": str(tmp_path / "front")} == json.loads(front)


def test_reading_results_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "typer", "rich")
    script = f"import sys, btp_export.results.schemas; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
