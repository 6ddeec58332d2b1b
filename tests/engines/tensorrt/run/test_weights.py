"""Shared weights: bytes against the safetensors files as the safetensors library reads them."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from safetensors.torch import load_file

from engines.runners.host import HostBuffer
from engines.runners.interface import Buffer, Dtype
from engines.tensorrt.prepare.prepared_graphs import Choices, PreparedGraph, prepare
from engines.tensorrt.records import WeightInput, WeightSource
from engines.tensorrt.run.weights import SharedWeights, packed
from graphs.files.bundle import Bundle
from graphs.records.errors import InputError


class Device:
    """Host memory that counts what is allocated, and is not finished before `finish`."""

    def __init__(self) -> None:
        self.allocated = 0
        self.finished = 0

    def allocate(self, dtype: Dtype, shape: Sequence[int]) -> Buffer:
        buffer = HostBuffer.allocate(dtype, shape)
        self.allocated += buffer.array.nbytes
        return buffer

    def finish(self) -> None:
        self.finished += 1


def shared(bundle: Bundle, *, pack: bool = True) -> list[PreparedGraph]:
    return prepare(bundle, Choices(opset=23, weights="shared", pack=pack, plugins=False))


def stored(bundle: Bundle) -> dict[str, Any]:
    """Every tensor of the checkpoint by its canonical name, read by the safetensors library."""
    import torch

    tensors = {
        name: tensor for file in bundle.weights.glob("model*.safetensors") for name, tensor in load_file(file).items()
    }
    found = {}
    for name, ref in bundle.checkpoint().tensors.items():
        tensor = tensors[ref.stored_name]
        found[name] = tensor.to(torch.float32).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
    return found


@pytest.mark.parametrize(("precision", "pack"), [("float32", True), ("float32", False), ("bfloat16", True)])
def test_every_input_is_made_of_the_checkpoint(precision: str, pack: bool, tiny_bundle: Any) -> None:
    """bfloat16: stored in float32, so every matrix is rounded once, to the nearest."""
    bundle: Bundle = tiny_bundle(precision=precision)
    tensors, packings = stored(bundle), set()
    for graph in shared(bundle, pack=pack):
        if graph.name == "vision":
            continue
        assert graph.weight_inputs
        for weight in graph.weight_inputs:
            names = [source.tensor for source in weight.sources]
            wanted = np.concatenate([tensors[name] for name in names])
            if precision == "bfloat16":
                wanted = wanted.astype(ml_dtypes.bfloat16)
            got = packed(bundle.root, weight)
            assert got.dtype == wanted.dtype and got.tobytes() == wanted.tobytes(), weight.name
            packings.add(tuple(name.rsplit(".", 2)[-2] for name in names))
    assert (("q_proj", "k_proj", "v_proj") in packings) == (("gate_proj", "up_proj") in packings) == pack


def test_uploaded_once_for_all_graphs(tiny_bundle: Any) -> None:
    bundle: Bundle = tiny_bundle()
    device = Device()
    weights = SharedWeights(device.allocate, device.finish)
    records: list[Any] = [graph for graph in shared(bundle) if graph.name != "vision"]
    once = {weight.name: weight for graph in records for weight in graph.weight_inputs}
    size = sum(int(np.prod(weight.shape)) * 4 for weight in once.values())
    assert weights.missing_bytes(bundle.root, records) == size
    bound = [weights.bind(bundle.root, graph) for graph in records]
    assert weights.nbytes == device.allocated == size and weights.missing_bytes(bundle.root, records) == 0
    assert device.finished == sum(len(weight.sources) for weight in once.values())
    for buffers in bound:
        for name, buffer in buffers.items():
            np.testing.assert_array_equal(buffer.read(), packed(bundle.root, once[name]))
    pointers = {name: {buffers[name].pointer for buffers in bound if name in buffers} for name in once}
    assert all(len(found) == 1 for found in pointers.values())


def test_another_folder_with_the_same_files(tiny_bundle: Any, tmp_path: Path) -> None:
    """Hard links, as the unpruned engines have them, are the same memory; copies are not."""
    bundle: Bundle = tiny_bundle()
    device = Device()
    weights = SharedWeights(device.allocate, device.finish)
    graph: Any = next(graph for graph in shared(bundle) if graph.name == "head")
    weights.bind(bundle.root, graph)
    size = device.allocated
    for name, copy in (("links", Path.hardlink_to), ("copies", lambda a, b: shutil.copyfile(b, a))):
        folder = tmp_path / name / "graphs" / "weights"
        folder.mkdir(parents=True)
        for file in bundle.weights.iterdir():
            copy(folder / file.name, file)  # type: ignore[operator]
        weights.bind(tmp_path / name, graph)
        assert device.allocated == size * (1 if name == "links" else 2)


class TestDamage:
    def weight(self, folder: Path, **changes: Any) -> WeightInput:
        save_file({"a": np.arange(12, dtype=np.float32).reshape(3, 4)}, folder / "w.safetensors")
        offset = (folder / "w.safetensors").stat().st_size - 48
        fields = {"tensor": "a", "file": "w.safetensors", "offset": offset, "nbytes": 48, "dtype": "float32"}
        source = WeightSource(**fields | {"shape": (3, 4)} | changes)  # type: ignore[arg-type]
        return WeightInput(name="a", dtype="float32", shape=(3, 4), sources=(source,))

    def test_whole(self, tmp_path: Path) -> None:
        np.testing.assert_array_equal(packed(tmp_path, self.weight(tmp_path)), np.arange(12).reshape(3, 4))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"file": "gone.safetensors"}, "is missing"),
            ({"offset": 10_000}, "has .* bytes"),
            ({"nbytes": 44}, "cannot hold a"),
            ({"shape": (4, 3)}, r"is made of \[4, 3\]"),
            ({"dtype": "float16"}, "cannot hold a"),
        ],
    )
    def test_not_what_the_record_says(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        weight = self.weight(tmp_path, **changes)
        device = Device()
        graph: Any = type("Graph", (), {"weight_inputs": (weight,)})
        with pytest.raises(InputError, match=message):
            packed(tmp_path, weight)
        with pytest.raises(InputError, match=message):
            SharedWeights(device.allocate, device.finish).bind(tmp_path, graph)

    def test_cut_off(self, tmp_path: Path) -> None:
        weight = self.weight(tmp_path)
        data = (tmp_path / "w.safetensors").read_bytes()
        (tmp_path / "w.safetensors").write_bytes(data[:-1])
        with pytest.raises(InputError, match=f"has {len(data) - 1} bytes"):
            packed(tmp_path, weight)
