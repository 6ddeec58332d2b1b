"""Asks a GPU everything that was prepared for it. docs/gpu-check.md has the whole of it.

    python -m benchmarks.gpu_check                    all of it on this machine: prepare, both calls, record
    python -m benchmarks.gpu_check prepare            here, before: build/gpu-check, which is carried to the machine
    python -m benchmarks.gpu_check run A --out DIR    on the machine: one of the two calls
    python -m benchmarks.gpu_check record DIR ...     here, afterwards: benchmarks/results/<gpu>.json and a table

Exit codes: 0 every step done; 1 a step failed or ran out of time; 3 something is missing, the GPU first of all.
"""

import argparse
import os
import sys
from pathlib import Path

from benchmarks.gpu_check import results, runner, steps
from graphs.records.errors import BtpError


def main() -> int:
    given = _arguments()
    try:
        if given.what == "prepare":
            return prepared(given)
        if given.what == "run":
            return run(given.call, given.folder, given.out)
        if given.what == "record":
            return record(given.results)
        return everything(given)
    except BtpError as error:
        print(*error.lines(), sep="\n", file=sys.stderr)
        return error.exit_code


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = Path(os.environ.get("OUT") or steps.FOLDER / "results")
    parser.set_defaults(architecture=None, before=None, folder=steps.FOLDER, out=out)
    parts = parser.add_subparsers(dest="what")
    command = parts.add_parser("prepare", help="compile, and work out what is expected")
    command.add_argument("--architecture", help="such as 90; this machine's GPU, or 90, if left out")
    command.add_argument("--before", help="git revision whose kernels are timed beside these; none for no such")
    command = parts.add_parser("run", help="run a call")
    command.add_argument("call", choices=sorted(steps.calls(steps.FOLDER)))
    command.add_argument(
        "--out", type=Path, default=out, help="folder of the results; $OUT, or a folder of what was prepared"
    )
    command = parts.add_parser("record", help="make a result file of what came back")
    command.add_argument("results", type=Path, nargs="+")
    for name, part in parts.choices.items():
        if name != "record":
            part.add_argument("--folder", type=Path, default=steps.FOLDER, help="what was prepared")
    return parser.parse_args()


def prepared(given: argparse.Namespace) -> int:
    """Fill the folder. Only this needs packages: `run` begins with Python alone, and says what a step lacks."""
    from benchmarks.gpu_check import prepare

    return prepare.main(given.architecture, given.before, given.folder)


def run(call: str, folder: Path, out: Path) -> int:
    """One call; its exit code says what the worst step came to."""
    records = runner.run_call(steps.calls(folder / "native")[call], folder.resolve(), out)
    states = {record["status"] for record in records}
    return 1 if states & {"failed", "timeout", "skipped"} else 3 if "missing" in states else 0


def record(folders: list[Path]) -> int:
    """Write the file, print the table."""
    path, text = results.record(folders)
    print(text)
    print(f"written: {path}", file=sys.stderr)
    return 0


def everything(given: argparse.Namespace) -> int:
    """On a GPU machine that has the project, nvcc and git."""
    prepared(given)
    codes = [run(call, given.folder, given.out) for call in ("A", "B")]
    if not runner.gpu_problems():
        record([given.out])
    return 1 if 1 in codes else max(codes)


if __name__ == "__main__":
    sys.exit(main())
