"""Qwen2.5-VL: the whole pipeline against transformers' own model, for plans with and without pruning."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from btp_export.exporting import Options, export_bundle
from btp_export.families import family_for
from btp_export.families._processor import load_processor
from btp_export.model.open_model import open_model
from calibrate.place.presets import preset
from graphs.building.derived_bundles import derive
from graphs.building.vision_capture import VISION_FILE
from graphs.files.bundle import Bundle
from graphs.files.checkpoint import open_tensors
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan, Stage
from tests.btp_export.families.parity import (
    PRESETS,
    PROMPTS,
    Subject,
    check_pruned,
    check_unpruned,
    check_verified,
    export,
    open_bundle,
    picture,
    profiles_of,
    with_preset,
)
from tests.btp_export.families.qwen import make_qwen

SIZES = ((168, 252), (140, 112))  # 6 x 9 tokens: windows of all four sizes; 5 x 4: two
SHAPES = ((1, SIZES[0]), (1, SIZES[1]), (2, SIZES[0]))  # batch and picture
TEXT = 64  # text bucket; byte-level tokens are short


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("qwen") / "model"


@pytest.fixture(scope="module")
def module(folder):
    """The checkpoint in `folder`, in the published layout, and transformers' model of it."""
    return make_qwen(folder)


@pytest.fixture(scope="module")
def new_layout(tmp_path_factory):
    """The same weights with module names of transformers 5, tied."""
    path = tmp_path_factory.mktemp("qwen5") / "model"
    return path, make_qwen(path, "new", tied=True)


def subject_of(folder: Path, module: Any) -> Subject:
    """transformers' side of the comparison, with positions from its own `get_rope_index`."""

    def positions_of(inputs: Any, count: int) -> torch.Tensor:
        types = torch.zeros(1, count, dtype=torch.int32)
        types[:, : inputs["mm_token_type_ids"].shape[1]] = inputs["mm_token_type_ids"]
        ids, _ = module.model.get_rope_index(torch.zeros_like(types).long(), types, inputs["image_grid_thw"])
        return ids

    return Subject(folder, module, load_processor(folder), positions_of)


@pytest.fixture(scope="module")
def subject(folder, module):
    return subject_of(folder, module)


@pytest.fixture(scope="module")
def bundles(module, folder, tmp_path_factory):
    """`bundles(preset, opset)`: at opset 23 two picture sizes in one bundle, and a batch of 2 of the larger."""
    out = tmp_path_factory.mktemp("bundles")

    @cache
    def make(preset: str, opset: int) -> Bundle:
        if preset != "none":
            return with_preset(make("none", opset), preset, out / f"{preset}-{opset}")
        shapes = [f"batch={batch},image={height}x{width}" for batch, (height, width) in SHAPES]
        shapes = shapes if opset == 23 else shapes[-1:]
        return export(folder, out / f"none-{opset}", text_tokens=TEXT, profiles=tuple(shapes), opset=opset)

    return lambda preset, opset=23: make(preset, opset)


def test_graphs_of_two_sizes_share_one_weights_file(bundles):
    """The tower's weights are there once; each size has its own rotary tables."""
    bundle = bundles("none")
    read = []
    for profile in PROFILES[:2]:
        document = onnx.load(bundle.graph_path("vision", profile), load_external_data=False)
        outside = [tensor for tensor in document.graph.initializer if tensor.external_data]
        assert {tensor.external_data[0].value for tensor in outside} == {f"weights/{VISION_FILE}"}
        read.append({tensor.name for tensor in outside})
    stored = open_tensors(bundle.weights / VISION_FILE)
    assert set(stored) == read[0] | read[1]
    assert "merger.mlp.0.weight" in read[0] & read[1]
    for own, size in zip((read[0] - read[1], read[1] - read[0]), SIZES, strict=True):
        patches = size[0] // 14 * (size[1] // 14)
        assert [stored[name].shape for name in own] == [(patches, 1, 1, 8)] * 2  # cos and sin, half of each head


# -- the whole pipeline ------------------------------------------------------------------------------------------------


PROFILES = [f"b{batch}-{height}x{width}-t{TEXT}-n8" for batch, (height, width) in SHAPES]


def some_pictures(profile: str) -> list[Image.Image]:
    height, width = map(int, profile.split("-")[1].split("x"))
    return [picture(height, width, seed) for seed in range(len(PROMPTS))]


@pytest.mark.parametrize("profile", PROFILES)
def test_unpruned_logits_and_generation_are_transformers_own(profile, bundles, subject):
    assert profiles_of(bundles("none")) == PROFILES
    answers = check_unpruned(subject, open_bundle(bundles("none"), profile), some_pictures(profile))
    assert len({tuple(tokens) for tokens in answers}) == len(PROMPTS)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_graph_kept_set_and_token(preset, profile, bundles, subject):
    bundle = bundles(preset)
    plan = bundle.plan_for(profile)
    assert plan.image_tokens == bundle.profile(profile).image_tokens
    assert preset == "none" or plan.tokens_per_layer()[-1] <= plan.image_tokens // 2
    check_verified(bundle, profile)
    if preset != "none":
        check_pruned(subject, open_bundle(bundle, profile), some_pictures(profile))


