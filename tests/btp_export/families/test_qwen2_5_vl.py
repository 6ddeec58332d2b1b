"""Qwen2.5-VL from checkpoint to answers, beside transformers' own classes."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from btp_export.exporting import Options, export_bundle
from btp_export.families import family_for
from btp_export.families._processor import load_processor
from btp_export.model.open_model import open_model
from btp_export.model.prompting import Prompter
from calibrate.place.presets import preset
from graphs.building.decoder_graphs import serialize
from graphs.building.derived_bundles import derive
from graphs.building.rope import positions, rope_tables, token_tables
from graphs.building.vision_capture import VISION_FILE, capture_vision
from graphs.files.bundle import Bundle
from graphs.files.checkpoint import open_checkpoint, open_tensors
from graphs.files.safetensors_file import write_tensors
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
from tests.btp_export.families.qwen import PREFIX_TEXT, ROPE_THETA, make_qwen

FAMILY = family_for({"model_type": "qwen2_5_vl"})
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
def model(module, folder):
    return open_model(str(folder))


@pytest.fixture(scope="module")
def new_layout(tmp_path_factory):
    """The same weights with module names of transformers 5, tied."""
    path = tmp_path_factory.mktemp("qwen5") / "model"
    return path, make_qwen(path, "new", tied=True)


@pytest.fixture
def copied(module, folder, tmp_path):
    """A checkpoint that the test may change."""
    return shutil.copytree(folder, tmp_path / "model")


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


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spec_of(folder: Path) -> Any:
    return FAMILY.spec(open_checkpoint(folder, FAMILY.renames), "test")


# -- the model as data -------------------------------------------------------------------------------------------------


def test_spec_says_what_the_published_files_say(model, module):
    spec, text = model.spec, module.config.text_config
    attention = module.model.language_model.layers[0].self_attn
    assert spec.decoder.num_layers == text.num_hidden_layers
    assert spec.decoder.head_dim == attention.head_dim
    assert spec.decoder.num_kv_heads == text.num_key_value_heads
    assert (spec.decoder.qkv_bias, spec.decoder.o_bias) == (True, False)
    assert spec.decoder.rope_sections == (2, 3, 3)
    assert not spec.decoder.tie_word_embeddings
    assert spec.decoder.max_positions == 512  # its sliding_window is 64, but it says that it does not use it
    assert spec.eos_token_ids == tuple(module.generation_config.eos_token_id)
    assert spec.image_token_id == module.config.image_token_id
    assert spec.vision.image_size == (224, 224)  # 672 x 672, scaled into the processor's 64 tokens
    assert spec.vision.grid == (8, 8)
    assert spec.vision.patches == (4, 1176)
    assert len(model.checkpoint.shards) > 1


def test_tied_embeddings_follow_the_configuration(new_layout):
    spec = open_model(str(new_layout[0])).spec
    assert spec.decoder.tie_word_embeddings


def test_prefix_is_counted_by_the_checkpoint_own_tokenizer(model, folder):
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(PREFIX_TEXT)["input_ids"]
    assert model.spec.prefix_tokens == len(tokens)
    encoded = Prompter(folder, model.spec).encode([Image.new("RGB", (252, 168))], ["where?"])
    assert encoded.image_tokens == 54
    assert encoded.pixel_values.shape == (216, 1176)


def test_both_layouts_give_the_same_names(model, new_layout):
    path, _ = new_layout
    other = open_checkpoint(path, FAMILY.renames)
    assert set(model.checkpoint.tensors) - set(other.tensors) == {"lm_head.weight"}
    assert set(other.tensors) <= set(model.checkpoint.tensors)
    assert {name.split(".")[0] for name in other.tensors} == {"language_model", "visual"}


def test_a_used_sliding_window_bounds_the_positions(copied):
    change_config(copied, use_sliding_window=True, sliding_window=96, max_window_layers=2)
    assert spec_of(copied).decoder.max_positions == 96
    change_config(copied, max_window_layers=6)  # the windows begin behind the last layer
    assert spec_of(copied).decoder.max_positions == 512


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 4]}}, "mrope_section"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"num_hidden_layers": 4}, r"layers\.4\."),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_attention_heads": "many"}, "config.json"),
    ],
)
def test_refuses_what_the_graphs_do_not_compute(changes, message, copied):
    change_config(copied, **changes)
    with pytest.raises(InputError, match=message):
        spec_of(copied)


def test_refuses_a_processor_of_another_model(copied):
    path = copied / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"patch_size": 16}))
    with pytest.raises(InputError, match="patches of"):
        spec_of(copied)


def test_damaged_vision_weights(model):
    state = dict(model.checkpoint.tensors)
    del state["visual.blocks.1.attn.qkv.bias"]
    damaged = type(model.checkpoint)(
        model.checkpoint.folder, model.checkpoint.config, state, model.checkpoint.files, model.checkpoint.shards
    )
    with pytest.raises(InputError, match=r"blocks\.1\.attn\.qkv\.bias is missing"):
        FAMILY.vision_module(damaged)


# -- picture sizes -----------------------------------------------------------------------------------------------------


def test_profile_of_a_size(model):
    profile = FAMILY.profile(model.spec, batch=2, image_size=(168, 252), text_tokens=7, new_tokens=3)
    assert (profile.grid, profile.image_tokens) == ((6, 9), 54)
    assert profile.pixel_shape == (2 * 54 * 4, 1176)


@pytest.mark.parametrize(
    ("size", "nearest"), [((170, 250), "168x252"), ((560, 560), "224x224"), ((28, 28), "56x56"), ((20, 300), "28x308")]
)
def test_other_sizes_name_the_nearest(size, nearest, model):
    with pytest.raises(InputError, match=f"image size {size[0]} x {size[1]}") as error:
        FAMILY.profile(model.spec, batch=1, image_size=size, text_tokens=7, new_tokens=3)
    assert f"--image-size {nearest}" in error.value.do
    assert "multiples of 28, 1568 to 50176 pixels" in error.value.wanted


def test_layout_is_what_the_processor_makes(model, folder):
    prompter = Prompter(folder, model.spec)
    for height, width in [(30, 30), (170, 250), (400, 90), (37, 512), (224, 224)]:
        layout = FAMILY.layout(model.spec, (height, width))
        made = prompter.processor.image_processor(
            images=[Image.new("RGB", (width, height))], return_tensors="np", input_data_format="channels_last"
        )
        assert made["image_grid_thw"].tolist() == [[1, 2 * layout.grid[0], 2 * layout.grid[1]]]
        assert made["pixel_values"].shape == layout.pixel_shape
    with pytest.raises(InputError, match="1 x 300 pixels"):
        FAMILY.layout(model.spec, (1, 300))


# -- positions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(168, 252), (252, 56), (112, 112)])
def test_positions_and_tables_are_transformers_own(size, model, module):
    """Position ids, where the text goes on (rope_deltas), and cos and sin of every token, bit for bit."""
    spec, text = model.spec, 9
    profile = FAMILY.profile(spec, batch=1, image_size=size, text_tokens=text, new_tokens=5)
    types = torch.zeros(1, profile.total_tokens, dtype=torch.int32)
    types[:, spec.prefix_tokens : spec.prefix_tokens + profile.image_tokens] = 1
    grid = torch.tensor([[1, 2 * profile.grid[0], 2 * profile.grid[1]]])
    wanted, deltas = module.model.get_rope_index(torch.zeros_like(types).long(), types, grid)
    got = positions(spec.decoder, profile)
    np.testing.assert_array_equal(got[:, : profile.total_tokens], wanted[:, 0])
    new = np.arange(profile.total_tokens, profile.max_positions)
    np.testing.assert_array_equal(got[:, profile.total_tokens :], np.broadcast_to(new + int(deltas), (3, 5)))

    tables = rope_tables(model.checkpoint.config, profile.max_positions)
    cos, sin = token_tables(tables, spec.decoder, profile)
    theirs = module.model.language_model.rotary_emb(torch.zeros(1), torch.from_numpy(got)[:, None])
    for mine, table in zip((cos, sin), theirs, strict=True):
        np.testing.assert_array_equal(np.concatenate([mine, mine], 1), table[0])


def test_rope_theta_and_scaling_of_the_flat_configuration_are_read(model, copied):
    own = rope_tables(model.checkpoint.config, 40)
    frequency = ROPE_THETA ** -(np.arange(8) / 8)
    np.testing.assert_allclose(own[0], np.cos(np.arange(40)[:, None] * frequency), atol=1e-5)
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mrope_section": [2, 3, 3]}
    change_config(copied, rope_scaling=yarn)
    assert not np.array_equal(rope_tables(copied, 40)[0], own[0])
    assert spec_of(copied).decoder.rope_sections == (2, 3, 3)


# -- vision ------------------------------------------------------------------------------------------------------------


def pixels_and_features(module: Any, profile: Any, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Random patches of a batch, and what transformers' tower makes of them."""
    pixels = torch.randn(profile.pixel_shape, generator=torch.Generator().manual_seed(seed))
    grid = torch.tensor([[1, 2 * profile.grid[0], 2 * profile.grid[1]]] * profile.batch)
    with torch.no_grad():
        features = module.model.get_image_features(pixel_values=pixels, image_grid_thw=grid).pooler_output
    return pixels, torch.stack(list(features)).numpy()


