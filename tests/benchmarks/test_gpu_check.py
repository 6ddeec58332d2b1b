"""What is prepared for a GPU, run here as far as that goes: its calls on the emulated kernels, its steps on the CPU.

And both calls where no GPU is: every step says what it misses.
"""

import ctypes
import hashlib
import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines.native.kernels import Kernels
from graphs import ops
from graphs.records.errors import UnavailableError
from tests.engines.native import builds

pytest.importorskip("benchmarks.gpu_check")
from benchmarks.gpu_check import calls, compiling, drawn, linear_cases, on_ort, prepare, runner, steps
from benchmarks.gpu_ort import require_provider

CPU = "CPUExecutionProvider"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared folder without compiled files: the operators' cases, a few drawn ones, the 7B's stages."""
    folder = tmp_path_factory.mktemp("prepared")
    small = replace(next(drawn.large_cases()), tags=("replayed", "green"))
    stacked = [linear_cases.stacked("stacked", 3, 512, 64, 32), linear_cases.stacked("tiled-stacked", 32, 512, 64, 32)]
    calls.write_cases(folder, [*calls.all_cases(), small, *stacked, *drawn.drawn_cases(12)])
    (folder / "prepared.json").write_text(json.dumps({"commit": "abc", "shapes": {}, "model": prepare.model_7b()}))
    return folder


@pytest.fixture(scope="module")
def native(prepared: Path) -> Path:
    """Beside them the emulated kernels, and the native program where nvcc can make it."""
    folder = prepared / "native"
    folder.mkdir()
    shutil.copy(builds.emulated_kernels(), folder)
    shutil.copy(builds.ort_library(), folder)
    program = built_harness()
    if program is not None:
        shutil.copy(program, folder)
    return folder


def built_harness() -> Path | None:
    """The native program, None without nvcc."""
    nvcc = runner.find_nvcc()
    if nvcc is None:
        return None
    headers = b"".join(path.read_bytes() for path in sorted(compiling.NATIVE.glob("*")))
    kept = f"-DBTP_SOURCES={hashlib.sha256(headers).hexdigest()[:16]}"  # builds.compiled does not look at ours
    flags = [nvcc, "-std=c++17", "-arch=sm_90", "-Xcompiler=-Wall,-Wextra,-Werror", "-Werror=all-warnings", kept]
    return builds.compiled("harness", flags, [compiling.NATIVE / "harness.cpp", compiling.NATIVE / "device.cu"])


# -- the case file -----------------------------------------------------------------------------------------------------


def test_calls_equal_the_reference_on_the_emulated_kernels(prepared: Path) -> None:
    """Through the file, as the native program makes the calls: C structure, arguments in order, expected bytes.

    The small ones and a large one of each operator: emulation is slow, and test_native_select.py runs all.
    """
    library, seen = ctypes.CDLL(str(builds.emulated_kernels())), set[str]()
    for call in calls.read_calls(prepared):
        seen.add(call.name)
        if "small" in call.tags or call.name.endswith(("/released-1", "stacked")):
            status, got = calls.launch(library, call)
            assert status == 0, call.name
            assert on_ort.difference(got, call) == "", call.name
    assert {name.split("/")[0] for name in seen} == set(ops.names())
    assert {f"{one.operator}/{one.name}" for one in calls.all_cases()} < seen
    assert any("coverage" in name for name in seen)


def test_a_wrong_call_is_found(prepared: Path) -> None:
    library = ctypes.CDLL(str(builds.emulated_kernels()))
    call = next(call for call in calls.read_calls(prepared) if call.name == "select_tokens/released-1")
    counts = np.frombuffer(call.c.parameters, np.int32).copy()
    assert counts[2] == call.attributes["keep"] and counts[6] == call.attributes["boundary"]
    counts[6] //= 2
    wrong = replace(call, c=replace(call.c, parameters=counts.tobytes()))
    status, got = calls.launch(library, wrong)
    assert status == 0 and not np.array_equal(got, call.wanted)


def test_a_gram_matrix_is_the_product_whatever_the_order() -> None:
    features = np.random.default_rng(0).integers(-127, 128, (2, 40, 64)).astype(np.int8)
    exact = np.einsum("bic,bjc->bij", features.astype(np.int64), features.astype(np.int64)) / 2**14
    assert np.array_equal(calls.Gram(features, 14).array(), exact)
    patched = calls.Gram(features, 14, np.float16, np.array([3], np.int32), np.array([np.nan], np.float32)).array()
    assert np.isnan(patched[0, 0, 3]) and np.isnan(patched).sum() == 1 and patched.dtype == np.float16


def test_inputs_are_read_back_as_they_were(prepared: Path) -> None:
    read = {call.name: call for call in calls.read_calls(prepared)}
    for given in calls.all_cases():
        call = read[f"{given.operator}/{given.name}"]
        assert call.attributes == given.attributes and call.inputs.keys() == given.inputs.keys()
        for name, array in given.arrays().items():
            assert call.inputs[name].dtype == array.dtype and call.inputs[name].tobytes() == array.tobytes()


def test_a_stacked_product_is_the_product_of_the_whole_matrix(prepared: Path) -> None:
    """The file holds 256 rows of w; the output was made from them."""
    for name, rows in (("tiled-stacked", 32), ("stacked", 3)):
        read = next(call for call in calls.read_calls(prepared) if call.name == f"linear/{name}")
        assert read.inputs["qweight"].shape == (512, 2, 16) and read.wanted.shape == (rows, 512)
        whole = calls.Given("linear", "whole", dict(read.inputs), read.attributes)
        assert on_ort.difference(calls.expected(whole), read) == ""
    product = linear_cases.product_of(whole, read.wanted)
    weights = 512 * 64 // 2 + 512 * 2 * 2 + 512
    assert product == linear_cases.Product(weights + 3 * 64 * 2 + 3 * 512 * 2, 2 * 3 * 512 * 64)


def test_steps_count_the_picks_that_wait() -> None:
    cases = {one.name: one for one in calls.all_cases() if one.operator == drawn.SELECT}
    shapes = {name: drawn.shape_of(cases[name], calls.expected(cases[name])) for name in ("released-2", "released-3")}
    assert shapes["released-3"].steps == 0  # scores only: nothing waits
    # 129 and 15 picks, of which some are the same: the fill adds as many as are missing from 144.
    assert 15 <= shapes["released-2"].steps <= 30 and shapes["released-2"].bytes == 288 * 288 * 4


# -- the steps on the CPU ----------------------------------------------------------------------------------------------


def test_the_operators_of_onnx_runtime_pass_their_step(
    prepared: Path, native: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = on_ort.cases(str(prepared), str(native), CPU)
    assert found["cases"] == len(calls.all_cases())
    places = {what: count for what, count in found["placement"].items() if what.startswith("Btp")}
    assert sum(places.values()) == found["cases"] and all(what.endswith(f" on {CPU}") for what in places)
    ran = on_ort.threads(str(prepared), str(native), CPU, seconds=0.5)
    assert min(ran["runs"]) > 0
    with pytest.raises(UnavailableError, match="has no NoSuchExecutionProvider"):
        require_provider("NoSuchExecutionProvider")


def test_a_wrong_output_of_onnx_runtime_is_found(prepared: Path, native: Path) -> None:
    from benchmarks.gpu_ort import CustomOps

    call = next(calls.read_calls(prepared, "case"))
    ops_of = CustomOps(native / "libbtp_ort.so")
    assert on_ort.run_one(ops_of, call) == ""
    wrong = replace(call, wanted=call.wanted + 1)
    assert "bytes differ, the first at 0" in on_ort.run_one(ops_of, wrong)
    close = replace(call, wanted=call.wanted.astype(np.float32) * 1.5, tolerance=1e-5)
    assert "of its norm" in on_ort.difference(call.wanted.astype(np.float32), close)
    assert on_ort.difference(close.wanted * np.float32(1 + 1e-7), close) == ""


def test_the_layers_prune_with_the_kernels_as_the_reference_does(prepared: Path) -> None:
    """The step's own prefill with layers that are narrow, on the emulated kernels."""
    from benchmarks.gpu_check import on_torch

    sizes = json.loads((prepared / "prepared.json").read_text())["model"]
    assert [stage["attributes"]["keep"] for stage in sizes["stages"]] == [288, 144, 48, 0]
    assert 2.5 < sizes["flops_limit"] < 5 and sizes["layers"] == 32
    small = sizes | {"hidden_size": 32, "intermediate_size": 48, "heads": 4}
    torch.manual_seed(0)
    kernels = Kernels(builds.emulated_kernels())
    model = [on_torch.Layer(small, "cpu") for _ in range(sizes["layers"])]
    with torch.inference_mode():
        full = on_torch.Prefill(kernels, model, small, [])()
        prefill = on_torch.Prefill(kernels, model, small, sizes["stages"])
        pruned = prefill()
        assert on_torch.check_kept(prefill) == []
        prefill.kept[0] = prefill.kept[0].flip(1)
        assert on_torch.check_kept(prefill) == ["the kernel keeps other tokens than the reference at keep 288"]
    assert full.shape == (1, 35 + 576 + 64, 32) and pruned.shape == (1, 35 + 64, 32)
    assert bool(pruned.isfinite().all()) and [kept.shape[1] for kept in prefill.kept] == [288, 144, 48]


