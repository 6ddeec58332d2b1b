"""Engines built by TensorRT for RTX in a process of its own, for a GPU that need not be there."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from onnx import ModelProto

from engines.tensorrt import installed
from tests.engines.native import builds

needed = pytest.mark.skipif(
    not installed.is_installed("rtx"), reason=f"TensorRT for RTX is not installed: {installed.INSTALL['rtx']}"
)


def run(*command: str | Path) -> "subprocess.CompletedProcess[str]":
    """A Python program with this project on its path; it must end well."""
    environment = {**os.environ, "PYTHONPATH": str(builds.ROOT)}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, check=False, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def build(models: Mapping[str, ModelProto], folder: Path, plugins: str = "none") -> dict[str, Any]:
    """Name -> what rtx_build.py found for that model. Its process takes as long to start as an engine to build."""
    files = {name: folder / f"{number}.onnx" for number, name in enumerate(models)}
    for name, file in files.items():
        file.write_bytes(models[name].SerializeToString())
    done = run(builds.TESTS / "rtx_build.py", plugins, *files.values())
    document = json.loads(done.stdout.splitlines()[-1])
    return {name: document[str(file)] for name, file in files.items()}
