"""One engine in its own process: what TensorRT refuses, and children that crash, lack memory or are interrupted."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graphs.records.errors import BtpError, CheckError, InputError, UnavailableError
from tests.engines.tensorrt import build_processes, building
from tests.engines.tensorrt.build_processes import build


@pytest.fixture(autouse=True)
def _rtx() -> None:
    building.need_rtx()


def test_an_engine_is_built_and_described(tmp_path: Path) -> None:
    path, shares = building.product(tmp_path), list[float]()
    built = build(building.job(path), shares.append)
    assert built.size == path.with_suffix(".engine").stat().st_size > 0
    assert built.tensorrt_version.startswith("1.") and built.seconds > 0
    assert [layer.plugin for layer in built.layers] == [None] * len(built.layers) != []
    assert built.layers_from == "log"
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] <= 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["build.log", "product.engine", "product.onnx"]


def test_peak_memory_is_the_childs_own(tmp_path: Path) -> None:
    """This process holds 700 MB; the child reports what it took itself, with TensorRT's 200 MB library."""
    held = bytearray(700 * 2**20)
    built = build(building.job(building.product(tmp_path)))
    assert len(held) and built.peak_memory_bytes is not None
    assert 50 * 2**20 < built.peak_memory_bytes < 600 * 2**20


def test_a_refused_node_is_named(tmp_path: Path) -> None:
    path = building.product(tmp_path, "NoSuchOperator")
    with pytest.raises(CheckError, match=r"product: TensorRT refuses node the_product \(NoSuchOperator\)"):
        build(building.job(path))
    assert not path.with_suffix(".engine").exists()


def test_missing_weights_are_one_error(tmp_path: Path) -> None:
    import onnx

    path = building.product(tmp_path)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(InputError) as caught:
        build(building.job(path))
    assert caught.value.got == f"product: {tmp_path / 'weights.bin'} cannot be opened"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "shape": ({"shape": (8, 32)}, r"inputs of the network: x float32 \[8, 64\]\nwanted: x float32 \[8, 32\]"),
    "type": ({"dtype": "float16"}, r"inputs of the network: x float32 \[8, 64\]\nwanted: x float16"),
    "name": ({"name": "hidden"}, "inputs of the network: hidden is missing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_inputs_must_be_as_in_the_manifest(case: str, tmp_path: Path) -> None:
    changes, message = WRONG[case]
    job = building.job(building.product(tmp_path))
    wrong = job.model_copy(update={"inputs": (job.inputs[0].model_copy(update=changes),)})
    with pytest.raises(CheckError, match=message):
        build(wrong)
    assert not job.engine.exists()


def test_a_lost_plugin_layer_is_an_error(tmp_path: Path) -> None:
    job = building.job(building.product(tmp_path), plugins="python", custom_nodes={"select": "BtpSelectTokens"})
    with pytest.raises(CheckError, match="plugin layers in TensorRT: none") as caught:
        build(job)
    assert caught.value.wanted == "one for each custom node: 1 BtpSelectTokens"


def test_a_full_disk_is_one_error(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(InputError, match="No space left on device while writing full") as caught:
        build(building.job(building.product(tmp_path), engine=Path("/dev/full")))
    assert caught.value.do.startswith("free some space")


def test_a_plugin_library_that_is_none_is_refused(tmp_path: Path) -> None:
    library = tmp_path / "libbtp_trt_dynamic.so"
    library.write_bytes(b"\x7fELF nothing")
    job = building.job(building.product(tmp_path), plugins="library", plugin_library=library)
    with pytest.raises(UnavailableError, match="is no shared library"):
        build(job.model_copy(update={"custom_nodes": {"select": "BtpSelectTokens"}}))


DEATHS: dict[str, tuple[str, type[BtpError], str]] = {
    "crash": (
        'std::fputs("it broke", stderr); std::raise(SIGSEGV);',
        CheckError,
        "ended with signal SIGSEGV: it broke",
    ),
    "abort": ("std::raise(SIGABRT);", CheckError, "ended with signal SIGABRT"),
    "killed": ("std::raise(SIGKILL);", UnavailableError, "the memory did not suffice"),
    "exit": ("_exit(7);", CheckError, "ended with exit code 7"),
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_dying_child_is_one_error(death: str, tmp_path: Path) -> None:
    does, kind, message = DEATHS[death]
    job = building.job(building.product(tmp_path), **build_processes.plugin_that(does, tmp_path))
    with pytest.raises(kind, match=f"product.*{message}") as caught:
        build(job)
    assert not job.engine.exists() and len(caught.value.lines()) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_child_dies_with_its_parent(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C for the parent alone, and a parent that cannot clean up."""
    job, pids = build_processes.waiting_job(tmp_path)
    script = (
        f"{build_processes.BUILD}from btp_export.cli import _signals_interrupt\nwith _signals_interrupt(): build()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, job.model_dump_json()], stderr=subprocess.PIPE)
    child, server = build_processes.waiting(pids)
    parent.send_signal(number)
    parent.communicate(timeout=30)
    assert build_processes.gone(child, server)
    assert not job.engine.exists()
