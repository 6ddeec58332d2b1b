"""The outputs under the commands in README.md, and its picture of kept tokens: both from running the commands.

    make readme                                   # or: python -m benchmarks.readme

Runs every command of the README's console blocks, in order, in a new folder that holds docs/images/, and writes what it
printed under it. Progress is left out: on a terminal it is a line that disappears. tests/test_docs.py runs the same
commands and does not compare outputs, because times differ.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
IMAGES = Path("docs") / "images"
KEPT = IMAGES / "kept.png"  # drawn by one of the commands
BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROGRESS = re.compile(r"^[\w ]+: \d+ of \d+")


def printed(command: str, folder: Path) -> str:
    """What a user sees of `command` once it is done, standard error included. Raises RuntimeError if it fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cache = {"XDG_CACHE_HOME": str(folder / ".cache")}  # a new user's: nothing is measured yet
    environment = os.environ | cache | {"PATH": path, "COLUMNS": "100", "NO_COLOR": "1"}
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout}")
    lines = [line.rstrip() for line in done.stdout.splitlines() if not PROGRESS.match(line)]
    return "\n".join(line for line in lines if line)


def with_outputs(block: str, folder: Path) -> str:
    """The text of a console block with every command followed by its output."""
    commands = [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]
    return "".join(f"$ {command}\n{printed(command, folder)}\n" for command in commands)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / IMAGES, folder / IMAGES)
        text = BLOCK.sub(lambda match: f"```console\n{with_outputs(match[1], folder)}```", README.read_text("utf-8"))
        README.write_text(text, encoding="utf-8")
        shutil.copyfile(folder / KEPT, ROOT / KEPT)


if __name__ == "__main__":
    main()
