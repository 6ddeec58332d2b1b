"""Odd surroundings: streams that are closed, full or not UTF-8, no current folder, no home, hostile characters."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from btp_export import cli, console
from btp_export.results.base import Result
from btp_export.results.doctor import Version
from graphs.records.errors import LONGEST
from graphs.records.printable import one_line, printable

ROOT = Path(__file__).parents[2]
COMMAND = f"{sys.executable} -m btp_export"
HOSTILE = "\x1b[2J\x1b]0;owned\x07\r\x9b1m\u202egnp.\x7f"


class Place(Result):
    """A document with a path."""

    path: Path
    format: Literal["btp-place/1"] = "btp-place/1"


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(["bash", "-c", line], capture_output=True, env=variables, cwd=ROOT, check=False)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("more", ["", "--json"])
def test_standard_output_that_is_not_utf_8(encoding: str, more: str) -> None:
    done = shell(f"{COMMAND} plan --list {more}", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode(encoding)
    if more:
        assert len(json.loads(text)["presets"]) > 5


def test_json_in_ascii_is_the_same_document(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9 \xf0\x9f\x98\x80 \x1b[1m \xc2\x9b")  # not UTF-8, beyond 16 bits, control characters
    console.emit(Version(version=name), as_json=True)
    shown = capsys.readouterr().out
    assert json.loads(shown)["version"] == name and shown.isascii() and "\x1b" not in shown
    console.emit(Version(version="é \x9b \u202e \x7f"), as_json=True)
    assert '"é \\u009b \\u202e \\u007f"' in capsys.readouterr().out
    console.emit(Place(path=Path(name)), as_json=True)
    assert json.loads(capsys.readouterr().out)["path"] == name


def test_closed_standard_output_is_refused_before_the_work() -> None:
    done = shell(f"{COMMAND} doctor >&-")
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[0] == "error: standard output is closed"


def test_full_standard_output() -> None:
    done = shell(f"{COMMAND} plan --list > /dev/full")
    assert done.returncode == 2 and b"standard output: No space left" in done.stderr and b"defect" not in done.stderr


@pytest.mark.parametrize("streams", ["2>&-", "0<&- 2>&-"])
def test_closed_standard_error(streams: str) -> None:
    done = shell(f"{COMMAND} plan --list --json {streams}")
    assert done.returncode == 0 and "presets" in json.loads(done.stdout)
    assert shell(f"{COMMAND} plan nothing --model nowhere {streams}").returncode == 2


def test_no_current_folder(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    inside = f"mkdir -p {gone} && cd {gone} && rmdir {gone} &&"
    assert shell(f"{inside} {COMMAND} doctor").returncode == 0
    for arguments in ("export --model demo --plan none --out b", "export --model demo --plan none"):
        done = shell(f"{inside} {COMMAND} {arguments}")
        assert (done.returncode, b"defect" in done.stderr) == (2, False), done.stderr
        assert b"the current folder was removed" in done.stderr


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("Could not determine home directory.")
    lines, code = cli.describe(error)
    assert code == 2 and lines[0] == "there is no home folder"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(24, "Too many open files", "weights"), "too many open files"),
        (OSError(12, "Cannot allocate memory"), "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 10 bytes"), "not enough memory"),
        (RuntimeError("std::bad_alloc"), "not enough memory"),
        (FileNotFoundError(2, (none := "No usable temporary directory found in ['/tmp']")), none),
    ],
)
def test_what_the_machine_refuses_is_no_defect(error: Exception, said: str) -> None:
    lines, code = cli.describe(error)
    assert code == 3 and lines[0] == said and "defect" not in " ".join(lines)


def test_nothing_a_terminal_obeys_gets_through(capsys: pytest.CaptureFixture[str]) -> None:
    """Every way that text takes to the terminal."""
    console.note(HOSTILE)
    console.show_lines([HOSTILE, HOSTILE])
    console.stream(HOSTILE)
    console.emit(Version(version=""), as_json=False, render=lambda _: HOSTILE)
    console.emit(Version(version=""), as_json=False, render=lambda _: console.table(["a"], [[HOSTILE]], title=HOSTILE))
    with console.progress(HOSTILE) as bar:
        bar._last_line -= 100.0  # otherwise the first line comes after ten seconds
        bar(1, 2, HOSTILE)
    captured = capsys.readouterr()
    for text in (captured.out, captured.err):
        assert "owned" in text and printable(text) == text
        assert not set(text) & set("\x1b\x07\r\x9b\u202e\x7f")


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "--model", HOSTILE], ["verify", HOSTILE], ["plan", HOSTILE], [HOSTILE], ["--" + HOSTILE],
        ["export", "--model", "demo", "--keep", HOSTILE], ["export", "--model", "demo", "--shape", HOSTILE],
        ["run", "B", "--image", HOSTILE, "--prompt", HOSTILE], ["verify", "B", "--samples", HOSTILE],
        ["build", "B", "--target", HOSTILE], ["calibrate", "--model", "demo", "--image-size", HOSTILE],
    ],
)  # fmt: skip
def test_hostile_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    for more in ([], ["--debug"]):
        assert cli.main([*arguments, *more]) == 2
        text = capsys.readouterr().err
        assert text and printable(text) == text
    assert "defect" not in text


def test_long_messages_are_cut_in_the_middle(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = one_line("got " + "x" * 5000 + " at the end")
    assert len(line) <= LONGEST and line.startswith("got x") and line.endswith("x at the end") and " ... " in line
    assert cli.main(["eval", "x" * 5000, "--debug"]) == 2  # a traceback holds the name, too
    assert all(len(line) <= LONGEST + 10 for line in capsys.readouterr().err.splitlines())
    name = "/".join(["folder" * 30] * 20)
    for arguments in (["verify", name], ["export", "--model", "demo", "--batch", "9" * 5000], [name], ["--" + name]):
        assert cli.main(arguments) == 2
        text = capsys.readouterr().err
        assert 20 < len(text) < 2000 and "defect" not in text, text


NUMBERS = {
    "verify B": ("--samples", "--tokens", "--threads", "--seed"), "eval B": ("--samples", "--threads", "--seed"),
    "bench B": ("--rounds", "--threads"), "report B": ("--samples", "--seed", "--threads"),
    "build B --target h100": ("--memory",), "calibrate --model demo": ("--samples", "--seed", "--dummy-layers"),
    "export --model demo": ("--batch", "--samples", "--text-tokens", "--max-new-tokens", "--seed", "--dummy-seed"),
    "run B --image a.png --prompt b": ("--threads", "--seed", "--max-new-tokens", "--temperature", "--top-p"),
    "": ("--batch", "--samples"),
}  # fmt: skip


@pytest.mark.parametrize(("command", "flag"), [(name, flag) for name, flags in NUMBERS.items() for flag in flags])
@pytest.mark.parametrize("value", ["-1", "1e400", "nan", "9" * 5000, "100000000", "two", ""])
def test_numbers_have_bounds(capsys: pytest.CaptureFixture[str], command: str, flag: str, value: str) -> None:
    """One message that names the option, before anything is opened."""
    if flag == "--memory" and value == "":
        value = "-0"
    assert cli.main([*command.split(), flag, value]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and flag in lines[0] and len(lines) <= 3 and len(captured.err) < 2000, captured.err
    assert "defect" not in captured.err


def test_libraries_cannot_spoil_the_document(tmp_path: Path) -> None:
    """What is printed on the descriptor by C code, held back by C's own buffer or not, goes to standard error."""
    script = (
        "import ctypes, os, sys\n"
        "from btp_export import cli\n"
        "from btp_export.commands import doctor\n"
        "from btp_export.console import emit\n"
        "from btp_export.results.doctor import Version\n"
        "def command(as_json: bool = False) -> None:\n"
        "    print('from Python')\n"
        "    os.write(1, b'from a descriptor\\n')\n"
        "    ctypes.CDLL(None).puts(b'from C')\n"
        "    os.system('echo from a child')\n"
        "    emit(Version(version='1'), as_json=True)\n"
        "doctor.command = command\n"
        "sys.exit(cli.main(['doctor']))\n"
    )
    (tmp_path / "talking.py").write_text(script)
    done = shell(f"{sys.executable} {tmp_path}/talking.py")
    assert done.returncode == 0 and json.loads(done.stdout)["version"] == "1"
    said = done.stderr.decode()
    assert all(f"from {what}" in said for what in ("Python", "a descriptor", "C", "a child"))


def test_links_in_a_circle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert cli.main(["export", "--model", "demo", "--plan", "none", "--out", str(tmp_path / "loop")]) == 2
    assert "loop" in (said := capsys.readouterr().err) and "defect" not in said


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    """The system's limit for a file in place of the disk's."""
    given, written = tmp_path / "given.json", tmp_path / "written.json"
    assert shell(f"{COMMAND} plan vtw --model demo --out {given}").returncode == 0
    given.write_text(json.dumps(json.loads(given.read_text()) | {"calibration": {"notes": ["x" * 4096]}}))
    done = shell(f"ulimit -f 1; {COMMAND} plan {given} --model demo --out {written}")
    assert done.returncode == 2 and f"while writing {written}".encode() in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == [given]


def test_python_without_docstrings(tmp_path: Path) -> None:
    """Transformers' own words were taken for a broken checkpoint, and for a defect."""
    done = shell(f"{COMMAND} plan none --model demo", PYTHONOPTIMIZE="2")
    assert done.returncode == 2 and b"Python runs without docstrings" in done.stderr, done.stderr
