import copy
import functools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from btp_export.families import family_for
from graphs.building.decoder_graphs import serialize
from graphs.building.graph_builder import BuiltGraph
from graphs.building.vision_capture import VISION_FILE, bind_to, capture_vision
from graphs.files.safetensors_file import write_tensors
from graphs.records.errors import InputError
from tests.graphs.models import sample_model


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return sample_model("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def module(sample):
    return family_for(sample.checkpoint.config).vision_module(sample.checkpoint)


@pytest.fixture(scope="module")
def capture(sample, module):
    """`capture(opset, ...)`: what capturing the tower gave, once for all tests that change nothing of it."""
    scoring = family_for(sample.checkpoint.config).vision_module(sample.checkpoint, class_attention=True)

    @functools.cache
    def once(opset, batch, precision, class_attention):
        settings = {"batch": batch, "opset": opset, "precision": precision, "class_attention": class_attention}
        return capture_vision(scoring if class_attention else module, image_size=(16, 16), **settings)

    return lambda opset, batch=2, precision="float32", class_attention=False: once(
        opset, batch, precision, class_attention
    )


def on_disk(graph, weights, folder):
    (folder / "weights").mkdir()
    write_tensors(folder / "weights" / VISION_FILE, weights)
    path = folder / "vision.onnx"
    path.write_bytes(serialize(graph))
    return path


def transformers_features(sample, pixels):
    return torch.stack(list(sample.module.model.get_image_features(pixel_values=pixels).pooler_output)).numpy()


@pytest.mark.parametrize(("opset", "batch"), [(18, 1), (18, 2), (23, 2)])
def test_vision_graph_matches_transformers(opset, batch, sample, capture, tmp_path):
    graph, weights = capture(opset, batch)
    path = on_disk(graph, weights, tmp_path)
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(path)
    pixels = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    (got,) = session.run(["image_features"], {"pixel_values": pixels.numpy()})
    assert got.shape == (batch, 16, sample.spec.decoder.hidden_size)
    np.testing.assert_allclose(got, transformers_features(sample, pixels), atol=2e-5)


def class_attention(sample, pixels):
    """transformers' own attention weights: the class token's row in the layer whose output is taken, mean of heads."""
    tower = sample.module.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        weights = tower(pixels, output_attentions=True).attentions
    tower.set_attn_implementation(before)
    return weights[sample.module.config.vision_feature_layer].mean(1)[:, 0, 1:].numpy()


@pytest.mark.parametrize(
    ("opset", "precision", "near"), [(18, "float32", 1e-6), (23, "float32", 1e-6), (23, "float16", 2e-3)]
)
def test_class_attention_is_transformers(opset, precision, near, sample, capture, tmp_path):
    graph, weights = capture(opset, precision=precision, class_attention=True)
    path = on_disk(graph, weights, tmp_path)
    onnx.checker.check_model(str(path), full_check=True)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    features, got = onnxruntime.InferenceSession(path).run(
        ["image_features", "class_attention"], {"pixel_values": pixels.numpy()}
    )
    assert (got.shape, got.dtype) == ((2, 16), np.float32)
    np.testing.assert_allclose(got, class_attention(sample, pixels), atol=near)
    wanted = transformers_features(sample, pixels)
    assert np.abs(features - wanted).max() < (0.02 if precision == "float16" else 1e-5) * np.abs(wanted).max()


def test_another_capture_reads_the_same_weights(capture, tmp_path):
    """A graph with one output more on the file that the graph without it was captured with."""
    _, weights = capture(23)
    write_tensors(tmp_path / VISION_FILE, weights)
    first, its_own = capture(23, class_attention=True)
    more = BuiltGraph(first.name, first.model.clone(), first.layers)  # which is changed here
    (tmp_path / "own").mkdir()
    pixels = np.random.default_rng(0).standard_normal((2, 3, 16, 16), dtype=np.float32)
    alone = onnxruntime.InferenceSession(on_disk(more, its_own, tmp_path / "own")).run(None, {"pixel_values": pixels})
    (tmp_path / "bound").mkdir()
    shared = onnxruntime.InferenceSession(
        on_disk(bind_to(more, tmp_path / VISION_FILE), weights, tmp_path / "bound")
    ).run(None, {"pixel_values": pixels})
    for one, other in zip(alone, shared, strict=True):
        np.testing.assert_array_equal(one, other)
    write_tensors(tmp_path / "fewer.safetensors", dict(list(weights.items())[1:]))
    with pytest.raises(InputError, match="has no tensor"):
        bind_to(more, tmp_path / "fewer.safetensors")


def test_half_precision_is_typed_throughout_and_leaves_the_module_alone(sample, module, capture, tmp_path):
    before = family_for(sample.checkpoint.config).vision_module(sample.checkpoint).state_dict()
    graph, weights = capture(18, 1, "float16")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float16)}
    path = on_disk(graph, weights, tmp_path)
    onnx.checker.check_model(str(path), full_check=True)
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    (got,) = onnxruntime.InferenceSession(path).run(None, {"pixel_values": pixels.numpy()})
    assert got.dtype == np.float16
    wanted = transformers_features(sample, pixels)
    assert np.abs(got - wanted).max() < 0.02 * np.abs(wanted).max()


def test_same_bytes_twice_and_nothing_of_the_machine_in_them(module, capture, capfd):
    first, weights = capture(23)
    second, again = capture_vision(module, batch=2, image_size=(16, 16), opset=23)
    data = serialize(first)
    assert data == serialize(second)
    assert list(weights) == list(again)
    assert all(np.array_equal(weights[name], again[name]) for name in weights)
    assert b".py" not in data
    assert b"btp_export." not in data
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_in_place_gives_the_same_graph_and_weights(module, capture):
    graph, weights = capture(18, 1, "float16")
    own = copy.deepcopy(module)
    other, same = capture_vision(own, batch=1, image_size=(16, 16), opset=18, precision="float16", in_place=True)
    assert {value.dtype for value in own.state_dict().values() if value.is_floating_point()} == {torch.float16}
    assert serialize(graph) == serialize(other)
    assert list(weights) == list(same)
    assert all(np.array_equal(weights[name], same[name]) for name in weights)


def test_refuses_other_opsets(module):
    with pytest.raises(InputError, match="opset 17"):
        capture_vision(module, batch=1, image_size=(16, 16), opset=17)
