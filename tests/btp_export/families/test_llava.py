import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from btp_export.demo import checkpoint_path
from btp_export.families import family_for, known_families
from graphs.files.checkpoint import open_checkpoint, read_config
from graphs.records.errors import InputError
from graphs.records.generation import GenerationSettings
from tests.graphs.models import DECODERS, PREFIX, sample_model

FAMILY = family_for({"model_type": "llava"})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def folder(models, tmp_path):
    """A checkpoint that the test may change."""
    sample = sample_model("llama", models)
    return shutil.copytree(sample.checkpoint.folder, tmp_path / "model")


def change_config(folder, part=None, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config if part is None else config[part]).update(changes)
    path.write_text(json.dumps(config))


def spec_of(folder):
    return FAMILY.spec(open_checkpoint(folder, FAMILY.renames), "test")


def test_registry_is_the_files_and_names_them_when_it_refuses():
    assert "llava" in known_families()
    with pytest.raises(InputError, match="'blip'") as error:
        family_for({"model_type": "blip"})
    assert "llava" in str(error.value)
    for config in ({}, {"model_type": None}, {"model_type": "_decoder"}, {"model_type": "../llava"}):
        with pytest.raises(InputError):
            family_for(config)


@pytest.mark.parametrize("decoder", DECODERS)
def test_spec_says_what_transformers_configuration_says(decoder, models):
    sample = sample_model(decoder, models)
    spec, text = sample.spec, sample.module.config.text_config
    attention = sample.module.model.language_model.layers[0].self_attn
    assert spec.decoder.num_layers == text.num_hidden_layers
    assert spec.decoder.head_dim == attention.head_dim
    assert spec.decoder.num_kv_heads == text.num_key_value_heads
    assert spec.decoder.qkv_bias == (attention.q_proj.bias is not None)
    assert spec.decoder.o_bias == (attention.o_proj.bias is not None)
    assert spec.decoder.tie_word_embeddings == sample.module.config.tie_word_embeddings
    assert spec.vision.image_size == (16, 16)
    assert spec.vision.grid == (4, 4)
    assert spec.prefix_tokens == PREFIX
    assert spec.weight_dtype == "float32"
    assert spec.change_threshold == 0.93


def test_all_published_layouts_give_the_same_tensors(models, folder):
    """transformers 4 (with and without vision_model) and the module names of transformers 5."""
    sample = sample_model("llama", models)
    wanted = sample.checkpoint
    new = {name: value.clone() for name, value in sample.module.state_dict().items()}
    old = {}
    for name, value in new.items():
        name = name.replace("model.language_model.", "language_model.model.")
        name = name.replace("lm_head.", "language_model.lm_head.")
        name = name.replace("model.vision_tower.", "vision_tower.vision_model.").removeprefix("model.")
        old[name] = value
    assert any(name.startswith("vision_tower.vision_model.embeddings") for name in old)
    for layout in (new, old):
        save_file(layout, folder / "model.safetensors")
        checkpoint = open_checkpoint(folder, FAMILY.renames)
        assert set(checkpoint.tensors) == set(wanted.tensors)
        for name in ("lm_head.weight", "language_model.norm.weight", "language_model.layers.4.mlp.up_proj.weight"):
            np.testing.assert_array_equal(checkpoint[name].read(), wanted[name].read())
        FAMILY.vision_module(checkpoint)


def test_vision_module_is_transformers_own(models):
    sample = sample_model("mistral-gqa", models)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    got = FAMILY.vision_module(sample.checkpoint)(pixels)
    wanted = torch.stack(list(sample.module.model.get_image_features(pixel_values=pixels).pooler_output))
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)


def test_the_vision_module_is_float32_whatever_the_configuration_asks_for(folder, models):
    change_config(folder, "vision_config", dtype="float16")
    change_config(folder, dtype="float16")
    module = FAMILY.vision_module(open_checkpoint(folder, FAMILY.renames))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    wanted = FAMILY.vision_module(sample_model("llama", models).checkpoint)
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in module.state_dict().items())


def test_several_feature_layers(folder):
    tensors = load_file(folder / "model.safetensors")
    weight = tensors["multi_modal_projector.linear_1.weight"]
    tensors["multi_modal_projector.linear_1.weight"] = torch.cat([weight, weight * 0.5], 1)
    save_file(tensors, folder / "model.safetensors")
    change_config(folder, vision_feature_layer=[-2, -1])
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    got = FAMILY.vision_module(open_checkpoint(folder, FAMILY.renames))(pixels)
    with torch.no_grad():
        wanted = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layer", [-1, -2, 2, 1, [0]])
