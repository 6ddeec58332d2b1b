"""A Jetson made of stand-ins: trtexec on PATH, TensorRT's module also for child processes, CUDA in host memory."""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from btp_export.cli import main
from engines.tensorrt import installed
from engines.tensorrt.build import adopt, builder
from engines.tensorrt.installed import Library
from engines.tensorrt.records import EnginesRecord
from graphs.files.bundle import Bundle
from tests.engines.runners.host_cuda import HostCuda
from tests.engines.tensorrt import trtexec_files
from tests.engines.tensorrt.run import host_tensorrt
from tests.engines.tensorrt.run.engine_folders import CAPABILITY, TARGET, VERSION, machine_with_gpu, new_process

BUILD = ("--target", TARGET, "--plugins", "none")


def prepare(bundle: Bundle, root: Path, *more: str) -> Path:
    """A copy of the bundle with the kit that a machine without TensorRT writes."""
    shutil.copytree(bundle.root, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(installed, "is_installed", lambda flavour: False)
        patch.setattr("btp_export.engine_inputs.record_calibration", None)
        assert main(["build", str(root), *BUILD, *more]) == 0
    return root


class Device:
    """The Jetson: a copy of the bundle, trtexec on PATH, the module `tensorrt` for this process and its children."""

    def __init__(self, prepared: Path, folder: Path, patch: pytest.MonkeyPatch, capture: Any) -> None:
        self.root, self.capture = folder / "copy", capture
        shutil.copytree(prepared, self.root)
        self.engines = self.root / "engines" / TARGET
        self.tool = tool = folder / "bin"
        engine = {"version": VERSION, "capability": CAPABILITY, "capturable": True}
        self.settings: dict[str, Any] = {"root": str(self.engines), "engine": engine}
        trtexec_files.put_program(tool, **self.settings)
        patch.setenv("PATH", f"{tool}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(Path(trtexec_files.__file__).parent / "standin"))
        patch.setattr("platform.machine", lambda: "aarch64")
        patch.setattr(installed, "is_installed", lambda flavour: flavour == "tensorrt")
        patch.setattr(installed, "gpu_capability", lambda: CAPABILITY)
        patch.setattr("btp_export.engine_inputs.record_calibration", None)
        machine_with_gpu(patch)
        new_process(patch)

    def script(self, name: str, *graphs: str) -> str:
        """What build.sh or profile.sh prints."""
        done = subprocess.run([self.engines / name, *graphs], capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def build_sh(self, *graphs: str) -> str:
        return self.script("build.sh", *graphs)

    def plan_times(self, times: Mapping[str, float]) -> None:
        """How long trtexec says that engines take, milliseconds by their path in the folder of engines."""
        trtexec_files.put_program(self.tool, **self.settings, times=dict(times))

    def build(self, *more: str, code: int = 0) -> Any:
        assert main(["build", str(self.root), *BUILD, "--json", *more]) == code
        return json.loads(self.capture.readouterr().out)

    def check_here(self, patch: pytest.MonkeyPatch) -> None:
        """Engines of build.sh are checked in this process: a child for each takes seconds."""
        module = host_tensorrt.module(HostCuda(), VERSION)
        patch.setattr(builder, "load", lambda flavour: Library(flavour, VERSION, module))
        patch.setattr(adopt, "build_in_child", lambda job, scratch, log, report: builder.check_engine(job))

    def record(self) -> EnginesRecord:
        return EnginesRecord.load(self.engines)
