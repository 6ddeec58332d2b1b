"""Shared weights: bytes against the safetensors files as the safetensors library reads them."""

import ctypes
import mmap
import os
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
from engines.tensorrt.run import weights as weights_module
from engines.tensorrt.run.weights import SharedWeights, packed
from graphs.files.bundle import Bundle
from graphs.files.page_cache import release
from graphs.records.errors import InputError


class Device:
    """Host memory that counts what is allocated, and is not finished before `finish`."""

    def __init__(self) -> None:
        self.arenas = list[int]()
        self.finished = 0

    @property
    def allocated(self) -> int:
        return sum(self.arenas)

    def arena(self, size: int) -> "HostArena":
        self.arenas.append(size)
        return HostArena(size)

    def finish(self) -> None:
        self.finished += 1


class HostArena:
    """Memory for many tensors that begins as 0xFF: what is not written shows."""

    def __init__(self, size: int) -> None:
        self.bytes = HostBuffer.allocate(np.dtype(np.uint8), (size,)).array
        self.bytes[:] = 0xFF

    def tensor(self, dtype: Dtype, shape: Sequence[int], offset: int) -> Buffer:
        assert offset % 256 == 0
        count = int(np.prod(shape)) * dtype.itemsize
        return HostBuffer(self.bytes[offset : offset + count].view(dtype).reshape(shape))


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
    weights = SharedWeights(device.arena, device.finish)
    records: list[Any] = [graph for graph in shared(bundle) if graph.name != "vision"]
    once = {weight.name: weight for graph in records for weight in graph.weight_inputs}
    size = sum(int(np.prod(weight.shape)) * 4 for weight in once.values())
    assert weights.missing_bytes(bundle.root, records) == size
    weights.reserve(bundle.root, records)
    assert weights.missing_bytes(bundle.root, records) == 0 == weights.nbytes
    bound = [weights.bind(bundle.root, graph) for graph in records]
    assert weights.nbytes == size and weights.missing_bytes(bundle.root, records) == 0
    (arena,) = device.arenas  # one for all
    assert size <= arena < size + 256 * len(once)
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
    weights = SharedWeights(device.arena, device.finish)
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


@pytest.mark.parametrize("give_back", [False, True])
def test_files_are_read_range_by_range_and_given_back(
    give_back: bool, tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges that are no whole rows, each released behind itself; the same bytes arrive."""
    bundle: Bundle = tiny_bundle()
    monkeypatch.setattr(weights_module, "RANGE", 1000)
    released = list[tuple[int, int]]()
    monkeypatch.setattr(weights_module, "release", lambda file, start=0, count=0: released.append((start, count)))
    device = Device()
    graph: Any = next(graph for graph in shared(bundle) if graph.name == "prefill_0")
    bound = SharedWeights(device.arena, device.finish, give_back=give_back).bind(bundle.root, graph)
    for weight in graph.weight_inputs:
        np.testing.assert_array_equal(bound[weight.name].read(), packed(bundle.root, weight))
    if not give_back:
        assert not released
        return
    assert released.pop() == (0, 0) and len(released) == device.finished, "behind every range, and all at the end"
    sources = [source for weight in graph.weight_inputs for source in weight.sources]
    assert {(source.offset, source.nbytes) for source in sources} <= set(released)


def cached_bytes(path: Path) -> int:
    """Bytes of a file that are in memory, by the kernel's own list."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    size = path.stat().st_size
    flags = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with path.open("rb") as file:
        length = ctypes.c_size_t(size)
        arguments = (None, length, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), ctypes.c_long(0))
        address = ctypes.c_void_p(libc.mmap(*arguments))
        assert libc.mincore(address, length, flags) == 0
        libc.munmap(address, length)
    return sum(flag & 1 for flag in flags) * mmap.PAGESIZE


def test_reading_weights_leaves_no_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB read in ranges of 2: never more than half is in memory, though the system reads ahead; none at the end."""
    size = 64 * 2**20
    path = tmp_path / "w.safetensors"
    save_file({"a": np.arange(size // 4, dtype=np.float32).reshape(-1, 1024)}, path)
    with path.open("rb") as file:
        os.fdatasync(file.fileno())
        release(file.fileno())
    if cached_bytes(path):
        pytest.skip("this file system keeps its pages, whatever is advised")
    monkeypatch.setattr(weights_module, "RANGE", 2 * 2**20)
    offset, most = path.stat().st_size - size, 0
    shape = (size // 4096, 1024)
    source = WeightSource(tensor="a", file=path.name, offset=offset, nbytes=size, dtype="float32", shape=shape)
    graph: Any = type(
        "G", (), {"weight_inputs": (WeightInput(name="a", dtype="float32", shape=shape, sources=(source,)),)}
    )

    def finish() -> None:
        nonlocal most
        most = max(most, cached_bytes(path))

    bound = SharedWeights(Device().arena, finish, give_back=True).bind(tmp_path, graph)
    assert 0 < most <= size // 2 and cached_bytes(path) == 0
    assert bound["a"].read().reshape(-1)[-1] == np.float32(size // 4 - 1)


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
            SharedWeights(device.arena, device.finish).bind(tmp_path, graph)

    def test_cut_off(self, tmp_path: Path) -> None:
        weight = self.weight(tmp_path)
        data = (tmp_path / "w.safetensors").read_bytes()
        (tmp_path / "w.safetensors").write_bytes(data[:-1])
        with pytest.raises(InputError, match=f"has {len(data) - 1} bytes"):
            packed(tmp_path, weight)
