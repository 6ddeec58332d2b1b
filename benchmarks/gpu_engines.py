"""Engines on the GPU at hand: builds those of a bundle both ways, verifies them, then times them.

    python -m benchmarks.gpu_engines --target h100 [--bundle DIR] [--profile]

For baked and for shared weights: `btp-export build --unpruned`, `verify --target`, and only if that passed `bench
--target` and, with --profile, `profile` (which needs trtexec). Without --bundle the demo model is exported first. What
the commands print goes to benchmarks/results/engines-<target>.json. Ends with the exit code of the first command that
does not end with 0. Not yet run on a GPU.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


class Failed(Exception):
    """A command ended with another exit code than 0."""

    def __init__(self, code: int) -> None:
        self.code = code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="the device at hand, see docs/engines.md")
    parser.add_argument("--bundle", type=Path, help="a bundle; the demo model's if left out")
    parser.add_argument("--profile", action="store_true", help="also trtexec, part by part")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="btp-engines-") as folder:
        try:
            bundle = given.bundle or export_demo(Path(folder) / "bundle")
            results = {
                weights: measure(bundle, given.target, weights, given.profile) for weights in ("baked", "shared")
            }
        except Failed as error:
            return error.code
    path = RESULTS / f"engines-{given.target}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return 0


def export_demo(out: Path) -> Path:
    command("export", "--model", "demo", "--plan", "btp-paper", "--precision", "float16", "--out", str(out))
    return out


def measure(bundle: Path, target: str, weights: str, profile: bool) -> dict[str, Any]:
    """Documents of the commands by name; nothing is timed that does not verify."""
    place = str(bundle)
    build = ("build", place, "--target", target, "--engine-weights", weights, "--assemble", "segments", "--unpruned")
    steps = {"build": command(*build)}
    steps["verify"] = command("verify", place, "--target", target)
    steps["bench"] = command("bench", place, "--target", target, "--rounds", "30")
    if profile:
        steps["profile"] = command("profile", place, "--target", target)
    return steps


def command(*arguments: str) -> dict[str, Any]:
    """Run a command of btp-export; its document. What it says goes to standard error as it comes."""
    print("btp-export", *arguments, file=sys.stderr)
    done = subprocess.run(
        [sys.executable, "-m", "btp_export", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise Failed(done.returncode)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


if __name__ == "__main__":
    sys.exit(main())
