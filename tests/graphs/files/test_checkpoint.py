"""Reading safetensors headers: against the safetensors library, and every kind of damage."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from graphs.files.checkpoint import open_checkpoint
from graphs.records.errors import InputError

TENSORS = {
    "language_model.model.norm.weight": np.arange(6, dtype=np.float16),
    "language_model.lm_head.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "empty": np.empty((0, 3), np.float32),
}
RENAMES = [("language_model.model.", "language_model."), ("language_model.lm_head.", "lm_head.")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    return tmp_path


def test_reads_what_the_library_wrote(folder: Path) -> None:
    checkpoint = open_checkpoint(folder, RENAMES)
    assert set(checkpoint.tensors) == {"language_model.norm.weight", "lm_head.weight", "empty"}
    np.testing.assert_array_equal(checkpoint["lm_head.weight"].read(), TENSORS["language_model.lm_head.weight"])
    np.testing.assert_array_equal(
        checkpoint["language_model.norm.weight"].read(), TENSORS["language_model.model.norm.weight"]
    )
    assert checkpoint["empty"].read().shape == (0, 3)
    assert checkpoint.config == {"model_type": "llava"}


def test_offsets_point_at_the_bytes(folder: Path) -> None:
    ref = open_checkpoint(folder)["language_model.lm_head.weight"]
    raw = ref.file.read_bytes()[ref.offset : ref.offset + ref.nbytes]
    assert raw == TENSORS["language_model.lm_head.weight"].tobytes()


def test_shards_through_the_index_and_symbolic_links(tmp_path: Path) -> None:
    store, folder = tmp_path / "store", tmp_path / "snapshot"
    store.mkdir(), folder.mkdir()
    save_file({"a": np.ones(2, np.float32)}, store / "blob1")
    save_file({"b": np.zeros(3, np.float32)}, store / "blob2")
    for number in (1, 2):
        (folder / f"model-{number}.safetensors").symlink_to(store / f"blob{number}")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.files == ((store / "blob1").resolve(), (store / "blob2").resolve())
    (store / "blob2").unlink()
    with pytest.raises(InputError, match="1 of 2 shards are missing"):
        open_checkpoint(folder)


def test_missing_tensor_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"has no tensor lm_head\.bias"):
        open_checkpoint(folder)["lm_head.bias"]


@pytest.mark.parametrize("cut", [0, 4, 20, -1])
def test_truncated_files(folder: Path, cut: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match="truncated or damaged"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (b"not json", "header is not JSON"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "does not take 4 bytes"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}', "ends at byte"),
        (b'{"a": {"dtype": "F7", "shape": [2], "data_offsets": [0, 8]}}', "dtype F7"),
        (b"[]", "truncated or damaged"),
        (b'{"a": {"dtype": "F32"}}', "truncated or damaged"),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}', "truncated or damaged"),
    ],
)
def test_damaged_headers(folder: Path, header: bytes, complaint: str) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(InputError, match=complaint):
        open_checkpoint(folder)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(InputError, match="only pickles"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("text", "complaint"), [(None, "cannot read"), ("{", "not JSON"), ("[]", "holds a list")])
def test_wrong_config(folder: Path, text: str | None, complaint: str) -> None:
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=complaint):
        open_checkpoint(folder)


def test_one_tensor_in_two_shards(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({"a": np.ones(2, np.float32)}, tmp_path / f"m{number}.safetensors")
    index = {"weight_map": {"a": "m1.safetensors", "b": "m2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="stored twice"):
        open_checkpoint(tmp_path)
