"""LLaVA-1.6: layouts, vision and the whole pipeline against transformers' own processor and model."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import unpad_image

from btp_export.demo import checkpoint_path
from btp_export.exporting import Options, check_target, make_profiles
from btp_export.families import family_for
from btp_export.measuring.verify import verify_bundle
from btp_export.model.open_model import open_model
from btp_export.model.prompting import Prompter
from btp_export.planning.plan_files import plan_for
from graphs.files.bundle import Bundle
from graphs.records.errors import InputError
from graphs.records.spec import ModelSpec, VisionSpec
from tests.btp_export.families import parity
from tests.btp_export.families.parity import Subject

FAMILY = family_for({"model_type": "llava_next"})
SIZES = ((48, 48), (40, 72))  # 36 + 12 x 13 and, without padding, 36 + 6 x 13 tokens
SHAPES = ((1, SIZES[0]), (1, SIZES[1]), (2, SIZES[1]))  # batch and picture


def make_next(demo: Path, folder: Path, *, tile: int = 24, patch: int = 4, **text: Any) -> Path:
    """A random LLaVA-1.6 with 24 x 24 tiles of 6 x 6 patches; `text` changes its decoder."""
    pinpoints = [[tile, 2 * tile], [2 * tile, tile], [2 * tile, 2 * tile], [3 * tile, tile], [tile, 3 * tile]]
    fields = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "vocab_size": parity.WORDS,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "model_type": "llama", "rms_norm_eps": 1e-5,
    } | text  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": tile, "patch_size": patch, "projection_dim": 32, "model_type": "clip_vision_model",
    }  # fmt: skip
    config = LlavaNextConfig(
        text_config=fields,
        vision_config=vision,
        image_grid_pinpoints=pinpoints,
        image_token_index=4,
        tie_word_embeddings=fields.get("tie_word_embeddings", False),
    )
    torch.manual_seed(1)
    model = parity.random_weights(LlavaNextForConditionalGeneration(config))
    processor = {
        "processor_class": "LlavaNextProcessor", "patch_size": patch, "image_token": "<image>",
        "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default",
        "image_processor": {
            "image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": pinpoints,
            "crop_size": {"height": tile, "width": tile}, "size": {"shortest_edge": tile}, "do_pad": True,
            "image_mean": [0.35] * 3, "image_std": [0.25] * 3, "resample": 3,
        },
    }  # fmt: skip
    parity.save(model, demo, folder, processor)
    return folder


def subject_of(folder: Path) -> Subject:
    model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return Subject(folder, model, AutoProcessor.from_pretrained(folder))


@pytest.fixture(scope="module")
def subject(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject_of(make_next(demo_checkpoint, tmp_path_factory.mktemp("next") / "model"))


@pytest.fixture(scope="module")
def bundle(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("next") / "bundle"
    shapes = tuple(f"batch={batch},image={height}x{width}" for batch, (height, width) in SHAPES)
    return parity.export(subject.folder, out, profiles=shapes)


@pytest.fixture
def copied(subject: Subject, tmp_path: Path) -> Path:
    """A checkpoint that the test may change."""
    return Path(shutil.copytree(subject.folder, tmp_path / "copied"))


def change(path: Path, part: str | None = None, **changes: Any) -> None:
    document = json.loads(path.read_text())
    (document if part is None else document[part]).update(changes)
    path.write_text(json.dumps(document))


def profile_name(batch: int, size: tuple[int, int]) -> str:
    return f"b{batch}-{size[0]}x{size[1]}-t16-n8"


def pictures_for(size: tuple[int, int]) -> list[Image.Image]:
    return [parity.picture(*size, seed=seed) for seed in range(3)]


# The whole pipeline


@pytest.mark.parametrize(("batch", "size"), SHAPES)
def test_unpruned_it_is_model_generate(batch: int, size: tuple[int, int], subject: Subject, bundle: Bundle) -> None:
    model = parity.open_bundle(bundle, profile_name(batch, size))
    answers = parity.check_unpruned(subject, model, pictures_for(size))
    assert len({tuple(tokens) for tokens in answers}) > 1, "the answers should differ, or little is shown"


@pytest.mark.parametrize(("batch", "size"), SHAPES)
@pytest.mark.parametrize("preset", ["btp-paper", "fastv"])
def test_pruned_it_is_transformers_layers_with_selection_between(
    preset: str, batch: int, size: tuple[int, int], subject: Subject, bundle: Bundle, tmp_path: Path
) -> None:
    name = profile_name(batch, size)
    made = parity.with_preset(bundle, preset, tmp_path / "bundle", name)
    model = parity.open_bundle(made, name)
    assert model.plan.stages and model.plan.image_tokens == model.profile.image_tokens
    parity.check_pruned(subject, model, pictures_for(size))


@pytest.mark.parametrize("preset", parity.PRESETS)
def test_every_graph_verifies(preset: str, bundle: Bundle, tmp_path: Path) -> None:
    made = parity.with_preset(bundle, preset, tmp_path / "bundle")
    for shape in SHAPES:
        parity.check_verified(made, profile_name(*shape))


def test_one_whole_graph(subject: Subject, tmp_path: Path) -> None:
    plan = plan_for("btp-paper", open_model(str(subject.folder)).spec)
    made = parity.export(subject.folder, tmp_path / "bundle", plan=plan, assemble="whole", image_sizes=SIZES[1:])
    parity.check_pruned(subject, parity.open_bundle(made, made.profile().name), pictures_for(SIZES[1])[:1])
    found = verify_bundle(made, samples=1, threads=1)
    assert found.passed, found.failures


def test_real_heads_and_rotary_settings(demo_checkpoint: Path, tmp_path: Path) -> None:
    """Heads of 128 with Vicuna's rotary base, norms and positions, 336-pixel tiles of 24 x 24 patches: V = 1160.

    8 of the 7B\'s 32: how many there are decides nothing but time.
    """
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 256}
    vicuna = {"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    folder = make_next(demo_checkpoint, tmp_path / "model", tile=336, patch=14, num_hidden_layers=3, **heads, **vicuna)
    subject = subject_of(folder)
    size = (100, 1008)
    made = parity.export(folder, tmp_path / "bundle", image_sizes=(size,), new_tokens=4)
    assert made.profile().image_tokens == 24 * 24 + 8 * 73
    parity.check_unpruned(subject, parity.open_bundle(made, made.profile().name), [parity.picture(*size)])
    pruned = parity.with_preset(made, "btp-paper", tmp_path / "pruned")
    parity.check_verified(pruned, made.profile().name, samples=1)


# Layouts: the processor decides


@given(height=st.integers(1, 4000), width=st.integers(1, 4000))
@settings(max_examples=300, deadline=None)
def test_the_token_count_is_the_processors(height: int, width: int) -> None:
    """For the published pinpoints, 336-pixel tiles of 14-pixel patches."""
    processor, spec = published()
    (wanted,) = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"]
    try:
        layout = FAMILY.layout(spec, (height, width))
    except InputError:
        assert wanted <= 576 + 72, "only a picture that leaves nothing but newlines in the tiles is refused"
        return
    assert layout.image_tokens == wanted
    rows, columns = layout.grid
    assert layout.blocks == ((24, 24), (rows, columns + 1))


@given(height=st.integers(50, 1500), width=st.integers(50, 1500), more=st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_pictures_of_one_layout_keep_the_same_patches(height: int, width: int, more: int) -> None:
    """unpad_image on numbered patches, of two sizes that are near each other."""
    _, spec = published()
    layout = FAMILY.layout(spec, (height, width))
    rows, columns = layout.size[0] // 14, layout.size[1] // 14
    patches = torch.arange(rows * columns).reshape(1, rows, columns)
    kept = unpad_image(patches, (height, width))
    assert kept.shape[1:] == layout.grid
    other = (height + more, width + 9 - more)
    if FAMILY.layout(spec, other) == layout:
        assert torch.equal(kept, unpad_image(patches, other))


@functools.cache
def published() -> tuple[Any, ModelSpec]:
    """A processor and a spec with the settings of llava-v1.6-vicuna-7b."""
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    images = LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints, size={"shortest_edge": 336})
    tokenizer = AutoProcessor.from_pretrained(checkpoint_path()).tokenizer
    processor = LlavaNextProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    vision = VisionSpec(
        image_size=(672, 672), grid=(48, 48), blocks=((24, 24), (48, 49)), dynamic=True,
        pinpoints=tuple((h, w) for h, w in pinpoints), tile=336,
    )  # fmt: skip
    return processor, open_model("demo").spec.model_copy(update={"vision": vision, "model_type": "llava_next"})


@pytest.mark.parametrize("size", [(48, 48), (40, 72), (72, 24), (7, 20), (100, 31), (24, 60)], ids=str)
def test_vision_module_is_transformers_own(size: tuple[int, int], subject: Subject) -> None:
    """Two pictures at once, from the processor's pixels to the tokens: base view, unpadded tiles, newlines."""
    inputs = subject.processor(
        images=[parity.picture(*size, seed=n) for n in range(2)], text=["<image> a"] * 2, return_tensors="pt"
    )
    model = open_model(str(subject.folder))
    module = model.family.vision_module(model.checkpoint, size)
    with torch.no_grad():
        got = module(inputs["pixel_values"])
        wanted = subject.model.model.get_image_features(
            pixel_values=inputs["pixel_values"], image_sizes=inputs["image_sizes"]
        ).pooler_output
    torch.testing.assert_close(got, torch.stack(list(wanted)), atol=1e-6, rtol=0)
    layout = model.family.layout(model.spec, size)
    assert got.shape[1] == layout.image_tokens == int((inputs["input_ids"][0] == 4).sum())
    assert inputs["pixel_values"].shape == (2 * layout.pixel_shape[0], *layout.pixel_shape[1:])


