"""Qwen2.5-VL: the model as data, picture sizes, positions and the vision tower, beside transformers' own classes."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from btp_export.families import family_for
from btp_export.families._processor import load_processor
from btp_export.model.open_model import open_model
from btp_export.model.prompting import Prompter
from graphs.building.decoder_graphs import serialize
from graphs.building.rope import positions, rope_tables, token_tables
from graphs.building.vision_capture import VISION_FILE, capture_vision
from graphs.files.checkpoint import open_checkpoint
from graphs.files.safetensors_file import write_tensors
from graphs.records.errors import InputError
from tests.btp_export.families.qwen import PREFIX_TEXT, ROPE_THETA, make_qwen

FAMILY = family_for({"model_type": "qwen2_5_vl"})


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
    processor = load_processor(folder)
    for height, width in [(30, 30), (170, 250), (400, 90), (37, 512), (224, 224)]:
        layout = FAMILY.layout(model.spec, (height, width))
        made = processor.image_processor(
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
