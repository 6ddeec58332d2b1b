"""An operator that is added as a folder is among what a GPU is asked, without a word in benchmarks/gpu_check."""

import ctypes
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.engines.native import builds
from tests.graphs.ops.test_added_operator import added

calls = pytest.importorskip("benchmarks.gpu_check.calls")
__all__ = ["added"]

KERNEL_PYTHON = """
import ctypes

INPUTS, WORKSPACE = 1, True

class Settings(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int64), ("factor", ctypes.c_int32)]

def settings(inputs, attributes):
    count = 1
    for size in inputs[0].shape:
        count *= size
    return Settings(count, attributes["factor"])

def pointers(inputs):
    return [inputs[0].address]
"""
# In the place of a kernel, for the CPU: what it gives is a little off, and the workspace is used.
LIBRARY = """
#include <cstdint>
struct Settings { int64_t count; int32_t factor; };
extern "C" uint64_t btp_scale_tokens_workspace(const Settings* s) { return 4 * s->count; }
extern "C" int32_t btp_scale_tokens(const Settings* s, const float* in, float* out, float* room, uint64_t bytes, void*)
{
    if (bytes != btp_scale_tokens_workspace(s)) { return 1; }
    for (int64_t i = 0; i < s->count; ++i) { room[i] = in[i] * s->factor; }
    for (int64_t i = 0; i < s->count; ++i) { out[i] = room[i] * (1 + 1e-6f); }
    return 0;
}
"""


@pytest.fixture
def library(added: Path, tmp_path: Path) -> Path:
    (added / "kernel_python.py").write_text(KERNEL_PYTHON)
    with (added / "__init__.py").open("a") as stream:
        stream.write('TOLERANCE = {"float32": 1e-5}\n')
    (tmp_path / "scale.cpp").write_text(LIBRARY)
    path = tmp_path / "libscale.so"
    builds.run([builds.compiler(), *builds.STRICT, "-shared", tmp_path / "scale.cpp", "-o", path])
    return path


def test_its_cases_are_calls_with_its_own_tolerance(library: Path, tmp_path: Path) -> None:
    from benchmarks.gpu_check.on_ort import difference

    result = [given for given in calls.all_cases() if given.operator == "scale_tokens"]
    assert [given.name for given in result] == ["1", "-3"] and result[0].tags == ("case", "small")
    assert calls.write_cases(tmp_path, result) == 2
    read = list(calls.read_calls(tmp_path, "small"))
    assert [call.op for call in read] == ["BtpScaleTokens"] * 2
    opened = ctypes.CDLL(str(library))
    for call in read:
        assert call.c.arguments == ["parameters", "in 0", "out", "workspace", "size", "stream"]
        status, got = calls.launch(opened, call)
        assert status == 0 and not np.array_equal(got, call.wanted)
        assert difference(got, call) == "" and difference(got, replace(call, tolerance=1e-8)) != ""
    harness(library, tmp_path)


def harness(library: Path, folder: Path) -> None:
    """The native program reads the same, where nvcc can make it."""
    from tests.benchmarks.test_gpu_check import built_harness

    program = built_harness()
    if program is not None:
        options = ["--kernels", library, "--cases", folder / "cases.bin"]
        done = subprocess.run([program, "ready", *options], capture_output=True, text=True, check=False)
        assert '"calls": 2, "largest_workspace": 48' in done.stdout