def test_class_attention_is_in_the_tokens_order(subject: Subject) -> None:
    """transformers' attention of each square, laid out by hand: base view, tiles without padding, newlines 0."""
    size = (40, 72)
    inputs = subject.processor(images=[parity.picture(*size, seed=3)], text=["<image> a"], return_tensors="pt")
    model = open_model(str(subject.folder))
    module = model.family.vision_module(model.checkpoint, size, class_attention=True)
    tower = subject.model.model.vision_tower
    kind = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        features, got = module(inputs["pixel_values"])
        weights = tower(inputs["pixel_values"][0], output_attentions=True).attentions
    tower.set_attn_implementation(kind)
    squares = weights[subject.model.config.vision_feature_layer].mean(1)[:, 0, 1:]  # [1 + tiles, patches]
    layout = model.family.layout(model.spec, size)
    side = layout.blocks[0][0]
    rows, columns = (edge // model.spec.vision.tile * side for edge in layout.size)
    tiles = squares[1:].reshape(rows // side, columns // side, side, side).permute(0, 2, 1, 3).reshape(rows, columns)
    cut = (rows - layout.blocks[1][0]) // 2, (columns + 1 - layout.blocks[1][1]) // 2
    kept = tiles[cut[0] : rows - cut[0], cut[1] : columns - cut[1]]
    wanted = torch.cat([squares[0], torch.cat([kept, torch.zeros(len(kept), 1)], dim=1).flatten()])
    assert got.shape == (1, layout.image_tokens) == features.shape[:2]
    torch.testing.assert_close(got[0], wanted, atol=1e-6, rtol=0)


# Checkpoints as they are published


def test_spec_and_profiles(subject: Subject) -> None:
    model = open_model(str(subject.folder))
    assert model.spec.vision.image_size == (48, 48)
    assert model.spec.vision.image_tokens == 36 + 12 * 13
    assert model.spec.vision.dynamic
    small, large = make_profiles(model, Options(image_sizes=((24, 48), (48, 48)), batch=2))
    assert (small.blocks, small.image_tokens) == (((6, 6), (6, 13)), 36 + 6 * 13)
    assert (large.blocks, large.pixel_shape) == (((6, 6), (12, 13)), (2, 5, 3, 24, 24))
    assert small.name == "b2-24x48-t64-n128"
    with pytest.raises(InputError, match="the same profile twice"):
        make_profiles(model, Options(image_sizes=((48, 48), (60, 60))))
    with pytest.raises(InputError, match="nothing of it is left"):
        make_profiles(model, Options(image_sizes=((1, 200),)))


def test_both_weight_name_layouts_give_the_same_model(subject: Subject, copied: Path) -> None:
    """transformers 4 and the module names of transformers 5; save_pretrained itself still writes the old names."""
    new = {name: value.clone() for name, value in subject.model.state_dict().items()}
    old = {}
    for name, value in new.items():
        name = name.replace("model.language_model.", "language_model.model.")
        name = name.replace("lm_head.", "language_model.lm_head.")
        name = name.replace("model.vision_tower.", "vision_tower.vision_model.").removeprefix("model.")
        old[name] = value
    assert {"image_newline", "model.image_newline"} <= old.keys() | new.keys()
    found = []
    for layout in (new, old):
        save_file(layout, copied / "model.safetensors")
        model = open_model(str(copied))
        module = model.family.vision_module(model.checkpoint)
        found.append((set(model.checkpoint.tensors), module.state_dict()["image_newline"]))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][1], subject.model.model.image_newline)


