"""Everything that can be wrong with a checkpoint is said in one clear error before anything long begins."""

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

import btp_export
from btp_export import cli
from btp_export.families import known_models
from btp_export.measuring.bench import measure
from btp_export.model.open_model import find_model, open_model
from graphs.files.atomic import hub_sha256, sha256
from graphs.files.bundle import Bundle
from graphs.files.checkpoint import open_checkpoint
from graphs.records.errors import InputError, UnavailableError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = known_models()["llava-1.5-7b"].repository


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def fill_cache(cache: Path, checkpoint: Path, *, without: tuple[str, ...] = ()) -> Path:
    """The checkpoint as the hub's client stores it: blobs by hash, a snapshot of links; gives the snapshot."""
    root = cache / f"models--{REPOSITORY.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for path in checkpoint.iterdir():
        if path.name in without:
            continue
        large = path.suffix == ".safetensors"
        blob = root / "blobs" / (sha256(path) if large else sha256(path)[:40])
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_a_model_in_the_cache_needs_no_network(cache: Path, tiny_checkpoint: Path) -> None:
    snapshot = fill_cache(cache, tiny_checkpoint)
    model = open_model("llava-1.5-7b")
    assert model.source.folder == snapshot and model.source.origin == f"{REPOSITORY}@{COMMIT}"
    assert all(path.parent.name == "blobs" for path in model.checkpoint.files)
    assert find_model(REPOSITORY).folder == snapshot


