"""The cache of statistics: what comes back, what does not, and what tells one model from another."""

import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from calibrate.measure.statistics import Statistics
from calibrate.measure.statistics_cache import StatisticsCache, checkpoint_identity, key_of
from tests.calibrate.models import checkpoint, make_llava


@pytest.fixture()
def statistics() -> Statistics:
    rng = np.random.default_rng(0)
    return Statistics(
        taus=(0.93, 0.95), counts=rng.integers(0, 36, (6, 4, 2)), attention=rng.random((6, 4)),
        top_shares=rng.random((6, 4, 4)), divergence=rng.random((3, 4)), agreement=rng.random((3, 4)) < 0.5,
        logits=rng.random((9, 64)).astype(np.float32),
        answers=rng.integers(0, 64, 9), lengths=np.array([1, 2, 1, 3, 1, 1]),
    )  # fmt: skip


def equal(one: Statistics, other: Statistics) -> bool:
    return one.taus == other.taus and all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("counts", "attention", "top_shares", "divergence", "agreement", "logits", "answers", "lengths")
    )


def test_what_is_kept_comes_back_bit_for_bit_and_is_said(tmp_path: Path, statistics: Statistics) -> None:
    said: list[str] = []
    store = StatisticsCache(tmp_path / "new" / "folder", said.append)
    key, other = key_of({"model": "a"}), key_of({"model": "b"})
    assert store.get(key) is None and said == []
    store.put(key, statistics)
    result = store.get(key)
    assert result is not None and equal(result, statistics)
    assert said == ["statistics of 6 samples reused from the cache (--no-cache measures again)"]
    assert store.get(other) is None
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [f"{key}.npz"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other", "text"])
def test_a_damaged_entry_is_ignored_said_and_replaced(damage: str, tmp_path: Path, statistics: Statistics) -> None:
    said: list[str] = []
    store, key = StatisticsCache(tmp_path, said.append), key_of({})
    store.put(key, statistics)
    path = tmp_path / f"{key}.npz"
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "cut": whole[:middle],
            "flipped": whole[:middle]
            + bytes(byte ^ 255 for byte in whole[middle : middle + 50])
            + whole[middle + 50 :],
            "empty": b"",
            "text": b"not an archive",
            "other": whole,
        }[damage]
    )
    if damage == "other":  # an entry under another entry's name
        key = key_of({"model": "b"})
        path.rename(tmp_path / f"{key}.npz")
    assert store.get(key) is None
    assert len(said) == 1 and "are damaged" in said[0] and "measured again" in said[0]
    store.put(key, statistics)
    result = store.get(key)
    assert result is not None and equal(result, statistics)


@pytest.mark.parametrize(
    "head", [b"{'descr': '<f8', 'shape': (1,", b"{'descr': '<f8' 'shape'", b"\xff\x00", b"[" * 3000]
)
def test_an_array_with_a_damaged_head_is_a_damaged_entry(head: bytes, tmp_path: Path, statistics: Statistics) -> None:
    """numpy reads the heads of arrays with Python's own parser, whose errors are of many types."""
    said: list[str] = []
    store, key = StatisticsCache(tmp_path, said.append), key_of({})
    store.put(key, statistics)
    path = tmp_path / f"{key}.npz"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["counts.npy"] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert store.get(key) is None and "are damaged" in said[0]


def test_an_entry_whose_arrays_do_not_fit_together_is_damaged(tmp_path: Path, statistics: Statistics) -> None:
    from dataclasses import replace

    store, key = StatisticsCache(tmp_path), key_of({})
    store.put(key, replace(statistics, attention=statistics.attention[:, :3]))
    assert store.get(key) is None


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, statistics: Statistics) -> None:
    (tmp_path / "file").write_text("in the way")
    said: list[str] = []
    store = StatisticsCache(tmp_path / "file" / "folder", said.append)
    store.put(key_of({}), statistics)
    assert len(said) == 1 and "not cached" in said[0]
    off = StatisticsCache(None, said.append)
    off.put(key_of({}), statistics)
    assert off.get(key_of({})) is None and len(said) == 1


def test_the_key_follows_every_part() -> None:
    keys = {key_of({"model": {"a": 1}, "seed": 0}), key_of({"model": {"a": 2}, "seed": 0}), key_of({"model": {"a": 1}})}
    assert len(keys) == 3
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})


@pytest.mark.parametrize("small", [2**26, 0], ids=["hashed-whole", "sampled"])
def test_other_weights_are_another_model(small: int, tmp_path: Path) -> None:
    make_llava(tmp_path)
    before = checkpoint_identity(checkpoint(tmp_path), small=small)
    assert checkpoint_identity(checkpoint(tmp_path), small=small) == before
    file = tmp_path / "model.safetensors"
    stat = file.stat()
    tensor = checkpoint(tmp_path)["language_model.layers.3.mlp.up_proj.weight"]
    with file.open("r+b") as stream:
        stream.seek(tensor.offset)
        stream.write(b"\x01\x02")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size and file.stat().st_mtime_ns == stat.st_mtime_ns
    assert checkpoint_identity(checkpoint(tmp_path), small=small) != before


def test_a_hub_download_is_known_by_the_hash_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    make_llava(folder)
    blobs, name = tmp_path / "models--owner--name" / "blobs", "ab" * 32
    blobs.mkdir(parents=True)
    (folder / "model.safetensors").rename(blobs / name)
    (folder / "model.safetensors").symlink_to(blobs / name)
    assert checkpoint_identity(checkpoint(folder), small=0)["model.safetensors"] == name


def test_a_changed_number_is_noticed(tmp_path: Path, statistics: Statistics) -> None:
    """An entry that reads back whole, with one number that is not what was measured: NaN or a plausible one."""
    for value in (np.nan, 0.125):
        said: list[str] = []
        cache = StatisticsCache(tmp_path, said.append)
        cache.put("key", statistics)
        path = tmp_path / "key.npz"
        with np.load(path) as stored:
            arrays = {name: stored[name].copy() for name in stored.files}
        arrays["divergence"][0, 0] = value
        np.savez_compressed(path, **arrays)
        assert cache.get("key") is None and len(said) == 1 and "measured again" in said[0]
