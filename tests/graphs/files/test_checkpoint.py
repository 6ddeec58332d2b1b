"""Reading safetensors headers: against the safetensors library, and every kind of damage."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from graphs.files.checkpoint import INDEX, SINGLE, missing_shards, open_checkpoint
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
        # what the format's own library refuses too
        (b'{"__metadata__": 5, "a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}', "__metadata__"),
        (b'{"__metadata__": {"a": 1}, "a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}', "__metadata__"),
        (b'{"a": {"dtype": "U8", "shape": [8.0], "data_offsets": [0, 8]}}', "entry of a is not valid"),
        (b'{"a": {"dtype": "U8", "shape": [true, 8], "data_offsets": [0, 8]}}', "entry of a is not valid"),
        (b'{"a": {"dtype": 7, "shape": [8], "data_offsets": [0, 8]}}', "entry of a is not valid"),
        (b'{"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8, 8]}}', "entry of a is not valid"),
        (b'{"a": {"dtype": "U8", "shape": [1099511627776, 0, 1099511627776], "data_offsets": [0, 0]}}', "too large"),
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


def test_more_layers_than_any_model_has(folder: Path) -> None:
    """Before anything makes them."""
    (folder / "config.json").write_text('{"text_config": {"num_hidden_layers": 1000000000}}')
    with pytest.raises(InputError, match="num_hidden_layers 1000000000"):
        open_checkpoint(folder)


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


# -- which weights a folder means: what transformers' from_pretrained loads ------------------------------------------


class Tiny:
    """A small Llama whose every weight has one value, so that it is seen which file was read."""

    def __init__(self, value: float) -> None:
        config = LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(value)

    def save(self, folder: Path, *, shards: bool) -> None:
        self.model.save_pretrained(folder, max_shard_size="1KB" if shards else "1GB")


def values(folder: Path) -> dict[str, float]:
    """What we read; the same must be what transformers loads."""
    ours = {name: float(ref.read().ravel()[0]) for name, ref in open_checkpoint(folder).tensors.items()}
    loaded = LlamaForCausalLM.from_pretrained(folder).state_dict()
    assert {name: float(tensor.ravel()[0]) for name, tensor in loaded.items()} == ours
    assert missing_shards(folder) == []
    return ours


def test_a_single_file_beside_an_older_index_and_its_shards(tmp_path: Path) -> None:
    Tiny(1.0).save(tmp_path, shards=True)
    Tiny(2.0).save(tmp_path / "new", shards=False)
    shutil.copyfile(tmp_path / "new" / SINGLE, tmp_path / SINGLE)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert set(values(tmp_path).values()) == {2.0}
    assert open_checkpoint(tmp_path).not_read == INDEX


def test_the_index_that_save_pretrained_leaves_behind(tmp_path: Path) -> None:
    Tiny(1.0).save(tmp_path, shards=True)
    Tiny(2.0).save(tmp_path, shards=False)
    assert (tmp_path / INDEX).is_file() and not list(tmp_path.glob("model-*.safetensors"))
    assert set(values(tmp_path).values()) == {2.0}


@pytest.mark.parametrize("shards", [True, False])
def test_the_file_that_the_configuration_names(tmp_path: Path, shards: bool) -> None:
    Tiny(1.0).save(tmp_path, shards=False)
    Tiny(2.0).save(tmp_path / "other", shards=shards)
    for path in (tmp_path / "other").glob("*safetensors*"):
        shutil.copyfile(path, tmp_path / path.name.replace(SINGLE, "second.safetensors"))
    config = json.loads((tmp_path / "config.json").read_text())
    named = "second.safetensors.index.json" if shards else "second.safetensors"
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": named}))
    assert set(values(tmp_path).values()) == {2.0}
    (tmp_path / named).unlink()
    assert missing_shards(tmp_path) == [named]
    with pytest.raises(InputError, match=f"has no {named}"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": "../x.safetensors"}))
    with pytest.raises(InputError, match="transformers_weights"):
        open_checkpoint(tmp_path)


def test_other_shards_in_the_folder_are_not_read(tmp_path: Path) -> None:
    """Shards of an interrupted download, and the single-file form that Mistral publishes beside them."""
    Tiny(1.0).save(tmp_path, shards=True)
    save_file({"stray": np.ones(1, np.float32)}, tmp_path / "consolidated.safetensors")
    save_file({"stray": np.ones(1, np.float32)}, tmp_path / "model-00001-of-00099.safetensors")
    assert set(values(tmp_path).values()) == {1.0}


def test_weights_of_a_bundle_have_an_index_unless_they_are_one_file(folder: Path) -> None:
    """There a shard may be called like the single file."""
    weights = folder / "weights"
    weights.mkdir()
    for name, tensor in (("model.safetensors", "a"), ("more.safetensors", "b")):
        save_file({tensor: np.ones(1, np.float32)}, weights / name)
    (weights / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "more.safetensors"}}))
    assert set(open_checkpoint(folder, weights=weights).tensors) == {"a", "b"}