# -- both calls --------------------------------------------------------------------------------------------------------


def every_step() -> Iterator[tuple[steps.Call, steps.Step]]:
    for call in steps.calls(Path("native")).values():
        for step in call.steps:
            yield call, step


def test_the_time_limits_together_fit_the_call() -> None:
    """So a hang costs one step: the others have their time."""
    limits = {"A": 240, "B": 300}  # what the issue of a GPU's time allows: four and five minutes
    made = steps.calls(Path("native"))
    assert made.keys() == limits.keys()
    for name, call in made.items():
        assert all(step.seconds > 0 for step in call.steps)
        assert sum(step.seconds for step in call.steps if not step.beside) <= call.seconds < limits[name]
        seconds = {step.name: step.seconds for step in call.steps}
        for step in call.steps:
            if step.after:
                assert seconds[step.after] + step.seconds <= call.seconds, "it is waited for, and then comes this one"


def test_nothing_that_was_asked_for_is_left_out() -> None:
    names = {call.name: [s.name for c, s in every_step() if c.name == call.name] for call, _ in every_step()}
    assert set(names["A"]) == {
        "native", "facts", "verify", "time", "probe", "replay", "streams", "green", "layers", "products", "memcheck",
        "racecheck", "synccheck", "initcheck", "ncu-small", "ncu-large", "ncu-decode", "ncu-prefill",
    }  # fmt: skip
    assert set(names["B"]) == {
        "native", "ort-cases", "ort-threads", "demo-float32", "demo-float16", "7b-export", "7b-bench",
    }  # fmt: skip
    assert all(len(set(given)) == len(given) for given in names.values())
    large_ones = [*drawn.large_cases(), *linear_cases.large_cases()]
    tags = {tag for one in large_ones for tag in one.tags}
    named = {
        word
        for _, step in every_step()
        for flag, word in zip(step.command, step.command[1:], strict=False)
        if flag == "--tag"
    }
    assert named <= tags | {"small", "timed"}, "a step asks for calls that nobody tags"
    large = {f"{one.operator}/{one.name}" for one in large_ones}
    assert {step.command[-5] for _, step in every_step() if step.name.startswith("ncu")} <= large
    replayed = [one.inputs["scores"].shape[1] for one in drawn.large_cases() if "replayed" in one.tags]  # type: ignore[union-attr]
    assert {576, 2880, 8192} == set(replayed)


