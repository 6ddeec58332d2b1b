"""A stand-in for trtexec, and running the kit's scripts with it."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

# It says its version, notes its arguments, checks the files it is to read, writes those it is to.
FAKE = """#!/usr/bin/env bash
echo "&&&& RUNNING TensorRT.trtexec [TensorRT v{digits}] # $*"
[ "$1" != --help ] || exit 0
printf '%s\\n' "$@" >> "{log}"
echo -- >> "{log}"
[ -z "${{FAIL:-}}" ] || {{ echo "something went wrong"; exit 1; }}
for argument in "$@"; do
    case "$argument" in
        --onnx=* | --loadEngine=*) [ -s "${{argument#*=}}" ] || {{ echo "cannot read $argument"; exit 1; }} ;;
        --saveEngine=* | --export*=*) [ -n "${{NO_FILE:-}}" ] || echo made > "${{argument#*=}}" ;;
    esac
done
"""


def fake_tool(folder: Path, digits: str = "100300", name: str = "trtexec") -> dict[str, str]:
    """An environment whose trtexec is the stand-in; its log is `folder`/log."""
    folder.mkdir(exist_ok=True)
    tool = folder / name
    tool.write_text(FAKE.format(digits=digits, log=folder / "log"))
    tool.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def calls(folder: Path) -> list[list[str]]:
    """The arguments of each call of the stand-in."""
    return [call.splitlines() for call in (folder / "log").read_text().split("\n--\n") if call]


def run(script: Path, environment: Mapping[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [script, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