def test_layers_of_the_tower_that_nothing_reads_are_left_out(folder, layer):
    change_config(folder, vision_feature_layer=layer)
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    module = FAMILY.vision_module(open_checkpoint(folder, FAMILY.renames))
    states = len(model.model.vision_tower.encoder.layers) + 1
    assert len(module.vision_tower.encoder.layers) == (1 if layer == [0] else layer % states)
    with torch.no_grad():
        wanted = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))
    torch.testing.assert_close(module(pixels), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("text_config", {"hidden_act": "relu"}, "hidden_act"),
        ("text_config", {"model_type": "gemma"}, "gemma decoder"),
        ("text_config", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("text_config", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("text_config", {"residual_multiplier": 0.22}, "residual_multiplier"),
        (None, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (None, {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ("vision_config", {"model_type": "pixtral"}, "pixtral"),
        ("vision_config", {"patch_size": "big"}, "patch_size"),
    ],
)
def test_refuses_what_the_graphs_do_not_compute(part, change, message, folder):
    change_config(folder, part, **change)
    with pytest.raises(InputError, match=message):
        spec_of(folder)


@pytest.mark.parametrize("name", ["self_attn.q_norm.weight", "self_attn.q_proj.bias", "mlp.experts.0.up_proj.weight"])
def test_refuses_tensors_that_the_block_would_ignore(name, folder):
    tensors = load_file(folder / "model.safetensors")
    tensors[f"language_model.model.layers.1.{name}"] = torch.zeros(4)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.1\."):
        spec_of(folder)


def test_refuses_more_layers_than_the_configuration_says(folder):
    change_config(folder, "text_config", num_hidden_layers=4)
    with pytest.raises(InputError, match=r"layers\.4\.") as error:
        spec_of(folder)
    assert "4 layers" in str(error.value)


def test_a_sliding_window_bounds_the_positions(folder):
    change_config(folder, "text_config", model_type="mistral", sliding_window=64)
    assert spec_of(folder).decoder.max_positions == 64


def test_stop_tokens_come_from_the_generation_config_first(folder):
    change_config(folder, "text_config", eos_token_id=9, pad_token_id=None)
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert spec_of(folder).eos_token_ids == (9,)
    assert spec_of(folder).pad_token_id == 9
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8], "pad_token_id": 0}')
    assert spec_of(folder).eos_token_ids == (7, 8)
    assert spec_of(folder).pad_token_id == 0
    for none in ('{"eos_token_id": null}', '{"eos_token_id": []}', "{}"):  # as `generate`: config.json is not asked
        (folder / "generation_config.json").write_text(none)
        assert spec_of(folder).eos_token_ids == ()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ('{"eos_token_id": "</s>"}', "eos_token_id"),
        ('{"repetition_penalty": -1.0}', "repetition_penalty -1.0"),
        ('{"bad_words_ids": [3]}', "bad_words_ids"),
        ('{"suppress_tokens": [1.5]}', "suppress_tokens"),
        ("[]", "no JSON object"),
        ("{", "not JSON"),
    ],
)
def test_generation_settings_that_mean_nothing_are_refused(folder, settings, reason):
    (folder / "generation_config.json").write_text(settings)
    with pytest.raises(InputError, match=reason):
        spec_of(folder)


def test_generation_settings_are_named_where_they_are_not_followed(folder):
    settings = {"do_sample": True, "temperature": 1e-06, "num_beams": 1, "guidance_scale": 1.5}
    (folder / "generation_config.json").write_text(json.dumps(settings | {"sequence_bias": [[[1], -9.5]]}))
    named = spec_of(folder).generation.not_followed
    assert named == ("do_sample=true", "guidance_scale=1.5", "sequence_bias=[[[1], -9.5]]", "temperature=1e-06")
    (folder / "generation_config.json").write_text(
        '{"do_sample": false, "temperature": 0.7, "min_new_tokens": 0, "min_length": 7}'
    )
    assert spec_of(folder).generation == GenerationSettings()


def test_settings_file(folder):
    (folder / "btp.json").write_text('{"prefix_tokens": 5, "change_threshold": 0.975}')
    assert spec_of(folder).change_threshold == 0.975
    assert spec_of(folder).prefix_tokens == 5
    (folder / "btp.json").write_text('{"threshold": 0.975}')
    with pytest.raises(InputError, match="threshold"):
        spec_of(folder)


def test_a_folder_without_processor_files_says_what_is_missing(folder):
    (folder / "btp.json").unlink()
    with pytest.raises(InputError, match="holds no usable processor") as error:
        spec_of(folder)
    assert "prefix_tokens" in str(error.value)


def test_profile(models):
    sample = sample_model("llama", models)
    profile = FAMILY.profile(sample.spec, batch=2, image_size=(16, 16), text_tokens=7, new_tokens=3)
    assert (profile.total_tokens, profile.max_positions) == (PREFIX + 16 + 7, PREFIX + 16 + 7 + 3)
    with pytest.raises(InputError, match="image size 16 x 32"):
        FAMILY.profile(sample.spec, batch=1, image_size=(16, 32), text_tokens=7, new_tokens=3)


def test_damaged_vision_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["multi_modal_projector.linear_2.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"multi_modal_projector\.linear_2\.bias is missing"):
        FAMILY.vision_module(open_checkpoint(folder, FAMILY.renames))


def test_the_demo_model():
    folder = checkpoint_path()
    family = family_for(read_config(folder))
    spec = family.spec(open_checkpoint(folder, family.renames), "demo")
    assert spec.vision.image_tokens == 576
    assert spec.prefix_tokens > 0
    assert spec.weight_dtype == "float16"
