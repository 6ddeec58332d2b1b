"""The native sources compile for every target, and the build leaves out what it lacks the means for, saying why."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.engines.jetson_files import write
from tests.engines.native import builds

HEADERS = "usr/include/aarch64-linux-gnu"  # of JetPack


@pytest.mark.parametrize("operator", [path.parent.name for path in builds.of_operators("kernel.cu")])
def test_kernels_compile_for_all_architectures(operator: str) -> None:
    """Machine code for each kind of GPU the project names, warnings and spilled registers as errors. None is run here.

    Of the 8 series, whose machine codes differ in their schedules, the first and Orin's. No source asks which
    architecture it is compiled for, so two intermediate codes do, of the oldest and the newest: making one takes as
    long as three machine codes.
    """
    nvcc = builds.nvcc()
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    wanted = [number for number in builds.ARCHITECTURES if f"sm_{number}" in known and number not in ("86", "89")]
    assert {"80", "87", "90"} <= set(wanted), f"this nvcc knows {known}"
    families = {wanted[0]: wanted[:-1], wanted[-1]: wanted[-1:]}
    codes = [
        f"-gencode=arch=compute_{family},code=[{','.join(f'sm_{number}' for number in numbers)}]"
        for family, numbers in families.items()
    ]
    flags = ["-std=c++17", "-O3", "-fmad=false", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra"]
    flags += ["-Xptxas=-warn-spills", "-fatbin", "-t2"]
    source = builds.OPS / operator / "kernel.cu"
    assert builds.compiled(f"{operator}.fatbin", [nvcc, *flags, *codes], [source]).stat().st_size > 10_000


def configure(folder: Path, *options: str) -> str:
    """Configure with these options alone, whatever headers this environment names."""
    command = ["cmake", "-S", str(builds.NATIVE), "-B", str(folder), *options]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_INCLUDE_DIR")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    except FileNotFoundError:
        pytest.skip("cmake is not installed")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_cmake_without_cuda_leaves_out_what_needs_it(tmp_path: Path) -> None:
    builds.compiler()
    said = configure(tmp_path, "-DBTP_CUDA=OFF", "-DTENSORRT_INCLUDE_DIR=", "-DONNXRUNTIME_INCLUDE_DIR=")
    for target in ("btp_kernels", "btp_trt_dynamic", "btp_trt"):
        assert f"btp: {target} is left out: " in said
    assert "btp: btp_ort will be built" in said and "btp: btp_host will be built" in said
    assert "btp: btp_ort has CPU kernels only: BTP_CUDA is OFF" in said


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder where CMake has tried both compilers, with nothing named but nvcc; and what it said.

    Configured there again, it does not try them once more.
    """
    folder = tmp_path_factory.mktemp("configured")
    options = (f"-DCMAKE_CUDA_COMPILER={builds.nvcc()}", "-DTENSORRT_INCLUDE_DIR=", "-DONNXRUNTIME_INCLUDE_DIR=")
    return folder, configure(folder, *options)


def test_cmake_without_headers_builds_the_kernels_alone(configured: tuple[Path, str]) -> None:
    folder, said = configured
    assert "btp: btp_kernels will be built" in said
    for target in ("btp_trt_dynamic", "btp_trt"):
        assert f"btp: {target} is left out: no NvInferRuntime.h in TENSORRT_INCLUDE_DIR=''" in said
    compiled_for = (folder / "CMakeFiles" / "btp_kernel_objects.dir" / "flags.make").read_text()
    assert all(f"code=[compute_{number},sm_{number}]" in compiled_for for number in ("80", "87", "90"))


@pytest.mark.parametrize(("chip", "architecture"), [("tegra234", "87"), ("tegra264", "110")])
def test_cmake_on_a_jetson_needs_no_options(
    chip: str, architecture: str, configured: tuple[Path, str], tmp_path: Path
) -> None:
    """Its GPU is known by its device tree, and JetPack's headers by their place."""
    tree = "proc/device-tree/compatible"
    write(tmp_path, {tree: f"nvidia,p3768-0000+p3767-0000\0nvidia,{chip}\0", f"{HEADERS}/NvInferRuntime.h": ""})
    folder, _ = configured
    said = configure(folder, "-UCMAKE_CUDA_ARCHITECTURES", "-UTENSORRT_INCLUDE_DIR", f"-DBTP_ROOT={tmp_path}")
    cache = (folder / "CMakeCache.txt").read_text()
    assert f"CMAKE_CUDA_ARCHITECTURES:STRING={architecture}\n" in cache
    assert f"TENSORRT_INCLUDE_DIR:PATH={tmp_path}/{HEADERS}\n" in cache and "btp: btp_trt_dynamic will be built" in said