@pytest.mark.parametrize("size", [(112, 112), (140, 84), (168, 252), (252, 140), (28, 392), (224, 224)])
@pytest.mark.parametrize("batch", [1, 2])
def test_vision_module_is_transformers_own(size, batch, model, module):
    profile = FAMILY.profile(model.spec, batch=batch, image_size=size, text_tokens=7, new_tokens=3)
    pixels, wanted = pixels_and_features(module, profile)
    got = FAMILY.vision_module(model.checkpoint, size)(pixels)
    np.testing.assert_allclose(got, wanted, atol=5e-6, rtol=0)


def captured(model: Any, folder: Path, size: tuple[int, int], batch: int, opset: int, precision: Any) -> Path:
    profile = FAMILY.profile(model.spec, batch=batch, image_size=size, text_tokens=7, new_tokens=3)
    graph, weights = capture_vision(
        FAMILY.vision_module(model.checkpoint, size),
        batch=batch,
        image_size=size,
        pixel_shape=profile.pixel_shape,
        opset=opset,
        precision=precision,
    )
    (folder / "weights").mkdir(parents=True)
    write_tensors(folder / "weights" / VISION_FILE, weights)
    path = folder / "vision.onnx"
    path.write_bytes(serialize(graph))
    onnx.checker.check_model(str(path), full_check=True)
    return path


