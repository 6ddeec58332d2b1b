"""Qwen2.5-VL's configuration and processor files in every form that transformers 4.49 to 5 and others have written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import Qwen2_5_VLConfig

from btp_export.families import family_for
from btp_export.model.open_model import open_model
from btp_export.model.prompting import Prompter
from graphs.building.rope import rope_tables
from graphs.files.checkpoint import open_checkpoint
from graphs.records.errors import InputError
from tests.btp_export.families.qwen import make_qwen

Config = dict[str, Any]
FAMILY = family_for({"model_type": "qwen2_5_vl"})
WHOLE = ("architectures", "model_type", "vision_config", "torch_dtype", "dtype", "transformers_version")
IDS = {"vision_start_token_id": 303, "vision_end_token_id": 304, "vision_token_id": 305}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the flat configuration of transformers 4.49."""
    folder = tmp_path_factory.mktemp("qwen") / "model"
    make_qwen(folder)
    return folder


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "model"))


def edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    document = change(json.loads(path.read_text()))
    path.write_text(json.dumps(document))
    return document


def decoder_part(config: Config) -> Config:
    """What transformers 4.52 moves into text_config: all but the tower, and the ids of the whole model too."""
    own = {key: value for key, value in config.items() if key not in WHOLE}
    ids = {key: config.get(key) for key in ("image_token_id", "video_token_id")}
    rope = {"rope_scaling": {**config["rope_scaling"], "type": "default", "rope_type": "default"}}
    return own | IDS | dict.fromkeys(ids) | rope | {"model_type": "qwen2_5_vl_text", "torch_dtype": "float32"}