@pytest.mark.skipif(not runner.gpu_problems(), reason="a GPU is here: make gpu-check runs the steps")
@pytest.mark.parametrize("call", ["A", "B"])
def test_without_a_gpu_every_step_says_what_it_misses(call: str, prepared: Path, native: Path, tmp_path: Path) -> None:
    records = dry_run(call, Path(sys.executable), prepared, tmp_path)
    expected = [step.name for made, step in every_step() if made.name == call]
    assert sorted(one["step"] for one in records) == sorted(expected)
    for one in records:
        assert one["status"] == "missing", one
        assert "an NVIDIA GPU: " in runner.what_is_missing(one), one
    if call == "A":
        assert ["compute-sanitizer" in one["result"]["missing"] for one in records].count(True) in (0, 4)


def dry_run(call: str, python: Path, prepared: Path, out: Path) -> list[dict[str, Any]]:
    """The records of the call's steps."""
    command = [python, "-m", "benchmarks.gpu_check", "run", call, "--folder", prepared, "--out", out]
    done = subprocess.run(command, cwd=builds.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr + (out / f"{call}.log").read_text()
    return [json.loads(line) for line in (out / f"{call}.jsonl").read_text().splitlines()][1:]


@pytest.mark.skipif(not runner.gpu_problems(), reason="a GPU is here: make gpu-check runs the steps")
@pytest.mark.parametrize("call", ["A", "B"])
def test_a_python_without_packages_starts_both_calls(call: str, prepared: Path, native: Path, tmp_path: Path) -> None:
    """The native steps need none, and the others name those that they need."""
    venv.create(tmp_path / "bare", symlinks=True)
    records = dry_run(call, tmp_path / "bare" / "bin" / "python", prepared, tmp_path / "deep" / "out")
    missing = {one["step"]: runner.what_is_missing(one) for one in records}
    wanting = {step.name: step.modules for made, step in every_step() if made.name == call and step.modules}
    assert len(wanting) == (2 if call == "A" else 6)
    for name, why in missing.items():
        assert "an NVIDIA GPU: " in why, name
        assert why.startswith(f"{', '.join(wanting[name])} (for Python); " if name in wanting else ""), name
        assert ("for Python" in why) == (name in wanting), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="this torch can use a GPU")