def test_vision_graph_in_half_precision(model, module, folder, tmp_path):
    """As near to float32 as transformers' own half precision is, rotary tables in float32 like there."""
    size = (140, 112)
    path = captured(model, tmp_path, size, 2, 23, "float16")
    profile = FAMILY.profile(model.spec, batch=2, image_size=size, text_tokens=7, new_tokens=3)
    pixels, wanted = pixels_and_features(module, profile)
    (got,) = onnxruntime.InferenceSession(path).run(None, {"pixel_values": pixels.numpy()})
    half = type(module).from_pretrained(folder, dtype=torch.float16)
    _, theirs = pixels_and_features(half, profile)
    assert got.dtype == np.float16
    assert np.abs(got - wanted).max() < 2 * np.abs(theirs.astype(np.float32) - wanted).max()


def test_vision_graph_in_bfloat16_is_typed_throughout(model, tmp_path):
    path = captured(model, tmp_path, (140, 112), 1, 18, "bfloat16")
    document = onnx.load(path, load_external_data=False)
    assert document.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    stored = {tensor.data_type for tensor in document.graph.initializer if "weight" in tensor.name}
    assert stored == {onnx.TensorProto.BFLOAT16}


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
    prompter = model.prompter
    prompter.tokenizer.padding_side = "left"
    texts = [prompter.text(prompt) for prompt in PROMPTS[:2]]
    inputs = prompter.processor(images=images, text=texts, padding=True, return_tensors="pt")
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