def nested(config: Config) -> Config:
    kept = (*WHOLE, "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {key: value for key, value in config.items() if key in kept} | {"text_config": decoder_part(config)}


def both(config: Config) -> Config:
    """As transformers 4.52 to 4.55 saved it: flat settings beside the nested ones."""
    return config | IDS | {"text_config": decoder_part(config)}


def untyped(config: Config) -> Config:
    form = nested(config)
    del form["text_config"]["model_type"]
    return form


def today(config: Config) -> Config:
    """rope_parameters, layer_types and dtype, as transformers 5 has them."""
    form = nested(config)
    text = {key: value for key, value in form["text_config"].items() if key not in IDS}
    section = text.pop("rope_scaling")["mrope_section"]
    text["rope_parameters"] = {
        "rope_type": "default", "rope_theta": text.pop("rope_theta"), "mrope_section": section,
    }  # fmt: skip
    text |= {"layer_types": ["full_attention"] * text["num_hidden_layers"], "dtype": "float32"}
    vision = form["vision_config"] | {"model_type": "qwen2_5_vl_vision", "dtype": "float32"}
    return form | {"text_config": text, "vision_config": vision, "dtype": "float32"}


def with_foreign_keys(config: Config) -> Config:
    form = both(config)
    foreign = {
        "unsloth_fixed": True, "unsloth_version": "2025.6.1", "transformers.js_config": {"dtype": "q4"},
        "name_or_path": "somebody/a-model", "_name_or_path": "somebody/a-model",
        "torch_dtype": "float32", "dtype": "float32", "vision_token_id": 305,
    }  # fmt: skip
    form["text_config"] |= {"unsloth_fixed": True, "_name_or_path": "somebody/a-model"}
    form["vision_config"] |= {"in_chans": 3, "spatial_patch_size": 14, "model_type": "qwen2_5_vl"}
    return form | foreign


@pytest.mark.parametrize("form", [nested, both, untyped, today, with_foreign_keys])
def test_every_form_of_the_configuration_is_the_same_model(
    form: Callable[[Config], Config], folder: Path, published: Path
) -> None:
    flat = open_model(str(published))
    document = edit(folder / "config.json", form)
    model = open_model(str(folder))
    same = {"name": "", "weight_dtype": "float32"}
    assert model.spec.model_copy(update=same) == flat.spec.model_copy(update=same)
    theirs = Qwen2_5_VLConfig.from_dict(document)
    assert theirs.text_config.rope_parameters["mrope_section"] == [2, 3, 3]
    assert model.spec.decoder.num_layers == theirs.text_config.num_hidden_layers
    for mine, other in zip(rope_tables(document, 40), rope_tables(flat.checkpoint.config, 40), strict=True):
        np.testing.assert_array_equal(mine, other)
    size = (112, 112)
    pixels = np.random.default_rng(0).standard_normal((64, 1176)).astype(np.float32)
    import torch

    mine, other = (one.family.vision_module(one.checkpoint, size)(torch.from_numpy(pixels)) for one in (model, flat))
    assert torch.equal(mine, other)


@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
def test_unknown_settings_are_still_refused(part: str | None, folder: Path) -> None:
    def change(config: Config) -> Config:
        form = nested(config)
        (form if part is None else form[part])["new_scaling"] = 0.5
        return form

    edit(folder / "config.json", change)
    with pytest.raises(InputError, match="new_scaling"):
        FAMILY.spec(open_checkpoint(folder, FAMILY.renames), "test")


BOUNDS = {"min_pixels": 28 * 28 * 2, "max_pixels": 28 * 28 * 64}
EDGES = {"shortest_edge": 28 * 28 * 2, "longest_edge": 28 * 28 * 64}
NO_BOUNDS = {"min_pixels": None, "max_pixels": None}


@pytest.mark.parametrize(
    "changes",
    [
        {"image_processor_type": "Qwen2_5_VLImageProcessor"},
        {"image_processor_type": "Qwen2_5_VLImageProcessorFast"},
        {"image_processor_type": "Qwen2VLImageProcessorFast"},
        {"size": EDGES},
        {"size": BOUNDS},
        NO_BOUNDS | {"size": EDGES},
        NO_BOUNDS | {"size": BOUNDS},
        NO_BOUNDS | {"size": EDGES | NO_BOUNDS, "image_processor_type": "Qwen2_5_VLImageProcessor"},
    ],
)
def test_every_form_of_the_image_processor(changes: Config, folder: Path, published: Path) -> None:
    picture = Image.effect_noise((170, 230), 60).convert("RGB")
    wanted = Prompter(published, open_model(str(published)).spec).encode([picture], ["what color?"])
    before = edit(folder / "preprocessor_config.json", lambda document: document | changes)
    model = open_model(str(folder))
    assert model.spec.vision.pixel_range == (28 * 28 * 2, 28 * 28 * 64)
    got = Prompter(folder, model.spec).encode([picture], ["what color?"])
    np.testing.assert_array_equal(got.input_ids[0], wanted.input_ids[0])
    np.testing.assert_array_equal(got.pixel_values, wanted.pixel_values)
    assert json.loads((folder / "preprocessor_config.json").read_text()) == before, "the user's file is not touched"


def test_no_bounds_at_all_are_those_of_transformers(folder: Path) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    edit(folder / "preprocessor_config.json", lambda document: document | NO_BOUNDS)
    own = Qwen2VLImageProcessorPil().size
    assert open_model(str(folder)).spec.vision.pixel_range == (own["shortest_edge"], own["longest_edge"])


def test_an_image_processor_that_is_not_known_is_named(folder: Path) -> None:
    edit(folder / "preprocessor_config.json", lambda document: document | {"image_processor_type": "MadeUp"})
    with pytest.raises(InputError, match="no usable image processor"):
        open_model(str(folder))


# -- special tokens as text in a prompt -------------------------------------------------------------------------------


@pytest.mark.parametrize(("token", "meaning"), [("<|image_pad|>", "a picture"), ("<|video_pad|>", "a video")])
def test_placeholders_in_a_prompt_are_refused(token: str, meaning: str, published: Path) -> None:
    prompter = Prompter(published, open_model(str(published)).spec)
    picture = Image.new("RGB", (112, 112))
    with pytest.raises(InputError, match=f"stands for {meaning}") as caught:
        prompter.encode([picture], [f"what is {token}?"])
    assert len(caught.value.lines()) == 3
    raw = prompter.text("what?").replace("what?", token)
    with pytest.raises(InputError):
        prompter.encode([picture], [raw], raw=True)


@pytest.mark.parametrize(
    "token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|vision_start|>", "<image>", "</s>"]
)
def test_other_special_tokens_in_a_prompt_are_those_tokens(token: str, published: Path) -> None:
    """As in transformers, whose tokenizer reads them in any text; what is no token of this model is text."""
    from transformers import AutoTokenizer

    prompter = Prompter(published, open_model(str(published)).spec)
    encoded = prompter.encode([Image.new("RGB", (112, 112))], [f"say {token} twice"])
    tokenizer = AutoTokenizer.from_pretrained(published)
    after = prompter.text(f"say {token} twice").split("<|image_pad|>")[1]
    assert encoded.input_ids[0][-encoded.text_lengths[0] :].tolist() == tokenizer(after)["input_ids"]
