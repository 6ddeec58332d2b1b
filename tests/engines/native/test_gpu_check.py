"""What `make gpu-check` does before it times: run here with the emulated kernels, and its answer where no GPU is."""

import subprocess
import sys

import pytest
import torch

from engines.native.kernels import Kernels
from graphs.records.errors import CheckError, UnavailableError
from tests.engines.native import builds

gpu_verify = pytest.importorskip("benchmarks.gpu_verify")


def test_the_verification_passes_on_the_emulated_kernels() -> None:
    assert gpu_verify.verify(Kernels(builds.emulated_kernels()), "cpu", drawn=2, large=False) > 50


def test_the_verification_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernels(builds.emulated_kernels())
    right = kernels.select_tokens

    def wrong(*arguments: object, keep: int, **counts: int) -> None:
        right(*arguments, keep=keep, **counts | {"boundary": counts["boundary"] // 2})  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "select_tokens", wrong)
    with pytest.raises(CheckError, match="the kernel differs from the reference"):
        gpu_verify.verify(kernels, "cpu", drawn=0, large=False)


def test_the_operators_of_onnx_runtime_pass_their_verification() -> None:
    gpu_ort = pytest.importorskip("benchmarks.gpu_ort")
    assert gpu_ort.verify(gpu_ort.CustomOps(builds.ort_library())) > 50
    with pytest.raises(UnavailableError, match="has no NoSuchExecutionProvider"):
        gpu_ort.require_provider("NoSuchExecutionProvider")


def test_the_threads_of_the_floor_are_those_of_the_kernel() -> None:
    gpu_timing = pytest.importorskip("benchmarks.gpu_timing")
    assert [gpu_timing._threads(tokens) for tokens in (1, 144, 576, 2880, 4096, 4097, 8192)] == [
        32, 64, 160, 736, 1024, 544, 1024,
    ]  # fmt: skip


def test_steps_count_the_picks_that_wait() -> None:
    gpu_timing = pytest.importorskip("benchmarks.gpu_timing")
    cases = {case.name: case for case in gpu_timing._selections()[:6]}
    assert gpu_timing._steps(cases["released-3"]) == 0  # scores only: nothing waits
    # 129 and 15 picks, of which some are the same: the fill adds as many as are missing from 144.
    assert 15 <= gpu_timing._steps(cases["released-2"]) <= 30


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use")
def test_the_kernels_equal_the_reference_on_this_gpu() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--verify-only"]
    done = subprocess.run(command, cwd=builds.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "calls equal the reference" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the test above runs on it")
def test_without_a_gpu_it_says_so_and_exits_3() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check"]
    done = subprocess.run(command, cwd=builds.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 3 and done.stdout == ""
    assert done.stderr.startswith("no CUDA GPU can be used by torch") and len(done.stderr.splitlines()) == 3
