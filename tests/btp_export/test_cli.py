"""The frame of the command line: help, usage errors, exit codes, signals, closed pipes."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel, Field, model_serializer

from btp_export import __version__, cli
from graphs.records.errors import CheckError, InputError, UnavailableError

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "btp_export", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, **options)


def test_help_shows_options_under_the_headings_of_their_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate", "--help"]) == 0
    sections: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.splitlines():
        if re.fullmatch(r"[A-Z][^:]*:", line):
            sections[line[:-1]] = []
        elif sections and line.startswith("  --"):
            sections[list(sections)[-1]].append(line.split()[0])
    assert list(sections) == ["Options", "Budget", "Method", "Random weights"]
    assert "--keep" in sections["Budget"] and "--samples" in sections["Options"]
    assert sections["Random weights"] == ["--dummy-weights", "--dummy-layers", "--dummy-seed"]


def test_help_lists_the_commands_at_80_columns() -> None:
    done = run("--help", env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "..." not in done.stdout.split("Commands:")[1]  # nothing is cut off
    shown = [
        line.split()[0] for line in lines[lines.index("Commands:") + 1 :] if line.startswith("  ") and line[2] != " "
    ]
    assert shown == cli.command_names()
    assert set(cli.ORDER) <= set(shown)


def test_version() -> None:
    assert run("--version").stdout == f"btp-export {__version__}\n"


def test_version_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"format": "btp-version/1", "version": __version__}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "a model or a command is needed"),
        (["--bla"], "No such option: --bla"),
        (["exprot"], "Did you mean 'export'"),
        (["export"], "Missing option '--model'"),
        (["export", "--model", "demo", "--link", "soft"], "'--link': 'soft' is not one of 'auto', 'hard', 'copy'"),
        (["export", "--model", "demo", "--batch", "0"], "--batch 0"),
        (["export", "--model", "demo", "--batch", "two"], "'--batch': it takes a whole number"),
        (["run", "B", "--image", "a", "--prompt", "b", "--top-p", "high"], "'--top-p': it takes a number"),
        (["--seed", "3", "doctor"], "it belongs after the command"),
        (["--json", "doctor"], "it belongs after the command"),
    ],
)
def test_usage_errors(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert shown.out == "" and 1 <= len(lines) <= 3 and said in lines[0], shown.err
    assert lines[-1].startswith("  do this: ")


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let `btp-export doctor` raise."""

    def command() -> None:
        raise error

    monkeypatch.setattr("btp_export.commands.doctor.command", command)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (CheckError("got", "wanted", "this"), 1, "error: got\n  wanted: wanted\n  do this: this\n"),
        (InputError("got"), 2, "error: got\n"),
        (UnavailableError("got", do="this"), 3, "error: got\n  do this: this\n"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x.png"), 2, "error: x.png: No such file"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device\n  do this: free"),
        (ModuleNotFoundError("No module named 'jinja2'", name="jinja2"), 3, "error: jinja2 is not installed"),
        (MemoryError(), 3, "error: not enough memory"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (ZeroDivisionError("division by zero"), 1, "error: ZeroDivisionError: division by zero\n  this is a defect"),
    ],
)
def test_errors_become_messages_and_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    fail_with(monkeypatch, error)
    assert cli.main(["doctor"]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(said)
    assert len(captured.err.splitlines()) <= 3 and "Traceback" not in captured.err


def interrupted(number: int) -> bool:
    signal.raise_signal(signal.SIGINT)
    return number == 1


class Serialized(BaseModel):
    @model_serializer
    def written(self) -> bool:
        return interrupted(1)


class Excluded(BaseModel):
    number: int = Field(default=1, exclude_if=interrupted)


@pytest.mark.parametrize("written", [lambda: Serialized().model_dump(), lambda: Excluded().model_dump_json()])
def test_a_signal_while_a_record_is_written_still_exits_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], written: Callable[[], object]
) -> None:
    """pydantic makes an error of its own of whatever is raised there."""
    monkeypatch.setattr("btp_export.commands.doctor.command", lambda: print(written()))
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_inside_executed_text_still_exits_with_130(tmp_path: Path, name: str) -> None:
    """Libraries exec text while they capture a graph; a plain KeyboardInterrupt there turns the exit into a kill."""
    (tmp_path / "interrupted.py").write_text(
        "import sys\n"
        "from btp_export import cli\n"
        "from btp_export.commands import doctor\n"
        "def command():\n"
        f"    exec('import os, signal, time\\nos.kill(os.getpid(), signal.{name})\\ntime.sleep(10)')\n"
        "doctor.command = command\n"
        "sys.exit(cli.main(['doctor']))\n"
    )
    paths = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-m", "interrupted"], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("run b --image i --prompt --debug", False),
        ("run b --image i --prompt --debug --debug", True),
        ("run b --image i --debug --prompt x", True),
        ("--debug run b", True),
        ("run b --json --debug", True),
        ("run b --prompt=--debug", False),
    ],
)
def test_debug_as_the_value_of_another_option_is_no_option(words: str, wanted: bool) -> None:
    assert cli._wants_debug(words.split()) is wanted


def test_a_usage_error_is_short() -> None:
    error = typer.BadParameter("9" * 5000)
    lines, code = cli.describe(error)
    assert code == 2 and all(len(line) < 600 for line in lines)


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(monkeypatch, InputError("got"))
    assert cli.main(["doctor", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("returned", [None, 0, 1])
def test_a_command_s_exit_code(monkeypatch: pytest.MonkeyPatch, returned: int | None) -> None:
    monkeypatch.setattr("btp_export.commands.doctor.command", lambda: returned)
    assert cli.main(["doctor"]) == (returned or 0)

    def leave() -> None:
        raise typer.Exit(returned or 0)

    monkeypatch.setattr("btp_export.commands.doctor.command", leave)
    assert cli.main(["doctor"]) == (returned or 0)


def test_handlers_and_standard_output_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM), sys.stdout
    cli.main(["--version"])
    assert (signal.getsignal(signal.SIGTERM), sys.stdout) == before


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m btp_export doctor --json | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.stdout, done.stderr) == ("{", "")
    # Nobody reads at all: the pipe is closed before anything is written.
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stdout:
        child = subprocess.run(
            [sys.executable, "-m", "btp_export", "doctor"], stdout=stdout, stderr=subprocess.PIPE, cwd=ROOT, check=False
        )
    assert (child.returncode, child.stderr) == (cli.PIPE_CLOSED, b"")


def test_doctor_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] and document["demo_model"] and document["cores"] >= 1
    assert "CPUExecutionProvider" in document["onnxruntime_providers"]
