"""Users without a home, and text and paths in every encoding: what comes out, and what is refused."""

import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from graphs.files.bundle import Bundle
from tests.btp_export.test_surroundings import COMMAND, shell
from tests.conftest import BundleMaker

NOBODY = "setpriv --reuid=54321 --regid=54321 --clear-groups"
no_setpriv = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="becoming a user of no name takes root and setpriv"
)


@no_setpriv
def test_user_of_no_name(public: Path) -> None:
    """Neither HOME nor an entry of the user: everything that needs no home works, and nothing is written in the place
    where the command runs.
    """
    temporary = public / "tmp"
    temporary.mkdir(mode=0o777)
    temporary.chmod(0o777)
    command = f"cd {public} && env -u HOME -u USER -u LOGNAME -u XDG_CACHE_HOME TMPDIR={temporary} {NOBODY} {COMMAND}"
    done = shell(f"{command} calibrate --model demo --samples 2 --out plan.json --json")
    assert done.returncode == 0, done.stderr
    done = shell(f"{command} export --model demo --plan plan.json --out bundle")
    assert done.returncode == 0, done.stderr
    Image.new("RGB", (96, 96), "red").save(public / "picture.png")
    done = shell(f"{command} run bundle --image picture.png --prompt 'what color ?'")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert b"[W:" not in done.stderr and b"elemetry" not in done.stderr
    assert {path.name for path in public.iterdir()} == {"plan.json", "bundle", "picture.png", "tmp"}
    assert (temporary / "btp-export-54321").stat().st_mode & 0o777 == 0o700
    for model, said in (("~/model", "~/model: no such home folder"), ("llava-1.5-7b", "there is no home folder")):
        done = shell(f"{command} export --model {shlex.quote(model)} --plan none --out another")
        assert done.returncode in (2, 3) and said in done.stderr.decode(), done.stderr


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may read and write: pytest's own are private."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder


@pytest.mark.parametrize("surroundings", ["PYTHONIOENCODING=ascii", "PYTHONIOENCODING=latin-1", "LC_ALL=C"])
def test_answers_come_out_whatever_the_encoding(
    tiny_bundle: BundleMaker, pictures: list[Image.Image], tmp_path: Path, surroundings: str
) -> None:
    """The same answer as everywhere, also with folders, pictures and prompts outside ASCII."""
    place = tmp_path / "dör 漢"
    bundle = copy_of(tiny_bundle(), place / "bündle")
    pictures[0].save(place / "bild.png")
    command = f"{COMMAND} run {shlex.quote(str(bundle))} --image '{place}/bild.png' --prompt 'wie groß ? 漢'"
    wanted, got = (shell(f"{command} --json", **variable(pair)) for pair in ("LC_ALL=C.UTF-8", surroundings))
    assert (wanted.returncode, got.returncode) == (0, 0), got.stderr
    assert json.loads(got.stdout)["token_ids"] == json.loads(wanted.stdout)["token_ids"]
    streamed = shell(command, **variable(surroundings))
    assert streamed.returncode == 0 and streamed.stdout.strip()


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
    tiny_bundle: BundleMaker, pictures: list[Image.Image], tmp_path: Path
) -> None:
    """Refused in words, in every way that they come in."""
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
        done = shell(f"{COMMAND} {shlex.join(arguments)}")
        lines = done.stderr.decode().splitlines()
        assert done.returncode == 2 and len(lines) == 3 and said in lines[0], done.stderr
        assert lines[2].startswith("  do this: ") and "LC_ALL" not in lines[2]
    other = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = shell(f"{COMMAND} verify {tmp_path}/größe", **other)
    assert done.returncode == 2 and b"do this: export LC_ALL=C.UTF-8 PYTHONUTF8=1" in done.stderr


def copy_of(bundle: Bundle, place: Path) -> Path:
    shutil.copytree(bundle.root, place)
    return place


def test_home_in_every_path(
    tmp_path: Path, pictures: list[Image.Image], tiny_bundle: BundleMaker, tiny_checkpoint: Path
) -> None:
    """A shell leaves the ~ of `--model=~/folder` to the program."""
    copy_of(tiny_bundle(), tmp_path / "bundle")
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    pictures[0].save(tmp_path / "picture.png")
    for arguments in (
        "run '~/bundle' --image=~/picture.png --prompt=? --show=~/shown.png",
        "plan --json '~/bundle'",
        "plan none --model=~/model --out=~/plan.json",
        "export --model=~/model --plan=~/plan.json --out=~/new",
    ):
        done = shell(f"cd {tmp_path} && {COMMAND} {arguments}", HOME=str(tmp_path))
        assert done.returncode == 0, done.stderr
    assert {"shown.png", "plan.json", "new"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "~").exists()
