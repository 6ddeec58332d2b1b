"""Weights that sessions read where the process has their file mapped: once, and only what is what the graph says."""

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from engines.runners.interface import Runner
from engines.runners.mapped_weights import mapped_tensors
from engines.runners.on_cpu.linear import FEW
from engines.runners.onnxruntime import OrtLoader
from graphs.records.errors import BtpError
from tests.engines.native import builds
from tests.engines.runners.native_cpu import here
from tests.engines.runners.test_stored_weights import half_model, model_of, rows_of, weights

FILE = "weights.bin"
GROUP, INPUTS = 32, 4096

pytestmark = here


def stored(folder: Path, rows: int) -> Path:
    """A graph with four-bit weights in a file beside it, one of a few that read the same file."""
    path = folder / f"rows{rows}.onnx"
    model = model_of(weights(INPUTS, GROUP, zeros=True, bias=True), rows, GROUP)
    onnx.save_model(model, path, save_as_external_data=True, location=FILE, size_threshold=0)
    return path


def opened(path: Path) -> Runner:
    return OrtLoader(threads=1, custom_ops=builds.ort_library(), accuracy_level=4)(path)


def mappings(file: Path) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]


def run(runner: Runner, rows: int) -> np.ndarray:
    return runner.run({"x": rows_of(rows, INPUTS)})["y"]


def test_a_file_is_mapped_once_for_all_sessions(tmp_path: Path) -> None:
    """And no copy of it is made: it stays mapped as long as one of them lives."""
    few, many = stored(tmp_path, 2), stored(tmp_path, 20)
    runners = [opened(few), opened(many), opened(few)]
    assert len(mappings(tmp_path / FILE)) == 1
    alone = onnx.load(few)  # with the weights inside
    inside = tmp_path / "inside.onnx"
    onnx.save_model(alone, inside)
    np.testing.assert_array_equal(run(runners[0], 2), run(opened(inside), 2))
    last = runners.pop(1)
    runners.clear()
    gc.collect()
    assert len(mappings(tmp_path / FILE)) == 1
    assert np.isfinite(run(last, 20)).all()
    del last
    gc.collect()
    assert not mappings(tmp_path / FILE)


def test_what_is_packed_when_a_session_opens_is_not_kept(tmp_path: Path) -> None:
    """Many rows of weights in float16: ONNX Runtime casts and packs them, and the file is left."""
    path = tmp_path / "many.onnx"
    weight = np.random.default_rng(0).standard_normal((64, 2048)).astype(np.float16)
    model = half_model(FEW + 1, weight)
    onnx.save_model(model, path, save_as_external_data=True, location=FILE, size_threshold=0)
    runner = opened(path)
    assert not mappings(tmp_path / FILE)
    x = rows_of(FEW + 1, 2048)
    found, exact = runner.run({"x": x})["y"], x.astype(np.float64) @ weight.astype(np.float64).T
    assert (np.abs(found - exact) <= 1e-6 * np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(weight, axis=1)).all()


def test_a_link_of_a_bundle_that_was_derived_is_the_same_file(tmp_path: Path) -> None:
    first = stored(tmp_path, 2)
    other = tmp_path / "derived"
    other.mkdir()
    shutil.copy(first, other)
    os.link(tmp_path / FILE, other / FILE)
    one, two = opened(first), opened(other / first.name)
    assert len(mappings(tmp_path / FILE)) == 1 and not mappings(other / FILE)
    np.testing.assert_array_equal(run(one, 2), run(two, 2))


def test_a_file_that_was_replaced_is_another_one(tmp_path: Path) -> None:
    path = stored(tmp_path, 2)
    before = opened(path)
    wanted = run(before, 2)
    data = bytearray((tmp_path / FILE).read_bytes())
    (tmp_path / "new").write_bytes(bytes(~byte & 255 for byte in data[:4096]) + data[4096:])
    os.replace(tmp_path / "new", tmp_path / FILE)
    assert not np.array_equal(run(opened(path), 2), wanted)
    np.testing.assert_array_equal(run(before, 2), wanted)


def _elsewhere(entry: dict[str, str], folder: Path) -> None:
    shutil.move(folder / FILE, folder.parent / FILE)
    entry["location"] = f"../{FILE}"


def _linked(entry: dict[str, str], folder: Path) -> None:
    shutil.move(folder / FILE, folder.parent / FILE)
    (folder / FILE).symlink_to(folder.parent / FILE)


def _gone(entry: dict[str, str], folder: Path) -> None:
    (folder / FILE).unlink()


def _empty(entry: dict[str, str], folder: Path) -> None:
    os.truncate(folder / FILE, 0)


def _cut(entry: dict[str, str], folder: Path) -> None:
    os.truncate(folder / FILE, 4096)


def _behind(entry: dict[str, str], folder: Path) -> None:
    entry["offset"] = str(2**40)


def _negative(entry: dict[str, str], folder: Path) -> None:
    entry["offset"] = "-4096"


def _short(entry: dict[str, str], folder: Path) -> None:
    entry["length"] = "16"


@pytest.mark.parametrize("spoil", [_elsewhere, _linked, _gone, _empty, _cut, _behind, _negative, _short])
def test_what_is_not_what_the_graph_says_is_refused(
    spoil: Callable[[dict[str, str], Path], None], tmp_path: Path
) -> None:
    """By ONNX Runtime, to which it is left: one error, nothing read from elsewhere."""
    folder = tmp_path / "graphs"
    folder.mkdir()
    path = stored(folder, 2)
    model = onnx.load(path, load_external_data=False)
    (codes,) = (
        tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.UINT8 and len(tensor.dims) == 3
    )
    entry = {one.key: one.value for one in codes.external_data}
    spoil(entry, folder)
    del codes.external_data[:]
    for key, value in entry.items():
        codes.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    assert codes.name not in mapped_tensors(model, folder)
    with pytest.raises(BtpError):
        opened(path)