def test_sharded_tied_and_padded_vocabulary(demo_checkpoint: Path, tmp_path: Path) -> None:
    """Embeddings shared with the head, in two files, and an image token id beyond the embedding's rows."""
    folder = make_next(
        demo_checkpoint, tmp_path / "model", tie_word_embeddings=True, vocab_size=parity.WORDS, model_type="mistral",
        sliding_window=None, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )  # fmt: skip
    beyond = parity.WORDS + 3
    change(folder / "config.json", image_token_index=beyond)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token["id"] = beyond if token["content"] == "<image>" else token["id"]
    tokenizer["model"]["vocab"]["<image>"] = beyond
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    for file in (tmp_path / "sharded").glob("model*"):
        shutil.move(file, folder / file.name)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    spec = open_model(str(folder)).spec
    assert (spec.image_token_id, spec.decoder.vocab_size, spec.decoder.tie_word_embeddings) == (
        beyond,
        parity.WORDS,
        True,
    )
    subject = subject_of(folder)
    made = parity.export(folder, tmp_path / "bundle", image_sizes=SIZES[1:])
    pruned = parity.with_preset(made, "fastv", tmp_path / "pruned")
    parity.check_pruned(subject, parity.open_bundle(pruned, made.profile().name), pictures_for(SIZES[1])[:2])