@pytest.mark.parametrize("preset", PRESETS)
def test_opset_18(preset, bundles, subject):
    bundle, profile = bundles(preset, 18), PROFILES[2]
    check_verified(bundle, profile)
    check = check_unpruned if preset == "none" else check_pruned
    check(subject, open_bundle(bundle, profile), some_pictures(profile))


@pytest.mark.parametrize("opset", [18, 23])
def test_onnx_checker_accepts_every_graph(opset, bundles):
    bundle = bundles("btp-paper", opset)
    for graph in bundle.graphs(PROFILES[2]):
        document = onnx.load(bundle.root / graph.file, load_external_data=False)
        assert [one.version for one in document.opset_import if one.domain == ""] == [opset]
        for tensor in document.graph.initializer:  # onnx refuses hard links; the tensors are checked by running them
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")
            tensor.raw_data = bytes(int(np.prod(tensor.dims)) * 4) if not tensor.raw_data else tensor.raw_data
        onnx.checker.check_model(document)


def test_a_padded_batch_of_transformers_gives_the_same_tokens(bundles, module):
    """transformers pads on the left, we on the right; positions count real tokens in both."""
    model = open_bundle(bundles("none"), PROFILES[2])
    images = some_pictures(PROFILES[2])[:2]
    processor = load_processor(model.bundle.processor)
    processor.tokenizer.padding_side = "left"
    texts = [model.prompter.text(prompt) for prompt in PROMPTS[:2]]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    assert (inputs["attention_mask"] == 0).any()
    with torch.inference_mode():
        out = module.generate(**inputs, max_new_tokens=8, do_sample=False)
    wanted = [row.tolist() for row in out[:, inputs["input_ids"].shape[1] :]]
    got = [list(one.token_ids) for one in model.generate(images, list(PROMPTS[:2]))]
    assert [row[: len(mine)] for row, mine in zip(wanted, got, strict=True)] == got


def test_the_layout_of_transformers_5_with_tied_embeddings(new_layout, tmp_path):
    folder, module = new_layout
    bundle = export(folder, tmp_path / "bundle", text_tokens=TEXT, image_sizes=SIZES[1:])
    (profile,) = profiles_of(bundle)
    check_unpruned(subject_of(folder, module), open_bundle(bundle, profile), some_pictures(profile))


def test_a_picture_of_another_grid_is_refused_or_scaled(bundles):
    model = open_bundle(bundles("none"), PROFILES[0])
    with pytest.raises(InputError, match="90 x 80") as error:
        model.generate([picture(90, 80)], ["where?"])
    assert error.value.do == "run with --resize, or export with --image-size 84x84"
    assert model.generate([picture(90, 80)], ["where?"], resize=True)


# -- real sizes --------------------------------------------------------------------------------------------------------


def test_paper_preset_is_the_released_setting():
    released = family_for({"model_type": "qwen2_5_vl"}).released
    plan = preset(
        "btp-paper", model_type="qwen2_5_vl", num_layers=28, image_tokens=576, grid=(24, 24), released=released
    )
    assert [(stage.layer, stage.keep) for stage in plan.stages] == [(3, 288), (6, 144), (15, 72), (22, 0)]
    first, second, third = plan.stages[:3]
    assert (first.attention_quota, first.pool, first.diversity_quota) == (28, 33, 260)
    assert (second.attention_quota, second.diversity_quota) == (57, 87)
    assert (third.attention_quota, third.pool, third.diversity_quota) == (72, 86, 0)
    assert plan.average_tokens / 576 == pytest.approx(0.272, abs=5e-4)


def test_real_head_sizes_and_rope(tmp_path):
    """Seven query heads to a key head, of 128, theta 1e6, sections 16/24/24; vision heads of 80, windows of 112 pixels.

    That is half of the 7B's heads: how many there are decides nothing but time.
    """
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
    text = {
        "hidden_size": 1792, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 14,
        "num_key_value_heads": 2, "max_position_embeddings": 128000, "rope_parameters": rope,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 320, "intermediate_size": 160, "num_heads": 4, "out_hidden_size": 1792,
        "window_size": 112, "fullatt_block_indexes": [1],
    }  # fmt: skip
    folder = tmp_path / "model"
    module = make_qwen(folder, text=text, vision=vision, max_pixels=12845056)
    model = open_model(str(folder))
    assert model.spec.vision.image_size == (672, 672)
    assert model.spec.vision.image_tokens == 576
    stages = (
        Stage(layer=1, keep=24, attention_quota=8, pool=12, boundary=24, diversity_quota=8, seeds=6),
        Stage(layer=2, keep=9, attention_quota=9, pool=11, boundary=9),
    )
    plan = PruningPlan(model_type="qwen2_5_vl", num_layers=3, image_tokens=54, grid=(6, 9), stages=stages)
    options = Options(text_tokens=40, new_tokens=3, image_sizes=((168, 252),))
    pruned = export_bundle(model, plan, tmp_path / "pruned", options)
    (profile,), subject = profiles_of(pruned), subject_of(folder, module)
    check_verified(pruned, profile, samples=1)
    check_pruned(subject, open_bundle(pruned, profile), [picture(168, 252)])
    unpruned = derive(pruned, plan.model_copy(update={"stages": ()}), tmp_path / "unpruned")
    check_unpruned(subject, open_bundle(unpruned, profile), [picture(168, 252)])
