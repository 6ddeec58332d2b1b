"""The light installation: the runner's commands need none of the large libraries; the others say what to install.

Here the libraries are hidden from one interpreter. benchmarks/installed.py makes a real environment.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from btp_export.cli import command_names
from graphs.files.bundle import Bundle
from tests.btp_export.profiling.test_profile import STAGES, TARGET, measured
from tests.plans import tiny_plan

ROOT = Path(__file__).parents[1]
# What the extras bring, and what those bring: no command of the runner may import any of it.
HEAVY = (
    "torch", "transformers", "huggingface_hub", "safetensors", "onnx", "onnx_ir", "onnxscript", "onnxruntime",
    "polygraphy", "tensorrt", "tensorrt_rtx", "datasets", "google.protobuf", "sympy", "fastapi", "uvicorn",
    "prometheus_client", "ray",
)  # fmt: skip
RUN = """
import contextlib, io, json, sys
for name in HIDDEN:
    sys.modules[name] = None  # importing it fails as if it were not there
from btp_export.cli import main
seen = []
for arguments in COMMANDS:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    loaded = [name for name in HEAVY if sys.modules.get(name) is not None]
    seen.append([code, out.getvalue(), err.getvalue(), loaded])
json.dump(seen, sys.stdout)
"""


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str
    loaded: list[str]


def run_hidden(commands: list[list[str]], *, hidden: tuple[str, ...] = HEAVY) -> list[Ended]:
    script = f"HIDDEN = {hidden!r}\nHEAVY = {HEAVY!r}\nCOMMANDS = {commands!r}\n{RUN}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return [Ended(*entry) for entry in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A copy: other files share the bundle, and here engines come into it."""
    made: Bundle = tiny_bundle(tiny_plan(*STAGES))
    return Bundle.open(shutil.copytree(made.root, tmp_path_factory.mktemp("light") / "bundle"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.linear_gradient("L").convert("RGB").resize((40, 30)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def commands(bundle: Bundle, picture: str) -> dict[str, list[tuple[list[str], int, str]]]:
    """For each command: what is typed, the exit code, and a word that is said."""
    root = str(bundle.root)
    folder = measured(bundle)
    ask = ["run", root, "--image", picture, "--prompt", "what?"]
    return {
        "main": [(["--model", "demo", "--out", f"{root}.new"], 3, "[export]")],
        "calibrate": [(["calibrate", "--model", "demo", "--out", f"{root}.json"], 3, "[export]")],
        "export": [(["export", "--model", "demo", "--plan", "none", "--out", f"{root}.new"], 3, "[export]")],
        "verify": [(["verify", root], 3, "[export]"), (["verify", root, "--files"], 0, "as they were exported")],
        "run": [(ask, 3, "[cpu]"), ([*ask, "--target", "h100"], 2, "no engines")],
        "eval": [(["eval", root], 3, "[export]")],
        "bench": [(["bench", root], 3, "[export]"), (["bench", root, "--target", "h100"], 2, "no engines")],
        "build": [(["build", root, "--target", TARGET, "--dry-run"], 3, "[device]")],
        "profile": [(["profile", root, "--target", TARGET, "--from", str(folder / "profile")], 0, "GFLOP")],
        "plan": [
            (["plan", root], 0, "compression"),
            (["plan", "--list"], 0, "btp-paper"),
            (["plan", "btp-paper", "--model", "demo"], 3, "[export]"),
        ],
        "serve": [(["serve", root], 3, "[serve]")],
        "report": [(["report", root], 3, "[export]")],
        "doctor": [(["doctor"], 0, "everything required is installed")],
    }  # fmt: skip


def test_every_command_works_or_names_the_extra(commands: dict[str, list[tuple[list[str], int, str]]]) -> None:
    assert set(commands) == {"main", *command_names()}, "a new command says here what it needs"
    rows = [row for rows in commands.values() for row in rows]
    for (typed, code, word), ended in zip(rows, run_hidden([row[0] for row in rows]), strict=True):
        assert (ended.code, ended.loaded) == (code, []), (typed, ended)
        assert word in ended.out + ended.err, (typed, ended)
        if code == 3:
            lines = ended.err.splitlines()
            assert len(lines) == 3 and "is not installed" in lines[0] and "pip install 'btp-export[" in lines[2], (
                ended.err
            )


def test_with_onnx_runtime_alone_the_answer_is_the_same(bundle: Bundle, picture: str) -> None:
    from btp_export.running.runtime import load

    hidden = tuple(name for name in HEAVY if name not in ("onnxruntime", "google.protobuf"))
    typed = ["run", str(bundle.root), "--image", picture, "--prompt", "what is it?", "--json"]
    [ended] = run_hidden([typed], hidden=hidden)
    assert ended.code == 0, ended.err
    [answer] = load(bundle).generate(picture, "what is it?")
    document = json.loads(ended.out)
    assert document["text"] == answer.text and document["token_ids"] == list(answer.token_ids)
    assert set(ended.loaded) <= {"onnxruntime", "google.protobuf"}


def test_the_runner_of_engines_imports_nothing_heavy() -> None:
    modules = "btp_export.running.runtime, engines.tensorrt.run.runner, btp_export.measuring.bench, btp_export.api"
    script = f"import sys\nfor name in {HEAVY!r}: sys.modules[name] = None\nimport {modules}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_functions_name_the_extra_too(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import btp_export

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "engines.runners.onnxruntime", raising=False)
    with pytest.raises(btp_export.UnavailableError, match=r"btp-export\[cpu\]"):
        btp_export.load(bundle)


def test_an_old_bundle_says_what_reads_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from btp_export.model import prompting
    from graphs.records.errors import UnavailableError

    def no_transformers(folder: Path) -> None:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr("btp_export.families._describe.checkpoint_processor", no_transformers)
    monkeypatch.setattr(prompting, "PREPROCESS", "no-such-file")
    with pytest.raises(UnavailableError, match="earlier version") as caught:
        prompting.open_processor(bundle.processor)
    assert "btp-export[export]" in caught.value.do
