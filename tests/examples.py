"""The examples of README.md and docs/, and how a test runs them as a user types them."""

import contextlib
import io
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from btp_export import cli

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def examples(page: str) -> list[tuple[str, str]]:
    """`console` or `python`, and the text, of each example of a page."""
    return BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


def commands(text: str) -> list[str]:
    """What is typed in a `console` example."""
    lines = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
    assert lines, f"no line of the block starts with a dollar sign:\n{text}"
    return lines


def run_in_shell(line: str) -> None:
    """The line as a user types it."""
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    check(line, done.returncode, done.stdout, done.stderr)


def run_here(line: str) -> None:
    """The same in this process, which has the libraries loaded already: half the time of most commands."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(shlex.split(line)[1:])
    check(line, code, out.getvalue(), err.getvalue())


def check(line: str, code: int, out: str, err: str) -> None:
    """A command of an example succeeds, and says something."""
    assert code == 0, f"{line}\n{out}{err}"
    assert "Traceback" not in err
    assert out, f"{line} printed nothing"


def run_the_first(folder: Path) -> None:
    """README.md's first command, which calibrates and exports the demo, in a new `folder` with the pictures of the
    documentation and one of the user's.
    """
    shutil.copytree(ROOT / "docs" / "images", folder / "docs" / "images")
    shutil.copyfile(ROOT / "docs" / "images" / "scene.png", folder / "scene.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_here(first_command())


def first_command() -> str:
    """It takes half a minute of processor time: everything else uses what it leaves."""
    return next(commands(text)[0] for kind, text in examples("README.md") if kind == "console")
