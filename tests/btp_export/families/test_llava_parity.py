"""LLaVA-1.5: the whole pipeline against transformers' own model, for plans with and without pruning."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from graphs.files.bundle import Bundle
from tests.btp_export.families import parity
from tests.btp_export.families.parity import Subject


def make_llava(demo: Path, folder: Path, *, side: int = 24, patch: int = 4, **text: Any) -> Path:
    """A random LLaVA-1.5 with 6 x 6 patches; `text` changes its decoder."""
    fields = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 256, "vocab_size": parity.WORDS, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "model_type": "llama", "rms_norm_eps": 1e-5,
    } | text  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": side, "patch_size": patch, "projection_dim": 32, "model_type": "clip_vision_model",
    }  # fmt: skip
    config = LlavaConfig(text_config=fields, vision_config=vision, image_token_index=4)
    torch.manual_seed(2)
    model = parity.random_weights(LlavaForConditionalGeneration(config), seed=2)
    processor = {
        "processor_class": "LlavaProcessor", "patch_size": patch, "image_token": "<image>",
        "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default",
        "image_processor": {
            "image_processor_type": "CLIPImageProcessor", "crop_size": {"height": side, "width": side},
            "size": {"shortest_edge": side}, "image_mean": [0.35] * 3, "image_std": [0.25] * 3, "resample": 3,
        },
    }  # fmt: skip
    parity.save(model, demo, folder, processor)
    return folder


def subject_of(folder: Path) -> Subject:
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return Subject(folder, model, AutoProcessor.from_pretrained(folder))


@pytest.fixture(scope="module")
def subject(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject_of(make_llava(demo_checkpoint, tmp_path_factory.mktemp("llava") / "model"))


@pytest.fixture(scope="module")
def bundle(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("llava") / "bundle"
    return parity.export(subject.folder, out, profiles=("batch=1", "batch=2"))


def some_pictures() -> list[Image.Image]:
    """Of any size: they are all scaled to the model's."""
    return [parity.picture(24, 24, seed=1), parity.picture(50, 31, seed=2), parity.picture(20, 70, seed=3)]


@pytest.mark.parametrize("profile", ["b1-24x24-t16-n8", "b2-24x24-t16-n8"])
def test_unpruned_it_is_model_generate(profile: str, subject: Subject, bundle: Bundle) -> None:
    answers = parity.check_unpruned(subject, parity.open_bundle(bundle, profile), some_pictures())
    assert len({tuple(tokens) for tokens in answers}) > 1, "the answers should differ, or little is shown"


@pytest.mark.parametrize("profile", ["b1-24x24-t16-n8", "b2-24x24-t16-n8"])
@pytest.mark.parametrize("preset", ["btp-paper", "fastv"])
def test_pruned_it_is_transformers_layers_with_selection_between(
    preset: str, profile: str, subject: Subject, bundle: Bundle, tmp_path: Path
) -> None:
    derived = parity.with_preset(bundle, preset, tmp_path / "bundle")
    parity.check_pruned(subject, parity.open_bundle(derived, profile), some_pictures())


@pytest.mark.parametrize("preset", parity.PRESETS)
def test_every_graph_verifies(preset: str, bundle: Bundle, tmp_path: Path) -> None:
    derived = parity.with_preset(bundle, preset, tmp_path / "bundle")
    for profile in parity.profiles_of(derived):
        parity.check_verified(derived, profile)


def test_real_heads_and_rotary_settings(demo_checkpoint: Path, tmp_path: Path) -> None:
    """Heads of 128 with Vicuna's rotary base, norms and positions, 336 pixels in patches of 14: V = 576.

    8 of the 7B\'s 32: how many there are decides nothing but time.
    """
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 256}
    vicuna = {"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    folder = make_llava(demo_checkpoint, tmp_path / "model", side=336, patch=14, num_hidden_layers=3, **heads, **vicuna)
    subject = subject_of(folder)
    bundle = parity.export(folder, tmp_path / "bundle", new_tokens=4)
    assert bundle.profile().image_tokens == 576
    parity.check_unpruned(subject, parity.open_bundle(bundle, bundle.profile().name), [parity.picture(336, 336)])
    pruned = parity.with_preset(bundle, "btp-paper", tmp_path / "pruned")
    parity.check_verified(pruned, bundle.profile().name, samples=1)
