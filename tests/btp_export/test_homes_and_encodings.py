"""Users without a home, and text and paths in every encoding: what comes out, and what is refused."""

import contextlib
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from btp_export import cli
from graphs.files.bundle import Bundle
from tests.btp_export.test_surroundings import COMMAND, shell
from tests.conftest import BundleMaker

NOBODY = "setpriv --reuid=54321 --regid=54321 --clear-groups"
CAN_BE_NOBODY = os.geteuid() == 0 and shutil.which("setpriv") is not None


# Calibrates, exports and runs, and asks for models that lie in a home; the answers, one list of all, on the last line.
ELSEWHERE = """
import contextlib, io, json, sys
from btp_export.cli import main

def say(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    return code, out.getvalue(), err.getvalue()

for arguments in (
    ["calibrate", "--model", "model", "--samples", "2", "--out", "plan.json", "--json"],
    ["export", "--model", "model", "--plan", "plan.json", "--out", "bundle", *sys.argv[1:]],
):
    if main(arguments):
        sys.exit(f"{arguments} failed")
answers = [say("run", "bundle", "--image", "picture.png", "--prompt", "what color ?")]
for model in ("~/model", "llava-1.5-7b"):
    answers.append(say("export", "--model", model, "--plan", "none", "--out", "another"))
print(json.dumps(answers))
"""
SHAPES = ["--text-tokens", "16", "--max-new-tokens", "12"]


class Run(NamedTuple):
    """What the process in another place left."""

    folder: Path
    answers: list[tuple[int, str, str]]
    said: bytes


@pytest.fixture(scope="module")
def elsewhere(tiny_checkpoint: Path) -> Iterator[Run]:
    """In another interpreter, with other hashes, and where that can be as a user who has no home and no name."""
    with public() as folder:
        temporary = folder / "tmp"
        temporary.mkdir(mode=0o777)
        temporary.chmod(0o777)
        Image.new("RGB", (96, 96), "red").save(folder / "picture.png")
        shutil.copytree(tiny_checkpoint, folder / "model")
        for path in (folder / "model").iterdir():
            path.chmod(0o644)
        (folder / "model").chmod(0o755)
        environment = f"env -u HOME -u USER -u LOGNAME -u XDG_CACHE_HOME TMPDIR={temporary} PYTHONHASHSEED=7"
        command = [sys.executable, "-c", ELSEWHERE, *SHAPES]
        done = shell(f"cd {folder} && {environment} {NOBODY if CAN_BE_NOBODY else ''} {shlex.join(command)}")
        assert done.returncode == 0, done.stderr
        yield Run(folder, json.loads(done.stdout.splitlines()[-1]), done.stderr)


@pytest.mark.skipif(not CAN_BE_NOBODY, reason="becoming a user of no name takes root and setpriv")
def test_user_of_no_name(elsewhere: Run) -> None:
    """Neither HOME nor an entry of the user: everything that needs no home works, and nothing is written in the place
    where the command runs.
    """
    answer, *refusals = elsewhere.answers
    assert answer[0] == 0 and answer[1].strip()
    assert b"[W:" not in elsewhere.said and b"elemetry" not in elsewhere.said
    assert {path.name for path in elsewhere.folder.iterdir()} == {"model", "plan.json", "bundle", "picture.png", "tmp"}
    assert (elsewhere.folder / "tmp" / "btp-export-54321").stat().st_mode & 0o777 == 0o700
    for (code, _, err), said in zip(refusals, ("~/model: no such home folder", "there is no home folder"), strict=True):
        assert code in (2, 3) and said in err, err