def test_our_onnx_runtime_declarations_match_the_real_header() -> None:
    import os

    folder = os.environ.get("ONNXRUNTIME_INCLUDE_DIR", "")
    if not folder or not (Path(folder) / "onnxruntime_c_api.h").is_file():
        pytest.skip("no onnxruntime_c_api.h: name its folder in ONNXRUNTIME_INCLUDE_DIR")
    flags = [*builds.STRICT, "-c", "-isystem", folder]
    object_file = builds.compiled("ort_abi.o", [builds.compiler(), *flags], [builds.TESTS / "ort_abi.cpp"])
    assert object_file.stat().st_size > 0, "each of its assertions is one of the compiler's"


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
__global__ void copy(const int* from, int* out, bool wait) {
    BTP_DYNAMIC_SHARED(memory);
    simt::cp_async(16 * threadIdx.x, from + 4 * threadIdx.x, threadIdx.x != 7);
    simt::cp_commit();
    if (wait) { simt::cp_wait(0); }
    memcpy(out + 4 * threadIdx.x, memory + 16 * threadIdx.x, 16);
}
// a [16,16] = row + column / 16, b [16,8] = the unit matrix above a second one: c [row,n] = a [row,n] + a [row,n+8].
__global__ void product(int* wrong) {
    const unsigned lane = threadIdx.x, row = lane / 4, place = lane % 4 * 2;
    const auto half = [](float x) { return static_cast<uint32_t>(simt::float16_of(x)); };
    const auto two = [&](unsigned r, unsigned k) { return half(r + k / 16.0f) | half(r + (k + 1) / 16.0f) << 16; };
    const uint32_t a[4] = {two(row, place), two(row + 8, place), two(row, place + 8), two(row + 8, place + 8)};
    const uint32_t unit = half(place == row) | half(place + 1 == row) << 16;
    float c[4] = {0, 0, 0, 0};
    simt::mma(c, a, unit, unit, simt::of_float16);
    for (unsigned i = 0; i < 4; ++i) {
        const float r = row + i / 2 * 8, n = place + i % 2;
        *wrong += c[i] != 2 * r + (2 * n + 8) / 16;
    }
}
int main(int count, char**) {
    int numbers[128], late[128], done[128], lost = 0, kept = 0, apart = 0;
    for (int i = 0; i < 128; ++i) { numbers[i] = i + 1; }
    const int* in = numbers; int* early = late; int* whole = done; int* differ = &apart;
    BTP_LAUNCH(copy, dim3(1), dim3(32), 512, nullptr, in, early, false);
    BTP_LAUNCH(copy, dim3(1), dim3(32), 512, nullptr, in, whole, true);
    for (int i = 0; i < 128; ++i) {
        const int copied = i / 4 == 7 ? 0 : i + 1;
        lost += late[i] != copied;
        kept += done[i] == copied;
    }
    BTP_LAUNCH(product, dim3(1), dim3(32), 0, nullptr, differ);
    if (lost == 0 || kept != 128 || apart != 0) { return 3; }
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


def test_the_emulation_shows_missing_barriers_and_waits_split_blocks_and_any_order_of_blocks(tmp_path: Path) -> None:
    source = tmp_path / "emulated.cpp"
    source.write_text(EMULATED)
    program = tmp_path / "emulated"
    builds.run([builds.compiler(), *builds.STRICT, "-O1", f"-I{builds.TESTS}", source, "-o", program])
    assert subprocess.run([program], check=False).returncode == 0
    stuck = subprocess.run([program, "split"], capture_output=True, text=True, check=False)
    assert stuck.returncode != 0 and "wait at different places" in stuck.stderr