@pytest.mark.parametrize("what", ["layers", "products"])
def test_a_torch_without_cuda_is_named(
    what: str, prepared: Path, native: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there is a GPU; without one these steps are not started."""
    from benchmarks.gpu_check import on_torch

    assert on_torch.main(what, str(prepared), str(native)) == runner.MISSING
    missing = json.loads(capsys.readouterr().out)["missing"]
    assert missing.endswith(f"; torch {torch.__version__} can use none")
    assert missing.startswith(runner.gpu_problems()[0] if runner.gpu_problems() else "a torch built with CUDA")


def test_cases_are_worked_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of `prepare` but compiling, with few cases; a second time nothing is worked out."""
    few = [one for one in calls.all_cases() if one.name in ("all-picks", "one-token")]
    timed = next(drawn.large_cases())
    monkeypatch.setattr(prepare, "compile_all", lambda *given, report: None)
    monkeypatch.setattr(calls, "all_cases", lambda: few)
    monkeypatch.setattr(drawn, "large_cases", lambda: iter([timed]))
    product = linear_cases.stacked("product", 1, 256, 64, 32)
    monkeypatch.setattr(linear_cases, "large_cases", lambda: iter([product]))
    monkeypatch.setattr(prepare, "DRAWN", 2)
    said: list[str] = []
    for _ in range(2):
        prepare.prepare(tmp_path, "90", None, report=said.append)
    assert sum("expected outputs of" in line for line in said) == 1
    record = json.loads((tmp_path / "prepared.json").read_text())
    assert list(record["shapes"]) == [f"select_tokens/{timed.name}", "linear/product"]
    assert record["architecture"] == "90"
    assert len(json.loads((tmp_path / "calls.json").read_text())) >= 1


# What a machine with torch, numpy, onnx and ml_dtypes may lack (docs/gpu-check.md).
LACKING = tuple(sorted({*steps.COMMANDS, "pydantic_core"} - {*steps.OPERATORS, "torch"}))


def test_call_a_starts_with_torch_numpy_and_onnx_alone() -> None:
    """Every module that a step of call A loads, what compiles there anew, and the program that starts them all."""
    modules = {one.command[2] for made, one in every_step() if made.name == "A" and one.command[0] == sys.executable}
    assert len(modules) == 2
    needed = sorted(modules | {"benchmarks.gpu_check.__main__", "benchmarks.gpu_check.prepare"})
    script = (
        "import importlib, sys\n"
        "class Bare:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {LACKING!r}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Bare())\n"
        f"for name in {needed!r}: importlib.import_module(name)\n"
        "from graphs import ops\n"
        "ops.forms('kernel_python'), ops.forms('cases')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=builds.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_native_program_finds_every_function(prepared: Path, native: Path) -> None:
    if not (native / "harness").is_file():
        pytest.skip("no CUDA compiler (nvcc) is installed")
    options = ["--kernels", native / "libbtp_kernels.so", "--cases", prepared / "cases.bin"]
    done = subprocess.run([native / "harness", "ready", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout)
    assert found["calls"] == len(calls.all_cases()) + 15 and found["refused"] == [] and found["largest_workspace"] > 0
    for wrong, message in (("nonsense", "unknown command"), ("ready", "no call is named")):
        done = subprocess.run(
            [native / "harness", wrong, *options, "--only", "x"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2 and message in json.loads(done.stdout)["error"]
    (native / "noise").write_text("noise")
    done = subprocess.run(
        [native / "harness", "ready", *options[:2], "--cases", native / "noise"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "is no case file" in json.loads(done.stdout)["error"]


@pytest.mark.skipif(bool(runner.gpu_problems()), reason="no NVIDIA GPU")
def test_the_kernels_equal_the_reference_on_this_gpu(tmp_path: Path) -> None:
    prepare.prepare(tmp_path, runner.gpu_architecture() or "", None)
    options = ["--kernels", tmp_path / "native" / "libbtp_kernels.so", "--cases", tmp_path / "cases.bin"]
    done = subprocess.run(
        [tmp_path / "native" / "harness", "verify", *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
