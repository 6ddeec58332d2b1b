"""Checkpoints of other programs open like any other: repacked in the cache folder, with every weight as it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from btp_export.cli import main
from btp_export.exporting import Options, export_bundle
from btp_export.measuring.verify import verify_bundle
from btp_export.model.open_model import open_model
from calibrate.reference.records import ReferenceInput
from calibrate.reference.streamed_model import StreamedReference
from graphs.files.cache_folder import cache_folder
from graphs.files.packed_weights import packed_linear, read_tensor
from graphs.records.errors import InputError
from tests.btp_export.families.qwen import make_qwen
from tests.btp_export.quantised.packers import Layer, draw_layer, pack_awq, pack_compressed, pack_gptq, pack_modelopt
from tests.conftest import unpruned
from tests.packed import is_projection, pack_folder
from tests.plans import PLAN

LEFT = "layers.2.mlp.down_proj"  # stays in 16 bits
WIDER = "layers.1."  # groups of 32; elsewhere 16
Packer = Callable[[Layer], dict[str, np.ndarray]]
Made = tuple[Path, dict[str, Layer], str]  # folder, what its layers are, name of the format

FORMATS: dict[str, tuple[Packer, dict[str, Any] | None, dict[str, Any] | None, bool]] = {
    "awq": (pack_awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}, None, False),
    "gptq": (pack_gptq, {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False}, None, False),
    "compressed-tensors": (
        pack_compressed,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
            "ignore": ["lm_head", "re:.*vision_tower.*"],
        },
        None,
        False,
    ),
    "modelopt": (pack_modelopt, None, {"quant_algo": "W4A16_AWQ", "pre_quant_scale": True}, True),
}


def input_scale(module: str, k: int) -> np.ndarray:
    """What layers that share an input share too; for down powers of two, which the rows of up can take."""
    random = np.random.default_rng(len(module.rpartition(".")[0]) + module.endswith("o_proj"))
    if module.endswith("down_proj"):
        return np.exp2(random.integers(-1, 2, k)).astype(np.float16)
    return random.uniform(0.5, 2, k).astype(np.float16)


def quantise(tiny: Path, folder: Path, name: str) -> dict[str, Layer]:
    """Write the tiny model in that format, its norms too in 16 bits; gives the layers by stored module name."""
    pack, config_fields, file, symmetric = FORMATS[name]
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    layers: dict[str, Layer] = {}
    random = np.random.default_rng(7)
    for stored in [stored for stored in tensors if is_projection(stored) and LEFT not in stored]:
        module = stored.removesuffix(".weight")
        n, k = tensors.pop(stored).shape
        layer = layers[module] = draw_layer(random, n, k, 32 if WIDER in module else 16, symmetric=symmetric)
        if symmetric:
            layer.input_scale = input_scale(module, k)
        tensors |= {f"{module}.{part}": array for part, array in pack(layer).items()}
    norms = [stored for stored in tensors if "layernorm" in stored and "vision" not in stored]
    tensors |= {stored: random.uniform(0.5, 2, tensors[stored].shape).astype(np.float16) for stored in norms}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if config_fields is not None:
        config["quantization_config"] = config_fields
    if file is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": file}))
    (folder / "config.json").write_text(json.dumps(config))
    return layers


@pytest.fixture(scope="module", params=FORMATS)
def made(request: Any, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("foreign") / request.param
    return folder, quantise(tiny_checkpoint, folder, request.param), request.param


def canonical(module: str) -> str:
    return "language_model.layers." + module.rpartition("layers.")[2]


def test_it_opens_as_the_model_it_is(made: Made, tiny_checkpoint: Path) -> None:
    folder, _, name = made
    model, plain = open_model(str(folder)), open_model(str(tiny_checkpoint))
    assert model.spec.model_copy(update={"name": plain.spec.name, "weight_dtype": "float32"}) == plain.spec
    assert model.spec.weight_dtype == "float16"
    assert model.source.origin == folder.name
    record = model.checkpoint.quantization
    assert record is not None
    assert (record.method, record.source) == ("read", name)
    assert record.groups == {16: 34, 32: 7}
    assert record.zeros == (0 if name == "modelopt" else 41)
    assert [path.name for path in model.processor_files] == [path.name for path in plain.processor_files]
    before = {path: path.stat().st_mtime_ns for path in model.checkpoint.files}
    again = open_model(str(folder))
    assert {path: path.stat().st_mtime_ns for path in again.checkpoint.files} == before, "read once"


def test_every_weight_is_as_it_was(made: Made) -> None:
    folder, layers, name = made
    checkpoint = open_model(str(folder)).checkpoint
    source = load_file(folder / "model.safetensors")
    left = read_tensor(checkpoint, f"language_model.{LEFT}.weight")
    np.testing.assert_array_equal(left, next(array for stored, array in source.items() if f"{LEFT}.weight" in stored))
    for module, layer in layers.items():
        linear = packed_linear(checkpoint, canonical(module))
        assert linear is not None
        if name != "modelopt":  # what happens to the scales of its inputs is the next test's
            expected = layer.numbers().astype(np.float32)
            np.testing.assert_array_equal(read_tensor(checkpoint, f"{canonical(module)}.weight"), expected)


def test_the_model_computes_what_the_format_says(made: Made, tmp_path: Path) -> None:
    """Folded scales of inputs included: against the same model with every matrix written out in float32."""
    folder, layers, _ = made
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain, ignore=shutil.ignore_patterns("hf_quant_config.json"))
    tensors = load_file(plain / "model.safetensors")
    for module, layer in layers.items():
        tensors = {stored: array for stored, array in tensors.items() if not stored.startswith(f"{module}.")}
        tensors[f"{module}.weight"] = layer.numbers().astype(np.float32)
    save_file(tensors, plain / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    config.pop("quantization_config", None)
    (plain / "config.json").write_text(json.dumps(config))
    logits = []
    for model in map(open_model, map(str, (folder, plain))):
        ids = torch.tensor([0, *[model.spec.image_token_id] * model.spec.vision.image_tokens, 9, 11])
        features = torch.randn(model.spec.vision.image_tokens, 64, generator=torch.Generator().manual_seed(0))
        run = StreamedReference(model.checkpoint).run([ReferenceInput(ids, features)], unpruned(model.spec))
        logits.append(run[0].logits[0])
    assert logits[1].std() > 0.1
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4, rtol=1e-4)


def test_it_becomes_a_bundle_like_any_other(made: Made, tmp_path: Path) -> None:
    folder, _, name = made
    if name not in ("awq", "modelopt"):  # the others differ in what has been compared already
        pytest.skip("read into the same tensors")
    bundle = export_bundle(open_model(str(folder)), PLAN, tmp_path / "b", Options(text_tokens=16, new_tokens=4))
    result = verify_bundle(bundle, samples=2, tokens=3, threads=1)
    assert result.passed, result.failures
    assert bundle.manifest.quantization is not None
    assert bundle.manifest.quantization.source == name


def test_scales_of_inputs_go_where_nothing_is_lost(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantise(tiny_checkpoint, tmp_path / "model", "modelopt")
    checkpoint = open_model(str(tmp_path / "model")).checkpoint
    left = {name for name in checkpoint.tensors if name.endswith("input_scale")}
    others = {f"language_model.layers.{layer}.self_attn.o_proj.input_scale" for layer in range(6)}
    assert left == others, "two query heads read one row of v and want different scales; the rest is folded"
    assert checkpoint["language_model.layers.0.input_layernorm.weight"].dtype == "F32"


@pytest.mark.parametrize("zero", [False, True])
def test_qwen_as_it_is_published_in_awq(zero: bool, tmp_path: Path) -> None:
    """Shards, a flat configuration, biases of q, k and v (also where all are zero), and the tower left in 16 bits."""
    folder, layers = tmp_path / "model", dict[str, Layer]()
    make_qwen(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for shard in sorted(set(index["weight_map"].values())):
        tensors = load_file(folder / shard)
        for stored in [stored for stored in tensors if stored.startswith("model.layers") and is_projection(stored)]:
            module, (n, k) = stored.removesuffix(".weight"), tensors.pop(stored).shape
            layers[module] = draw_layer(np.random.default_rng(len(layers)), n, k, 32)
            tensors |= {f"{module}.{part}": array for part, array in pack_awq(layers[module]).items()}
        for name in [name for name in tensors if name.endswith("_proj.bias") and zero]:
            tensors[name] = np.zeros_like(tensors[name])
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != shard}
        index["weight_map"] |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = (FORMATS["awq"][1] or {}) | {"modules_to_not_convert": ["visual"], "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    model = open_model(str(folder))
    assert len(layers) == 42
    assert model.checkpoint.quantization is not None
    assert model.checkpoint.quantization.groups == {32: 42}
    assert model.spec.decoder.qkv_bias
    for module, layer in layers.items():
        name = f"{canonical(module)}.weight"
        np.testing.assert_array_equal(read_tensor(model.checkpoint, name), layer.numbers().astype(np.float32))


DAMAGE: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], str]] = {
    "NaN": ("layers.3.mlp.up_proj.scales", lambda s: np.full_like(s, np.nan), r"up_proj.* holds nan"),
    "another model's": (
        "layers.0.self_attn.q_proj",
        lambda array: np.ascontiguousarray(array[:, : array.shape[1] // 2]),
        r"q_proj\.qweight is of a matrix \[32, 64\]",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_nothing_is_left_of_what_cannot_be_read(case: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    part, damage, message = DAMAGE[case]
    quantise(tiny_checkpoint, tmp_path / "model", "awq")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors |= {name: damage(array) for name, array in tensors.items() if part in name and "vision" not in name}
    save_file(tensors, file)
    before = sorted(cache_folder("packed").rglob("*"))
    with pytest.raises(InputError, match=message):
        open_model(str(tmp_path / "model"))
    assert sorted(cache_folder("packed").rglob("*")) == before


@pytest.mark.parametrize(("number", "said"), [(np.nan, "nan"), (np.inf, "inf")])
def test_damaged_scales_of_a_packed_folder_are_found_before_an_export(
    number: float, said: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """They are linked into the bundle as they are, and would be found by what runs it."""
    pack_folder(tiny_checkpoint, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    (name,) = (name for name in tensors if name.endswith("layers.3.mlp.up_proj.scales"))
    tensors[name][5, 1] = number
    save_file(tensors, file)
    model = open_model(str(tmp_path / "model"))
    with pytest.raises(InputError, match=rf"model\.safetensors: .*up_proj\.scales holds {said} at \[5, 1\]"):
        export_bundle(model, unpruned(model.spec), tmp_path / "bundle", Options())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_quantised_head_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantise(tiny_checkpoint, tmp_path / "model", "awq")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    head = next(name for name in tensors if name.endswith("lm_head.weight"))
    module, layer = head.removesuffix(".weight"), draw_layer(np.random.default_rng(0), 64, 64, 16)
    tensors = {name: array for name, array in tensors.items() if name != head}
    tensors |= {f"{module}.{name}": array for name, array in pack_awq(layer).items()}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head\..* is quantised"):
        open_model(str(tmp_path / "model"))


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def says_text_config(folder: Path) -> None:
    def move(config: dict[str, Any]) -> None:
        config["text_config"]["quantization_config"] = config.pop("quantization_config")

    change_config(folder, move)


def says_file_beside(folder: Path) -> None:
    """As AutoAWQ wrote it at first, in words of its own."""
    change_config(folder, lambda config: config.pop("quantization_config"))
    fields = {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("say", [says_text_config, says_file_beside])
def test_settings_in_other_places_are_found(say: Callable[[Path], None], tiny_checkpoint: Path, tmp_path: Path) -> None:
    layers = quantise(tiny_checkpoint, tmp_path / "model", "awq")
    say(tmp_path / "model")
    checkpoint = open_model(str(tmp_path / "model")).checkpoint
    module, layer = next(iter(layers.items()))
    weight = read_tensor(checkpoint, f"{canonical(module)}.weight")
    np.testing.assert_array_equal(weight, layer.numbers().astype(np.float32))


def test_a_file_beside_is_of_the_method_that_its_words_are_of(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    quantise(tiny_checkpoint, folder, "gptq")
    change_config(folder, lambda config: config.pop("quantization_config"))
    with pytest.raises(InputError, match=r"\.(qzeros|g_idx) is of quantised weights, of which config\.json says noth"):
        open_model(str(folder))
    file = folder / "quantize_config.json"
    file.write_text(json.dumps({"bits": 8, "group_size": 16, "desc_act": False}))
    with pytest.raises(InputError, match="GPTQ: bits is 8"):
        open_model(str(folder))
    file.write_text(json.dumps({"bits": 4, "group_size": 16, "desc_act": False}))
    first = open_model(str(folder)).checkpoint
    assert first.quantization is not None
    assert first.quantization.source == "gptq"
    file.write_text(json.dumps({"bits": 4, "checkpoint_format": "gptq_v2"}))
    weight = "language_model.layers.0.mlp.up_proj.weight"
    second = read_tensor(open_model(str(folder)).checkpoint, weight)
    assert (second != read_tensor(first, weight)).any(), "settings decide what is read, so they are part of its key"


def test_a_file_beside_full_weights_is_left_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (tmp_path / "model" / "quantize_config.json").write_text(json.dumps({"bits": 4}))
    assert open_model(str(tmp_path / "model")).checkpoint.quantization is None


@pytest.mark.parametrize("value", [0, 1])
def test_biases_that_autogptq_added_are_left_out_where_they_are_zero(
    value: int, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    layers = quantise(tiny_checkpoint, tmp_path / "model", "gptq")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors |= {f"{module}.bias": np.zeros(len(layer.codes), np.float16) for module, layer in layers.items()}
    tensors[next(name for name in tensors if name.endswith("layers.4.mlp.down_proj.bias"))][3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    if value:
        with pytest.raises(InputError, match=r"down_proj\.bias"):
            open_model(str(tmp_path / "model"))
    else:
        names = open_model(str(tmp_path / "model")).checkpoint.tensors
        assert not [name for name in names if name.endswith("_proj.bias") and "vision" not in name]


def test_codes_are_not_read_to_be_refused(tiny_checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    quantise(tiny_checkpoint, tmp_path / "model", "awq")
    before = sorted(cache_folder("packed").rglob("*"))
    for command in (["export"], []):
        arguments = [*command, "--model", str(tmp_path / "model"), "--plan", "none", "--out", str(tmp_path / "b")]
        assert main([*arguments, "--weights", "int4-g32"]) == 2
        assert "--weights int4-g32, but model has four-bit weights already (read, awq)" in capsys.readouterr().err
    assert sorted(cache_folder("packed").rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_settings_without_codes_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="says it is awq, but holds no qweight"):
        open_model(str(folder))
    with pytest.raises(InputError, match="is a GGUF file"):
        open_model(str(tmp_path / "model-Q4_K_M.gguf"))
