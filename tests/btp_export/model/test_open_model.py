"""What a user may call a model, and what is said when it cannot be had."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from btp_export import cli
from btp_export.families import known_models
from btp_export.model.open_model import find_model, open_model
from graphs.records.errors import InputError, UnavailableError
from tests.btp_export.families.qwen import make_qwen
from tests.btp_export.families.test_llava_next import make_next


def test_demo_is_there_and_named() -> None:
    model = open_model("demo")
    assert (model.source.origin, model.spec.name, model.spec.model_type) == ("demo", "demo", "llava")
    assert {"config.json", "tokenizer.json"} <= {path.name for path in model.processor_files}


def test_a_local_folder_is_named_without_its_path(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_model(str(tiny_checkpoint))
    assert (source.name, source.origin) == (tiny_checkpoint.name,) * 2 and not source.is_demo
    monkeypatch.chdir(tiny_checkpoint)
    assert find_model(".").folder == tiny_checkpoint


def test_a_folder_called_demo_does_not_hide_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_model("demo").is_demo
    assert not find_model("./demo").is_demo


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("lava-1.5-7b", "--model llava-1.5-7b"), ("LLaVA-1.5-13B", "--model llava-1.5-13b"), ("demo2", "--model demo"),
        ("zzz", "--model demo"), ("", "--model demo"), ("./no/where", "--model demo"), ("a/b/c", "--model demo"),
    ],
)  # fmt: skip
def test_unknown_names_get_close_ones(name: str, advice: str) -> None:
    with pytest.raises(InputError, match="no model is called") as caught:
        find_model(name)
    assert caught.value.do.startswith(advice)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="is a file"):
        find_model(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", [*known_models(), "somebody/something"])
def test_without_a_network_it_says_what_to_put_where(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnavailableError) as caught:
        find_model(name)
    repository = known_models()[name].repository if name in known_models() else name
    assert repository in caught.value.got and "config.json" in caught.value.wanted
    assert "--model FOLDER" in caught.value.do


def test_a_family_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(InputError, match="model type 'blip'"):
        open_model(str(tmp_path))


def test_two_sets_of_weights_that_disagree_are_both_named(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """model.safetensors is what transformers loads; a part of the model in it is not the model."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_model(str(folder)).checkpoint.shards == ("model.safetensors",)
    half = {name: tensor for name, tensor in tensors.items() if "layers.3." not in name}
    save_file(half, folder / "model.safetensors")
    assert cli.main(["export", "--model", str(folder), "--plan", "none", "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) <= 3 and "layers.3." in lines[0]
    assert "model.safetensors is what transformers loads" in lines[0] and "model.safetensors.index.json" in lines[0]
    (folder / "model.safetensors").unlink()
    assert open_model(str(folder)).checkpoint.shards == ("model-00001-of-00001.safetensors",)


@pytest.mark.parametrize("kind", ["llava", "llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("change", ["missing", "shape"])
def test_weights_of_the_tower_are_looked_for_when_a_model_is_opened(
    tiny_checkpoint: Path, demo_checkpoint: Path, tmp_path: Path, kind: str, change: str
) -> None:
    """By their headers alone, in every family; two sets of weights are both named."""
    folder = tmp_path / "model"
    if kind == "llava":
        shutil.copytree(tiny_checkpoint, folder)
    elif kind == "llava_next":
        make_next(demo_checkpoint, folder)
    else:
        make_qwen(folder)
    whole = {name: array for path in folder.glob("*.safetensors") for name, array in load_file(path).items()}
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        path.unlink()
    save_file(whole, folder / "model.safetensors")
    open_model(str(folder))
    tower = "visual." if kind == "qwen2_5_vl" else "vision_tower."
    chosen = next(name for name in sorted(whole) if tower in name and name.endswith("weight"))
    if change == "missing":
        del whole[chosen]
    else:
        whole[chosen] = np.concatenate([whole[chosen]] * 2)
    save_file(whole, folder / "model.safetensors")
    with pytest.raises(InputError, match="1 vision tensors do not fit"):
        open_model(str(folder))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(InputError, match=r"model\.safetensors is what transformers loads; .*index\.json beside it"):
        open_model(str(folder))


def test_an_adapter_is_to_be_merged_first(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alone, and in a folder with a whole model, where transformers would put it on its base."""
    record = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "somebody/a-base"})
    for folder in (tmp_path / "adapter", Path(shutil.copytree(tiny_checkpoint, tmp_path / "both"))):
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(record)
        (folder / "adapter_model.safetensors").write_bytes(b"")
        assert cli.main(["export", "--model", str(folder), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert "is an adapter of somebody/a-base" in error and "merge it first" in error
        assert len(error.strip().splitlines()) <= 3


def test_an_address_is_no_name_of_a_model() -> None:
    with pytest.raises(InputError, match="is an address") as caught:
        open_model("https://huggingface.co/llava-hf/llava-1.5-7b-hf/tree/main")
    assert caught.value.do == "--model llava-hf/llava-1.5-7b-hf"
    with pytest.raises(InputError, match="is an address"):
        open_model("https://example.com/model.tar.gz")


def test_a_folder_with_tokenizer_model_only_names_what_reads_it(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers' own error speaks of tiktoken too, which does not read these files."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"pieces")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # as where it is not installed
    assert cli.main(["export", "--model", str(folder), "--plan", "none", "--out", str(tmp_path / "out")]) == 3
    error = capsys.readouterr().err
    assert "pip install sentencepiece" in error and "tiktoken" not in error
    assert len(error.strip().splitlines()) <= 3