def test_the_cache_knows_the_hashes_of_large_files(cache: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    fill_cache(cache, tiny_checkpoint)
    model = open_model("llava-1.5-7b")
    (shard,) = model.checkpoint.files
    assert hub_sha256(shard) == sha256(tiny_checkpoint / "model.safetensors")
    assert hub_sha256(model.source.folder / "config.json") is None
    lookalike = tmp_path / "blobs" / shard.name
    lookalike.parent.mkdir()
    lookalike.write_bytes(b"")
    assert hub_sha256(lookalike) is None, "only inside a repository's folder of the cache"


def test_an_export_from_the_cache_has_the_true_hashes(
    cache: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill_cache(cache, tiny_checkpoint)
    out = tmp_path / "bundle"
    assert cli.main(["export", "--model", "llava-1.5-7b", "--plan", "none", "--link", "hard", "--out", str(out)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    for entry in manifest["weights"]:
        assert entry["sha256"] == sha256(out / entry["file"])
    from graphs.files.bundle import Bundle

    Bundle.open(out, check="full")


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (("tokenizer.json",), ["a tokenizer", "tokenizer.json"]),
        (("processor_config.json",), ["a processor", "preprocessor_config.json"]),
        (("chat_template.jinja",), ["a chat template"]),
        (("model.safetensors",), ["model.safetensors"]),
        (("config.json", "tokenizer.json"), ["config.json", "a tokenizer"]),
    ],
)
def test_a_partial_cache_names_what_is_missing(
    missing: tuple[str, ...], words: list[str], cache: Path, tiny_checkpoint: Path
) -> None:
    snapshot = fill_cache(cache, tiny_checkpoint, without=missing)
    with pytest.raises(UnavailableError) as caught:
        open_model("llava-1.5-7b")
    assert all(word in caught.value.got for word in words), caught.value.got
    assert REPOSITORY in caught.value.wanted and str(snapshot) in caught.value.wanted


def test_a_link_to_a_blob_that_is_not_there_is_missing(cache: Path, tiny_checkpoint: Path) -> None:
    snapshot = fill_cache(cache, tiny_checkpoint)
    (snapshot / "model.safetensors").resolve().unlink()
    with pytest.raises(UnavailableError, match=r"lacks model\.safetensors"):
        open_model("llava-1.5-7b")


def test_a_missing_shard_is_named(cache: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    names = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    (folder / names[0]).write_bytes(b"")
    index = {"weight_map": {f"tensor{n}": name for n, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=f"lacks {names[1]}, {names[2]}"):
        open_model(str(folder))
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match=r"lacks model\.safetensors\.index\.json"):
        open_model(str(folder))


@pytest.mark.parametrize("missing", ["tokenizer.json", "processor_config.json", "chat_template.jinja"])
def test_a_folder_without_a_part_is_refused_before_the_weights_are_read(
    missing: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / missing).unlink()
    (folder / "model.safetensors").write_bytes(b"not read")
    assert cli.main(["export", "--model", str(folder), "--plan", "none", "--out", str(out)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) <= 3 and missing in lines[0]
    assert not out.exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "blip"}, "model type 'blip'"),
        ({"text_config": {"model_type": "gpt2"}}, "gpt2 decoder"),
        ({"text_config": {"attn_logit_softcapping": 30.0}}, "attn_logit_softcapping"),
        ({"vision_config": {"model_type": "swin"}}, "swin vision tower"),
    ],
)
def test_unknown_architectures_and_keys_are_named(
    change: dict[str, object], complaint: str, tiny_checkpoint: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    assert cli.main(["export", "--model", str(folder), "--plan", "none", "--out", str(tmp_path / "out")]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_numbers_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Damage in the data that leaves the header whole: the layer is named."""
    import torch

    from calibrate.reference.records import ReferenceInput
    from calibrate.reference.streamed_model import StreamedReference
    from tests.conftest import unpruned

    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    model = open_model(str(folder))
    ref = model.checkpoint["language_model.layers.3.mlp.up_proj.weight"]
    weight = np.memmap(ref.file, np.float32, "r+", offset=ref.offset, shape=ref.shape)
    weight[2, 3] = np.nan
    weight.flush()
    ids = torch.tensor([1, 2, *[model.spec.image_token_id] * 36, 5])
    with pytest.raises(InputError, match="decoder layer 3 gives numbers that are not finite"):
        StreamedReference(model.checkpoint).run([ReferenceInput(ids, torch.zeros(36, 64))], unpruned(model.spec))


def test_too_little_memory_is_said_before_a_calibration_starts(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BTP_MEMORY_GIB", str(100 / 1024))
    assert cli.main(["calibrate", "--model", str(tiny_checkpoint), "--no-cache"]) == 2
    error = capsys.readouterr().err
    assert "calibrating model on 64 samples needs about" in error and "100.0 MiB are available" in error


def test_too_little_memory_is_said_before_a_bundle_is_opened_as_a_whole(
    tiny_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its output matrix says that it has 4 GiB; nothing of it is read before memory is looked at."""
    bundle = tiny_bundle()
    root = tmp_path / "bundle"
    shutil.copytree(bundle.root, root)
    head = onnx.load(root / "graphs" / "head.onnx", load_external_data=False)
    matrix = next(
        weight for weight in head.graph.initializer if list(weight.dims)[-1:] == [64] and len(weight.dims) == 2
    )
    matrix.dims[0] = 2**24
    onnx.save(head, root / "graphs" / "head.onnx")
    monkeypatch.setenv("BTP_MEMORY_GIB", str(100 / 1024))
    large = Bundle(root, bundle.manifest, bundle.plan)
    for use in (measure, btp_export.load):
        with pytest.raises(InputError, match=r"needs about .* 100\.0 MiB are available") as error:
            use(large)
        assert "one layer at a time" in error.value.do


# -- damaged files: what the safetensors library refuses, we refuse -------------------------------------------------

TENSORS = {"a": np.arange(12, dtype=np.float16).reshape(3, 4), "b": np.arange(5, dtype=np.float32)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "model.safetensors"
    save_file(TENSORS, path)
    return path.read_bytes()


def judged(content: bytes, folder: Path) -> tuple[bool, bool]:
    """Whether the library takes the file, and whether we do; anything but InputError escapes."""
    path = folder / "model.safetensors"
    path.write_bytes(content)
    (folder / "config.json").write_text("{}")
    try:
        with safe_open(path, "np") as opened:
            library = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, OverflowError):
        library = None
    try:
        ours = {name: ref.read() for name, ref in open_checkpoint(folder).tensors.items()}
    except InputError as error:
        assert len(error.lines()) <= 3 and "model.safetensors" in error.got
        ours = None
    if library is not None and ours is not None:
        assert library.keys() == ours.keys()
        assert all(library[name].tobytes() == ours[name].tobytes() for name in library)
    return library is not None, ours is not None


HYPOTHESIS = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@HYPOTHESIS
@given(data=st.data())
def test_files_cut_anywhere(data: st.DataObject, whole: bytes, tmp_path: Path) -> None:
    length = data.draw(st.integers(0, len(whole) - 1))
    assert judged(whole[:length], tmp_path) == (False, False)


@HYPOTHESIS
@given(more=st.binary(min_size=1, max_size=20))
def test_files_with_something_behind_them(more: bytes, whole: bytes, tmp_path: Path) -> None:
    assert judged(whole + more, tmp_path) == (False, False)


@HYPOTHESIS
@given(data=st.data())
def test_headers_with_changed_bytes(data: st.DataObject, whole: bytes, tmp_path: Path) -> None:
    """What the library refuses we refuse too; what both take is the same tensors."""
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    library, ours = judged(bytes(content), tmp_path)
    assert library or not ours


@HYPOTHESIS
@given(
    entry=st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F16", "F32", "Q7", 5, None]),
            "shape": st.one_of(
                st.lists(st.one_of(st.integers(-2, 2**40), st.floats(), st.text()), max_size=3), st.none()
            ),
            "data_offsets": st.one_of(st.lists(st.integers(-5, 2**70), max_size=3), st.text(), st.none()),
        },
    )
)
def test_headers_with_wrong_entries(entry: dict[str, object], tmp_path: Path) -> None:
    header = json.dumps({"a": entry}).encode()
    library, ours = judged(struct.pack("<Q", len(header)) + header + bytes(8), tmp_path)
    assert library or not ours
