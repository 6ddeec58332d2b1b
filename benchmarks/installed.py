"""What the light installation takes on a Jetson, and a real environment that has nothing else.

    python -m benchmarks.installed sizes [--write]    resolves wheels for aarch64 and Python 3.10, adds up their files
    python -m benchmarks.installed run BUNDLE         makes a new environment, and runs the light commands in it

Both need a package index. `sizes` counts the files in the wheels and those of this project, in units of 10^6 bytes; the
bytecode that pip writes beside them comes on top. `--write` puts the table into benchmarks/results/installed.md.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.pages import put_between_marks

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results" / "installed.md"
LIMIT: Final = 120.0  # MB, of the smallest installation
PLATFORM: Final = [
    "--platform", "manylinux_2_28_aarch64", "--platform", "manylinux_2_17_aarch64",
    "--platform", "manylinux2014_aarch64", "--python-version", "3.10", "--implementation", "cp",
    "--only-binary=:all:",
]  # fmt: skip
PACKAGES: Final = ("btp_export", "calibrate", "engines", "graphs")
KINDS: Final = {
    "btp-export[small]": ("small",),
    "btp-export": (),
    "btp-export[small,device]": ("small", "device"),
    "btp-export[small,cpu]": ("small", "cpu"),
}
MB: Final = 1e6


def requirements(extras: Sequence[str]) -> list[str]:
    """What pyproject.toml asks for."""
    from pip._vendor import tomli  # Python 3.10 has no tomllib

    project: dict[str, Any] = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    return [*project["dependencies"], *(line for extra in extras for line in optional[extra])]


def wheel_sizes(wanted: Sequence[str], folder: Path) -> dict[str, float]:
    """MB that each wheel unpacks to, by its name; the wheels that pip takes for the platform are downloaded."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder), *PLATFORM, *wanted]
    subprocess.run(command, check=True)
    return {
        "-".join(wheel.name.split("-")[:2]): sum(entry.file_size for entry in zipfile.ZipFile(wheel).infolist()) / MB
        for wheel in sorted(folder.glob("*.whl"))
    }


def own_size() -> float:
    """MB of this project's packages, without bytecode."""
    files = [path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()]
    return (
        sum(path.stat().st_size for path in files if "__pycache__" not in path.parts and "build" not in path.parts) / MB
    )


def sizes(*, write: bool) -> int:
    """Print the table; 1 if the smallest installation is over the limit."""
    lines = ["| installation | wheels, MB | with the project, MB | largest |", "|---|---|---|---|"]
    totals = []
    for name, extras in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            wheels = wheel_sizes(requirements(extras), Path(folder))
        largest = sorted(wheels.items(), key=lambda entry: -entry[1])[:6]
        totals.append(sum(wheels.values()) + own_size())
        words = ", ".join(f"{wheel} {size:.1f}" for wheel, size in largest)
        lines.append(f"| `{name}` | {sum(wheels.values()):.1f} | {totals[-1]:.1f} | {words} |")
    table = "\n".join(lines)
    print(table)
    if write:
        put_between_marks(RESULTS, table)
    return int(totals[0] > LIMIT)


def run(bundle: Path) -> int:
    """Install the project into a new environment, and ONNX Runtime after the commands that work without."""
    picture, prompt = str(ROOT / "docs" / "images" / "scene.png"), "what colour is the star?"
    root = str(bundle.resolve())
    ask = ["run", root, "--image", picture, "--prompt", prompt]
    light = [["doctor"], ["plan", root], ["verify", root, "--files"], ["verify", root], ask]
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, str(ROOT)], check=True)
        for words in light:
            _timed(python, words)
        subprocess.run([*install, "onnxruntime"], check=True)
        return min(_timed(python, ask) for _ in range(3))


def _timed(python: Path, words: list[str]) -> int:
    """Run a command where this checkout is not found, so that the installed package is what runs."""
    command = [str(python), "-m", "btp_export", *words]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=python.parents[1])
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    last = (done.stdout + done.stderr).strip().splitlines()[-1:]
    print(
        f"{' '.join(words)}\n  exit {done.returncode} after {seconds:.2f} s ({cpu:.2f} s of a core): {' '.join(last)}"
    )
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("sizes").add_argument("--write", action="store_true")
    commands.add_parser("run").add_argument("bundle", type=Path)
    given = parser.parse_args()
    return sizes(write=given.write) if given.command == "sizes" else run(given.bundle)


if __name__ == "__main__":
    sys.exit(main())
