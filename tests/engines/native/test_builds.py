"""The native sources compile for every target, and the build leaves out what it lacks the means for, saying why."""

import subprocess
from pathlib import Path

import pytest

from tests.engines.native import builds


@pytest.mark.parametrize("operator", [path.parent.name for path in builds.of_operators("kernel.cu")])
def test_kernels_compile_for_all_architectures(operator: str) -> None:
    """Machine code for each GPU the project names, warnings and spilled registers as errors. (None is run here.)"""
    nvcc = builds.nvcc()
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    wanted = [number for number in builds.ARCHITECTURES if f"sm_{number}" in known]
    assert {"80", "87", "90"} <= set(wanted), f"this nvcc knows {known}"
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in wanted]
    flags = ["-std=c++17", "-O3", "-fmad=false", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra"]
    flags += ["-Xptxas=-warn-spills", "-fatbin", "-t2"]
    source = builds.OPS / operator / "kernel.cu"
    assert builds.compiled(f"{operator}.fatbin", [nvcc, *flags, *codes], [source]).stat().st_size > 10_000


def configure(folder: Path, *options: str) -> str:
    command = ["cmake", "-S", str(builds.NATIVE), "-B", str(folder), *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("cmake is not installed")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_cmake_without_cuda_leaves_out_what_needs_it(tmp_path: Path) -> None:
    builds.compiler()
    said = configure(tmp_path, "-DBTP_CUDA=OFF", "-DTENSORRT_INCLUDE_DIR=", "-DONNXRUNTIME_INCLUDE_DIR=")
    for target in ("btp_kernels", "btp_trt_dynamic", "btp_trt"):
        assert f"btp: {target} is left out: " in said
    assert "btp: btp_ort will be built" in said
    assert "btp: btp_ort has CPU kernels only: BTP_CUDA is OFF" in said


def test_cmake_without_headers_builds_the_kernels_alone(tmp_path: Path) -> None:
    nvcc = builds.nvcc()
    said = configure(tmp_path, f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DTENSORRT_INCLUDE_DIR=", "-DONNXRUNTIME_INCLUDE_DIR=")
    assert "btp: btp_kernels will be built" in said
    for target in ("btp_trt_dynamic", "btp_trt"):
        assert f"btp: {target} is left out: no NvInferRuntime.h in TENSORRT_INCLUDE_DIR=''" in said


def test_our_onnx_runtime_declarations_match_the_real_header() -> None:
    import os

    folder = os.environ.get("ONNXRUNTIME_INCLUDE_DIR", "")
    if not folder or not (Path(folder) / "onnxruntime_c_api.h").is_file():
        pytest.skip("no onnxruntime_c_api.h: name its folder in ONNXRUNTIME_INCLUDE_DIR")
    flags = [*builds.STRICT, "-c", "-isystem", folder]
    builds.compiled("ort_abi.o", [builds.compiler(), *flags], [builds.TESTS / "ort_abi.cpp"])


EMULATED = """
#include "simt.h"
__global__ void reverse(int* out, bool wait) {
    BTP_DYNAMIC_SHARED(memory);
    memory[threadIdx.x] = static_cast<unsigned char>(threadIdx.x);
    if (wait) { __syncthreads(); }
    out[threadIdx.x] = memory[63 - threadIdx.x];
}
__global__ void split() { if (threadIdx.x < 7) { __syncthreads(); } else { __ballot_sync(0xffffffffu, true); } }
__global__ void place(unsigned* ticket, unsigned* places) {
    if (threadIdx.x == 0) { places[blockIdx.x] = atomicAdd(ticket, 1u); }
}
int main(int count, char**) {
    unsigned next = 0, places[16], moved = 0;
    unsigned* ticket = &next; unsigned* out = places;
    BTP_LAUNCH(place, dim3(16), dim3(32), 0, nullptr, ticket, out);
    for (unsigned i = 0; i < 16; ++i) { moved += places[i] != i; }
    if (next != 16 || moved == 0) { return 2; }
    if (count > 1) { BTP_LAUNCH(split, dim3(1), dim3(64), 64, nullptr); return 0; }
    int with[64], without[64], wrong[2] = {0, 0};
    int* a = with; int* b = without;
    BTP_LAUNCH(reverse, dim3(1), dim3(64), 64, nullptr, a, true);
    BTP_LAUNCH(reverse, dim3(1), dim3(64), 64, nullptr, b, false);
    for (int i = 0; i < 64; ++i) { wrong[0] += with[i] != 63 - i; wrong[1] += without[i] != 63 - i; }
    return wrong[0] == 0 && wrong[1] > 0 ? 0 : 1;
}
"""


def test_the_emulation_shows_a_missing_barrier_a_split_block_and_any_order_of_blocks(tmp_path: Path) -> None:
    source = tmp_path / "emulated.cpp"
    source.write_text(EMULATED)
    program = tmp_path / "emulated"
    builds.run([builds.compiler(), *builds.STRICT, "-O1", f"-I{builds.TESTS}", source, "-o", program])
    assert subprocess.run([program], check=False).returncode == 0
    stuck = subprocess.run([program, "split"], capture_output=True, text=True, check=False)
    assert stuck.returncode != 0 and "wait at different places" in stuck.stderr