def test_two_exports_give_the_same_bytes(elsewhere: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """In two processes and from two places: no order of a set, address, time or path may show."""
    plan, one, two = str(elsewhere.folder / "plan.json"), tmp_path / "one", elsewhere.folder / "bundle"
    assert cli.main(["export", "--model", str(tiny_checkpoint), "--plan", plan, "--out", str(one), *SHAPES]) == 0
    assert contents(one) == contents(two)
    for place in (elsewhere.folder, tmp_path):
        assert not any(str(place).encode() in data for data in contents(two).values())


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@contextlib.contextmanager
def public() -> Iterator[Path]:
    """A folder that every user may read and write: pytest's own are private."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder


RUN_TWICE = """
import sys
from btp_export.cli import main
status = main([*sys.argv[1:], "--json"]) or main(sys.argv[1:])
sys.exit(status)
"""


@pytest.mark.parametrize("surroundings", ["PYTHONIOENCODING=ascii", "PYTHONIOENCODING=latin-1", "LC_ALL=C"])
def test_answers_come_out_whatever_the_encoding(
    tiny_bundle: BundleMaker,
    pictures: list[Image.Image],
    tmp_path: Path,
    surroundings: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same answer as everywhere, also with folders, pictures and prompts outside ASCII: a document, then a stream.

    The answer that is wanted is computed here, in UTF-8.
    """
    place = tmp_path / "dör 漢"
    bundle = copy_of(tiny_bundle(), place / "bündle")
    pictures[0].save(place / "bild.png")
    arguments = ["run", str(bundle), "--image", f"{place}/bild.png", "--prompt", "wie groß ? 漢"]
    assert cli.main([*arguments, "--json"]) == 0
    wanted = json.loads(capsys.readouterr().out)
    done = shell(f"{sys.executable} -c {shlex.quote(RUN_TWICE)} {shlex.join(arguments)}", **variable(surroundings))
    assert done.returncode == 0, done.stderr
    document, end = json.JSONDecoder().raw_decode(done.stdout.decode("ascii", "replace"))
    assert document["token_ids"] == wanted["token_ids"]
    assert done.stdout[end:].strip(), "the stream"


def variable(text: str) -> dict[str, str]:
    name, value = text.split("=")
    return {name: value}


def test_an_answer_outside_the_encoding_is_escaped() -> None:
    """As text that comes in pieces."""
    script = (
        "import sys\n"
        "from btp_export.console import stdout_for_results, stream\n"
        "with stdout_for_results():\n"
        "    stream('gr\u00f6\u00dfe ')\n"
        "    stream('\u6f22\u5b57\\n')\n"
    )
    for encoding, wanted in (
        ("ascii", b"gr\\xf6\\xdfe \\u6f22\\u5b57\n"),
        ("latin-1", b"gr\xf6\xdfe \\u6f22\\u5b57\n"),
    ):
        done = shell(f"{sys.executable} -c {shlex.quote(script)}", PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stdout, done.stderr) == (0, wanted, b"")


def test_text_and_paths_that_are_not_utf_8(
    tiny_bundle: BundleMaker, pictures: list[Image.Image], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused in words, in every way that they come in: here, and the first as another interpreter reads it."""
    bundle, odd = tiny_bundle(), os.fsdecode(b"caf\xe9")
    pictures[0].save(tmp_path / "picture.png")
    (tmp_path / "data.jsonl").write_text('{"image": "picture.png", "prompt": "\\ud800 ?", "answer": "red"}\n')
    copy_of(bundle, tmp_path / odd)
    run = ["run", str(bundle.root), "--image", str(tmp_path / "picture.png")]
    for arguments, said in (
        ([*run, "--prompt", odd], r"the prompt 'caf\udce9' is not UTF-8"),
        ([*run, "--prompt", f"<image> {odd}", "--raw-prompt"], r"the prompt '<image> caf\udce9' is not UTF-8"),
        ([*run, "--prompt", "?", "--system", odd], r"the system message 'caf\udce9' is not UTF-8"),
        (
            ["eval", str(bundle.root), "--data", str(tmp_path / "data.jsonl")],
            r"data.jsonl line 1: not a JSON object: half a character in the text '\ud800 ?'",
        ),
        (["verify", str(tmp_path / odd)], r"caf\xe9 is not UTF-8"),
        (["export", "--model", str(tmp_path / odd), "--plan", "none"], r"caf\xe9 is not UTF-8"),
        (
            ["export", "--model", "demo", "--plan", "none", "--out", str(tmp_path / odd / "new")],
            r"caf\xe9/new is not UTF-8",
        ),
    ):
        code = cli.main(arguments)
        lines = capsys.readouterr().err.splitlines()
        assert code == 2 and len(lines) == 3 and said in lines[0], lines
        assert lines[2].startswith("  do this: ") and "LC_ALL" not in lines[2]
    done = shell(f"{COMMAND} {shlex.join([*run, '--prompt', odd])}")
    assert done.returncode == 2 and rb"the prompt 'caf\udce9' is not UTF-8" in done.stderr.splitlines()[0]
    other = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = shell(f"{COMMAND} verify {tmp_path}/größe", **other)
    assert done.returncode == 2 and b"do this: export LC_ALL=C.UTF-8 PYTHONUTF8=1" in done.stderr


def copy_of(bundle: Bundle, place: Path) -> Path:
    shutil.copytree(bundle.root, place)
    return place


def test_home_in_every_path(
    tmp_path: Path,
    pictures: list[Image.Image],
    tiny_bundle: BundleMaker,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A shell leaves the ~ of `--model=~/folder` to the program."""
    copy_of(tiny_bundle(), tmp_path / "bundle")
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    pictures[0].save(tmp_path / "picture.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for arguments in (
        "run ~/bundle --image=~/picture.png --prompt=? --show=~/shown.png",
        "plan --json ~/bundle",
        "plan none --model=~/model --out=~/plan.json",
        "export --model=~/model --plan=~/plan.json --out=~/new",
    ):
        assert cli.main(arguments.split()) == 0
    assert {"shown.png", "plan.json", "new"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "~").exists()
