"""Dummy checkpoints: real shapes and ids, sound values, the same bytes each time, and never mistaken for real ones."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import LlavaConfig, LlavaForConditionalGeneration

from btp_export import cli
from btp_export.dummy.checkpoints import configured, dummy_checkpoint, read_marker, tensor_bits, tensor_shapes
from btp_export.dummy.processor import save_processor
from btp_export.families import llava
from btp_export.families._processor import load_processor
from btp_export.model.open_model import DummyWeights, open_model
from graphs import dtypes
from graphs.files.bundle import Bundle
from graphs.files.packed_weights import packed_linear, read_matrix
from graphs.records.errors import InputError
from graphs.records.manifest import DUMMY_WEIGHTS

SMALL_TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
SMALL_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_VISION |= {"image_size": 84}
SHARD_BYTES = 3_000_000  # several files


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """llava-1.5-7b with few and narrow layers, made in the cache folder that is given back."""
    config = json.loads(json.dumps(llava.FAMILY.models[0].config))
    config["text_config"] |= SMALL_TEXT | {"num_hidden_layers": 6}
    config["vision_config"] |= SMALL_VISION
    config["image_seq_length"] = 36
    model = replace(llava.FAMILY.models[0], config=config)
    monkeypatch.setattr(llava.FAMILY, "models", (model, *llava.FAMILY.models[1:]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "btp-export" / "dummy"


@pytest.mark.parametrize(
    ("model", "billions", "tensors"),
    [
        ("llava-1.5-7b", 7.06, 686),
        ("llava-1.5-13b", 13.35, 758),
        ("llava-1.6-7b", 7.06, 687),
        ("qwen2.5-vl-7b", 8.29, 729),
    ],
)
def test_the_shapes_are_the_published_ones(model: str, billions: float, tensors: int) -> None:
    """Parameters as the models' pages give them."""
    shapes = tensor_shapes(configured(model)[0])
    assert round(sum(int(np.prod(shape)) for shape in shapes.values()) / 1e9, 2) == billions
    assert len(shapes) == tensors
    vocabulary = {"qwen2.5-vl-7b": 152064}.get(model, 32064)
    assert shapes["lm_head.weight"][0] == vocabulary