def test_files_from_before_the_processor_knew_the_tower(subject: Subject, copied: Path) -> None:
    """preprocessor_config.json and nothing of patches: the counts come from config.json."""
    processor = json.loads((copied / "processor_config.json").read_text())
    (copied / "processor_config.json").unlink()
    (copied / "preprocessor_config.json").write_text(json.dumps(processor["image_processor"]))
    prompter = Prompter(copied, open_model(str(copied)).spec)
    encoded = prompter.encode([parity.picture(48, 48)], ["what ?"])
    assert encoded.image_tokens == 192


# What is refused


@pytest.mark.parametrize(
    ("part", "change_to", "message"),
    [
        (None, {"use_image_newline_parameter": False}, "use_image_newline_parameter"),
        (None, {"image_grid_pinpoints": [[24, 50]]}, "24 x 50 pixels"),
        (None, {"image_grid_pinpoints": [[24]]}, "image_grid_pinpoints"),
        (None, {"image_grid_pinpoints": 48}, "image_grid_pinpoints"),
        (None, {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        (None, {"mm_patch_merge_type": "flat"}, "config.json sets mm_patch_merge_type to flat"),
        ("text_config", {"attention_sinks": 4}, "text_config sets attention_sinks to 4"),
        ("vision_config", {"registers": 8}, "vision_config sets registers to 8"),
        ("text_config", {"model_type": "gemma"}, "gemma decoder"),
        ("text_config", {"rope_parameters": {"rope_type": "magic", "rope_theta": 1e4}}, "rope_type to 'magic'"),
        ("text_config", {"intermediate_size": 95}, r"_proj\.weight has shape"),
        ("text_config", {"num_attention_heads": 0}, "config.json: "),
        ("vision_config", {"hidden_act": "magic"}, "hidden_act to 'magic'"),
        ("vision_config", {"hidden_size": "big"}, "hidden_size"),
        (None, {"projector_hidden_act": "magic"}, "projector_hidden_act"),
        (None, {"vision_feature_layer": -9}, "vision_feature_layer to -9"),
        (None, {"vision_config": 5}, "vision_config"),
        (None, {"text_config": None}, r"embed_tokens\.weight has shape"),
        (None, {"image_token_index": 70}, "no image token 70"),
    ],
)
def test_configurations_that_would_change_the_numbers(
    part: str | None, change_to: dict[str, Any], message: str, copied: Path
) -> None:
    change(copied / "config.json", part, **change_to)
    with pytest.raises(InputError, match=message) as caught:
        open_model(str(copied))
    assert len(caught.value.lines()) <= 3


def test_a_checkpoint_without_its_newline(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if "newline" not in name}, copied / "model.safetensors")
    with pytest.raises(InputError, match="image_newline is missing"):
        open_model(str(copied))


def test_a_processor_that_counts_otherwise(subject: Subject, bundle: Bundle, copied: Path) -> None:
    """Files of another model: the number of image tokens does not match what the graphs take."""
    processor = json.loads((copied / "processor_config.json").read_text())
    processor["patch_size"] = 8
    (copied / "processor_config.json").write_text(json.dumps(processor))
    options = Options(image_sizes=(bundle.profile().image_size,), text_tokens=16)
    with pytest.raises(InputError, match=r"the processor makes 51 image tokens.*\nwanted: 192 tokens"):
        check_target(open_model(str(copied)), copied.parent / "out", options, force=False)
