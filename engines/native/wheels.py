"""Wheels for x86_64 and aarch64 that carry `btp_ort` and `btp_host`, built on any Linux, and a bare environment that
tries them.

    python -m engines.native.wheels [--out dist] [--machine aarch64]...    (from a checkout, with the extra `wheels`)

zig compiles for either processor, against the C library of GLIBC; its C++ library is linked in, so the wheels run where
numpy's do. A wheel for this machine is installed into an environment that has nothing else and must select what the
reference selects; of any other machine the libraries' headers, needs and symbols are checked.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from engines.native.libraries import elf_machine
from graphs.records.errors import BtpError, CheckError, UnavailableError

ROOT: Final = Path(__file__).parents[2]
MACHINES: Final = ("x86_64", "aarch64")
GLIBC: Final = (2, 28)  # of JetPack 5 and later, RHEL 8, Debian 10; numpy's wheels ask for the same
LIBRARIES: Final = ("btp_ort", "btp_host")
SYSTEM: Final = re.compile(rb"(?:lib(?:c|m|pthread|dl|rt)|ld-linux[a-z0-9_-]*)\.so\.\d")  # what every Linux has

# In an environment with the wheel and ONNX Runtime: the libraries compute, and what they choose is what numpy says.
TRIAL: Final = """
import numpy as np, onnxruntime as ort
from onnx import TensorProto, helper
from engines.native.libraries import custom_ops
library = custom_ops()
assert library is not None and library.parent.name == "lib", library
node = helper.make_node("BtpGatherTokens", ["rows", "indices"], ["kept"], domain="btp", start=1, count=5)
shapes = {"rows": (TensorProto.FLOAT, [1, 7, 3]), "indices": (TensorProto.INT32, [1, 2])}
graph = helper.make_graph([node], "trial", [helper.make_tensor_value_info(n, *s) for n, s in shapes.items()],
                          [helper.make_tensor_value_info("kept", TensorProto.FLOAT, [1, 4, 3])])
opsets = [helper.make_opsetid("", 18), helper.make_opsetid("btp", 1)]
model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
options = ort.SessionOptions()
options.register_custom_ops_library(str(library))
session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
rows, indices = np.arange(21, dtype=np.float32).reshape(1, 7, 3), np.array([[0, 2]], np.int32)
(kept,) = session.run(None, {"rows": rows, "indices": indices})
np.testing.assert_array_equal(kept[0], rows[0, [0, 1, 3, 6]])
from btp_export.running.sampling import choose
from engines.native.host import host_library
assert host_library() is not None
logits = np.random.default_rng(0).standard_normal(32064).astype(np.float32) * 3
for top_p in (1.0, 0.9):
    ways = [dict(temperature=1.0, top_p=top_p, library=library) for library in (None, host_library())]
    tokens = [[choose(logits, np.random.default_rng(seed), **way) for seed in range(50)] for way in ways]
    assert tokens[0] == tokens[1], tokens
"""


def build_wheel(machine: str, out: Path) -> Path:
    """The wheel for a processor, in `out`.

    Raises UnavailableError without zig, CheckError where it does not build.
    """
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        raise UnavailableError("ziglang is not installed", "a compiler for both processors", "pip install '.[wheels]'")
    zig = Path(spec.origin).with_name("zig")  # as a program: pip hides this environment's packages from the build
    target = f"{machine}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"
    with tempfile.TemporaryDirectory() as scratch:
        compiler = Path(scratch) / "c++"  # CMake takes one word
        compiler.write_text(f'#!/bin/sh\nexec "{zig}" c++ -target {target} "$@"\n', "utf-8")
        compiler.chmod(0o755)
        settings = {
            "cmake.define.CMAKE_CXX_COMPILER": str(compiler),
            "cmake.define.CMAKE_SYSTEM_NAME": "Linux",
            "cmake.define.CMAKE_SYSTEM_PROCESSOR": machine,
            "install.strip": "false",  # the system's strip knows its own processor only; the linker strips
            "cmake.define.CMAKE_SHARED_LINKER_FLAGS": "-s",
            "wheel.tags": f"py3-none-manylinux_{GLIBC[0]}_{GLIBC[1]}_{machine}",
        }
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", scratch, str(ROOT)]
        command += [f"--config-settings={key}={value}" for key, value in settings.items()]
        if not _succeeds(command):
            raise CheckError(f"the wheel for {machine} does not build", do="read what pip says above")
        (wheel,) = Path(scratch).glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy2(wheel, out))


def check_libraries(wheel: Path, machine: str) -> None:
    """Raise CheckError unless the wheel's libraries are for the processor and need nothing that an old Linux lacks."""
    for name in LIBRARIES:
        inside = f"engines/native/lib/lib{name}.so"
        with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as scratch:
            if inside not in archive.namelist():
                raise CheckError(f"{wheel.name} carries no {name}", do="see what the compiler says: pip wheel -v .")
            library = Path(archive.extract(inside, scratch))
            found, content = elf_machine(library), library.read_bytes()
        if found != machine:
            raise CheckError(f"{name} of {wheel.name} is for {found}", wanted=machine)
        newer = {version for version in _glibc_versions(content) if version > GLIBC}
        if newer:
            raise CheckError(f"{name} of {wheel.name} needs glibc {max(newer)}", wanted=f"{GLIBC} at most")
        needed = set(re.findall(rb"(?:lib|ld-)[\w+-]+\.so\.\d+", content))
        others = sorted(other.decode() for other in needed if not SYSTEM.fullmatch(other))
        if others:
            raise CheckError(f"{name} of {wheel.name} needs {', '.join(others)}", wanted="the C library alone")


def _glibc_versions(content: bytes) -> set[tuple[int, ...]]:
    return {tuple(map(int, version.split(b"."))) for version in re.findall(rb"GLIBC_(\d+(?:\.\d+)+)\0", content)}


def try_wheel(wheel: Path) -> None:
    """Install the wheel with the extra `cpu` into a new environment, and let its libraries compute.

    Raises CheckError where that fails. It downloads what the extra needs.
    """
    with tempfile.TemporaryDirectory() as scratch:
        python = Path(scratch) / "bin" / "python"
        for command in (
            [sys.executable, "-m", "venv", scratch],
            [str(python), "-m", "pip", "install", "--quiet", f"{wheel.resolve()}[cpu]"],
            [str(python.with_name("btp-export")), "doctor"],
            [str(python), "-c", TRIAL],
        ):
            if not _succeeds(command, Path(scratch)):
                raise CheckError(f"{wheel.name} does not work in a bare environment", do="read what is said above")


def _succeeds(command: Sequence[str], folder: Path = ROOT) -> bool:
    """Run a command; what it says goes to standard error. It is told nothing of where this process has its modules."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(command, stdout=sys.stderr, cwd=folder, env=env, check=False).returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Build and check; exit code as of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("dist"), help="folder of the wheels (dist)")
    parser.add_argument("--machine", choices=MACHINES, action="append", help="one processor alone; may be repeated")
    options = parser.parse_args(arguments)
    try:
        for machine in options.machine or MACHINES:
            wheel = build_wheel(machine, options.out)
            check_libraries(wheel, machine)
            how = "its libraries are right for the processor; not run"
            if machine == platform.machine():
                try_wheel(wheel)
                how = "installed in a bare environment, where it computes"
            print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB, {how}")
    except BtpError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