@pytest.mark.parametrize(
    ("model", "prefix", "image_token", "eos"),
    [("llava-1.5-7b", 35, 32000, 2), ("llava-1.6-7b", 35, 32000, 2), ("qwen2.5-vl-7b", 15, 151655, 151645)],
)
def test_the_processor_puts_the_picture_where_the_real_one_does(
    model: str, prefix: int, image_token: int, eos: int, tmp_path: Path
) -> None:
    config, _ = configured(model)
    save_processor(config, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    processor = load_processor(tmp_path)
    content = [{"type": "image"}, {"type": "text", "text": "What is there?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    ids = processor.tokenizer(text)["input_ids"]
    assert ids.index(image_token) == prefix and processor.tokenizer.eos_token_id == eos
    assert processor.tokenizer.convert_tokens_to_ids(processor.image_token) == image_token
    assert (
        processor.tokenizer.unk_token_id
        not in processor.tokenizer("Xylophone, zebra! 42", add_special_tokens=False)["input_ids"]
    )
    size = config["text_config"]["vocab_size"]
    assert len(processor.tokenizer) == size, "every id has a text"
    assert processor.tokenizer.decode([size - 1]).strip()


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_values_are_sound_and_repeat(kind: str) -> None:
    name, shape = "model.language_model.layers.3.mlp.up_proj.weight", (300, 4096)

    def values(seed: int = 0, name: str = name) -> np.ndarray:
        return np.concatenate(list(tensor_bits(name, shape, kind, seed))).view(dtypes.numpy_of(kind)).astype(np.float32)

    first = values()
    assert np.isfinite(first).all() and abs(first.mean()) < 1e-4
    assert 0.5 < first.std() * 64 < 2  # one over the root of 4096 inputs, within the nearest power of two
    magnitudes = np.abs(first)
    assert magnitudes.max() / magnitudes.min() <= 2.0
    np.testing.assert_array_equal(first, values())
    assert not np.array_equal(first, values(seed=1)) and not np.array_equal(first, values(name=name + "2"))
    norm = np.concatenate(list(tensor_bits("model.norm.weight", (8,), kind, 0))).view(dtypes.numpy_of(kind))
    assert (norm.astype(np.float32) == 1).all()


def test_the_bytes_never_change() -> None:
    """Pinned: a seed means the same weights on every machine and in every version."""
    bits = np.concatenate(list(tensor_bits("model.a.weight", (16, 16), "float16", 0)))
    assert hashlib.sha256(bits.astype("<u2").tobytes()).hexdigest()[:16] == "25ac25eefcefac0d"


def test_a_checkpoint_is_whole_sharded_and_used_again(small: Path) -> None:
    folder = dummy_checkpoint("llava-1.5-7b", shard_bytes=SHARD_BYTES)
    assert folder == small / "llava-1.5-7b-seed0"
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    names: set[str] = set()
    for shard in shards:
        with safe_open(shard, "np") as opened:  # the library's own reader
            names |= set(opened.keys())
    wanted = LlavaForConditionalGeneration(LlavaConfig.from_dict(json.loads((folder / "config.json").read_text())))
    assert names == set(wanted.state_dict())
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert dummy_checkpoint("llava-1.5-7b") == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert not list(small.glob(".*"))


def test_an_interrupted_one_goes_on(small: Path) -> None:
    whole = dummy_checkpoint("llava-1.5-7b", root=small / "whole", shard_bytes=SHARD_BYTES)

    class Stop(Exception):
        pass

    def stop(done: int, total: int, text: str = "") -> None:
        if done * 3 > total:
            raise Stop

    with pytest.raises(Stop):
        dummy_checkpoint("llava-1.5-7b", report=stop, shard_bytes=SHARD_BYTES)
    (partial,) = small.glob(".*.partial")
    kept = sorted(path.name for path in partial.glob("*.safetensors"))
    assert kept and not (small / "llava-1.5-7b-seed0").exists()
    written = (partial / kept[0]).stat().st_mtime_ns
    built = dummy_checkpoint("llava-1.5-7b", shard_bytes=SHARD_BYTES)
    assert (built / kept[0]).stat().st_mtime_ns == written, "a finished shard is not made again"
    for path in whole.iterdir():
        assert path.read_bytes() == (built / path.name).read_bytes(), path.name


def test_activations_stay_finite_in_half_precision(small: Path) -> None:
    """With the real widths of a layer, and as many layers as the 13B has."""
    from calibrate.reference.records import ReferenceInput
    from calibrate.reference.streamed_model import StreamedReference

    model = open_model("llava-1.5-7b", DummyWeights())
    ids = torch.tensor([1, *range(100, 134), *[32000] * 36, 200, 201])
    features = torch.randn(36, 64, generator=torch.Generator().manual_seed(0))
    plan = dict(model_type="llava", num_layers=6, image_tokens=36, grid=(6, 6))
    from graphs.records.plan import PruningPlan

    run = StreamedReference(model.checkpoint, dtype=torch.float16).run(
        [ReferenceInput(ids, features)], PruningPlan(**plan), record_segments=True
    )[0]
    hidden = run.segments[0].hidden_out
    assert np.isfinite(run.logits).all() and 0.1 < hidden.std() < 50
    assert run.logits.std() > 0.1, "answers have preferences"


def test_no_disk_no_file(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"dummy checkpoint of llava-1.5-7b needs .* has 0.0 MiB free"):
        dummy_checkpoint("llava-1.5-7b")
    assert not list(small.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [("demo", {}, "--dummy-weights for 'demo'"), ("llava-1.5-7b", {"layers": 0}, "--dummy-layers 0"),
     ("llava-1.5-7b", {"layers": 33}, "--dummy-layers 33"), ("llava-1.5-7b", {"seed": -1}, "seed -1")],
)  # fmt: skip
def test_bad_input(name: str, options: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=complaint):
        dummy_checkpoint(name, root=tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_everything_says_that_the_weights_are_made_up(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    command = ["export", "--model", "llava-1.5-7b", "--dummy-weights", "--dummy-layers", "3", "--plan", "none"]
    assert cli.main([*command, "--out", str(out), "--text-tokens", "48", "--max-new-tokens", "4"]) == 0
    shown = capsys.readouterr()
    assert DUMMY_WEIGHTS in shown.out and DUMMY_WEIGHTS in shown.err
    record = Bundle.open(out).manifest.model
    assert record.dummy_weights and record.source == (
        "dummy weights in the shapes of llava-1.5-7b, seed 0, 3 of 6 decoder layers"
    )
    assert str(small) not in (out / "manifest.json").read_text()
    assert read_marker(out / "processor") is not None, "the bundle's own checkpoint is known as one too"
    assert cli.main(["verify", str(out), "--samples", "1", "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dummy_weights"] is True
    assert cli.main(["bench", str(out), "--rounds", "1", "--threads", "1"]) == 0
    assert DUMMY_WEIGHTS in capsys.readouterr().out
    picture = tmp_path / "picture.png"
    from PIL import Image

    Image.new("RGB", (90, 90), "red").save(picture)
    assert cli.main(["run", str(out), "--image", str(picture), "--prompt", "What is there?", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dummy_weights"] is True
    folder = small / "llava-1.5-7b-seed0-3-layers"
    assert open_model(str(folder)).source.is_dummy, "given as a folder it is still known"


def test_options_that_go_with_it_need_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "--model", "demo", "--dummy-layers", "2"]) == 2
    assert "without --dummy-weights" in capsys.readouterr().err


def test_codes_of_four_bits_open_as_packed_weights_of_the_same_spread(small: Path) -> None:
    folder = dummy_checkpoint("llava-1.5-7b", group=32)
    assert folder == small / "llava-1.5-7b-seed0-int4-g32"
    model = open_model(str(folder))
    assert model.source.is_dummy and model.checkpoint.quantization is not None
    plain = open_model(str(dummy_checkpoint("llava-1.5-7b")))
    for kind in ("self_attn.q_proj", "mlp.down_proj"):
        module = f"language_model.layers.0.{kind}"
        packed = packed_linear(model.checkpoint, module)
        weight = plain.checkpoint[f"{module}.weight"].read().astype(np.float64)
        assert packed is not None and (packed.n, packed.k) == weight.shape
        read = read_matrix(model.checkpoint, module).astype(np.float64)
        assert 0.4 < read.std() / weight.std() < 2.5
    assert "language_model.layers.0.input_layernorm.weight" in model.checkpoint.tensors


def test_a_group_that_fits_no_row_is_refused(small: Path) -> None:
    with pytest.raises(InputError, match="groups of 48"):
        dummy_checkpoint("llava-1.5-7b", group=48)
    assert not small.exists() or not list(small.iterdir())
