"""Shell completion, by the scripts that are installed and the protocol they speak with the command."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from btp_export import cli
from btp_export.commands._model_names import model_names
from btp_export.families import known_models

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "transformers", "onnxruntime", "onnx", "onnx_ir", "huggingface_hub", "PIL")


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment with a command btp-export, and a bundle B with a profile whose name is no name."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "btp-export"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m btp_export "$@"\n')
    command.chmod(0o755)
    (tmp_path / "B").mkdir()
    profiles = [{"name": "b1-t64-n128"}, {"name": f"x$(touch {tmp_path}/run)"}]
    (tmp_path / "B" / "manifest.json").write_text(json.dumps({"profiles": profiles}))
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}


def run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, cwd=environment["HOME"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


LINES = [
    ("btp-export ver", ["verify"]),
    ("btp-export export --model qwen", ["qwen2.5-vl-7b"]),
    ("btp-export build B --target rtx-", ["rtx-ada", "rtx-blackwell"]),
    ("btp-export export --plan btp", ["btp", "btp-paper", "btp-paper-corrected"]),
    ("btp-export eval B --plans none,vt", ["none,vtw"]),
    ("btp-export plan fast", ["fastv"]),
    ("btp-export run B --device cu", ["cuda"]),
    ("btp-export run B --profile ", ["b1-t64-n128"]),
    ("btp-export run --eng", []),  # a former name
    ("btp-export verify --target rtx-a", ["rtx-ada"]),
]
SCRIPT = 'eval "$(_BTP_EXPORT_COMPLETE=source_{shell} btp-export)"\n'


def test_bash(shell: dict[str, str]) -> None:
    script = SCRIPT.format(shell="bash")
    for line, _ in LINES:
        words = [*line.split(), *([""] if line.endswith(" ") else [])]
        script += f"COMP_WORDS=({' '.join(word or chr(39) * 2 for word in words)}); COMP_CWORD={len(words) - 1}\n"
        script += '_btp_export_completion btp-export; echo "${COMPREPLY[*]}"\n'
    offered = run(["bash", "--norc", "-c", script], shell).splitlines()
    assert [line.split() for line in offered] == [expected for _, expected in LINES]
    assert not (Path(shell["HOME"]) / "run").exists()


@pytest.mark.parametrize(("line", "expected"), [LINES[0], LINES[2], LINES[7]])
def test_zsh_protocol(
    shell: dict[str, str],
    line: str,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What zsh evaluates; descriptions come with the values and take one line each."""
    monkeypatch.chdir(shell["HOME"])
    variables = {"_BTP_EXPORT_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": line, "COLUMNS": "80"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.main([]) == 0
    answer = capsys.readouterr().out
    assert answer.startswith("_arguments '*: :((") and len(answer.splitlines()) == len(expected)
    assert all(f'"{word}"' in answer for word in expected) and "$(" not in answer


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh(shell: dict[str, str]) -> None:
    """The script in a zsh whose completion system hands back what it is given."""
    script = "compdef() { : }; _arguments() { print -r -- $@ }\n" + SCRIPT.format(shell="zsh")
    for line in ("verify --target rtx-a", "run B --profile "):
        words = ["btp-export", *line.split(), *(["''"] if line.endswith(" ") else [])]
        script += f"words=({' '.join(words)}); CURRENT={len(words)}; _btp_export_completion\n"
    offered = run(["zsh", "-f", "-c", script], shell)
    assert '"rtx-ada"' in offered and '"b1-t64-n128"' in offered
    assert not (Path(shell["HOME"]) / "run").exists()


def test_installation(shell: dict[str, str]) -> None:
    """`--show-completion` and `--install-completion` from a bash, which they recognise by themselves."""
    shown = run(["bash", "--norc", "-c", "btp-export --show-completion; :"], shell)
    assert "complete -o default -F _btp_export_completion btp-export" in shown
    run(["bash", "--norc", "-c", "btp-export --install-completion; :"], shell)
    home = Path(shell["HOME"])
    assert (home / ".bash_completions" / "btp-export.sh").read_text().strip() == shown.strip()
    assert ".bash_completions/btp-export.sh" in (home / ".bashrc").read_text()


LIGHT = """
import os, sys
from btp_export.cli import main
for words in ("export --model ", "build B --target ", "export --plan ", "run B --profile "):
    os.environ["_TYPER_COMPLETE_ARGS"] = f"btp-export {words}"
    assert main([]) == 0
    print("loaded for", words, [name for name in HEAVY if name in sys.modules])
"""


def test_models_named_for_help_are_those_of_the_families() -> None:
    assert model_names() == list(known_models())


def test_help_loads_no_numpy(shell: dict[str, str]) -> None:
    """Which would take longer than all else: the aim is 0.3 s."""
    code = "import sys; from btp_export.cli import main; main(['--help']); print([*filter(sys.modules.get, HEAVY)])"
    heavy = (*HEAVY, "numpy", "pydantic")
    answer = run([sys.executable, "-c", f"HEAVY = {heavy!r}; {code}"], shell)
    assert answer.splitlines()[-1] == "[]" and all(name in answer for name in known_models())


def test_completion_is_light(shell: dict[str, str]) -> None:
    """In one fresh interpreter: this one has the libraries loaded."""
    answer = run([sys.executable, "-c", f"HEAVY = {HEAVY!r}{LIGHT}"], shell | {"_BTP_EXPORT_COMPLETE": "complete_zsh"})
    loaded = [line for line in answer.splitlines() if line.startswith("loaded for")]
    assert len(loaded) == 4 and all(line.endswith(" []") for line in loaded)
    assert answer.count("_arguments") == 4
