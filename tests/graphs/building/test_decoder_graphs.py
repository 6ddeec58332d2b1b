"""What holds for every graph: names, shapes, the checker, quiet loading, determinism, weights left where they are."""

import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from btp_export.families import family_for
from graphs.building.decoder_graphs import assemble_whole, build_decoder_graphs, serialize
from graphs.building.rope import rope_tables
from graphs.building.vision_capture import VISION_FILE, capture_vision
from graphs.files.checkpoint import TensorRef, open_checkpoint
from graphs.files.safetensors_file import write_tensors
from graphs.records.errors import InputError
from graphs.records.plan import Stage
from tests.captures import Remembered
from tests.graphs.models import DECODERS, NEW, PREFIX, TEXT, Runner, sample_model, write_graphs

STAGES = (
    Stage(layer=1, keep=8, attention_quota=3, pool=6, boundary=8, diversity_quota=3, seeds=4),
    Stage(layer=2, keep=5, attention_quota=2, pool=3, boundary=5, diversity_quota=1),
    Stage(layer=3, keep=3, attention_quota=3, pool=3, boundary=0),
    Stage(layer=4, keep=0),
)
ORDER = ["prefill_0", "select_0", "prefill_1", "select_1", "prefill_2", "select_2", "prefill_3", "select_3",
         "prefill_4", "head", "decode"]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def build(sample, plan, batch=1, **options):
    return build_decoder_graphs(sample.spec, sample.checkpoint, plan, sample.profile(batch), **options)


def signature(values):
    return {value.name: (value.dtype.name, value.shape.numpy()) for value in values}


def test_names_inputs_and_outputs_are_those_of_interfaces_md(models):
    sample = sample_model("mistral-gqa", models)
    plan = sample.plan(*STAGES)
    graphs = {graph.name: graph for graph in build(sample, plan, batch=2)}
    assert list(graphs) == ORDER
    f, i = "FLOAT", "INT32"
    c, half, heads, kv, d, vocab = 128, 32, 4, 2, 64, 40
    for segment in plan.segments():
        tokens = PREFIX + segment.image_tokens + TEXT
        graph = graphs[f"prefill_{segment.index}"]
        assert graph.layers == (segment.start, segment.stop)
        stream = {"hidden": (f, (2, tokens, c)), "cos": (f, (2, tokens, half)), "sin": (f, (2, tokens, half))}
        assert signature(graph.model.graph.inputs) == {**stream, "last": (i, (2,))}
        outputs = {"hidden_out": (f, (2, tokens, c))}
        for layer in range(segment.start, segment.stop):
            outputs |= {f"key_{layer}": (f, (2, kv, tokens, d)), f"value_{layer}": (f, (2, kv, tokens, d))}
        if segment.index < 3:
            outputs["query"] = (f, (2, heads, 1, d))
        assert signature(graph.model.graph.outputs) == outputs
    before, after = PREFIX + 16 + TEXT, PREFIX + 8 + TEXT
    assert signature(graphs["select_0"].model.graph.inputs) == {
        "hidden": (f, (2, before, c)), "cos": (f, (2, before, half)), "sin": (f, (2, before, half)), "last": (i, (2,)),
        "query": (f, (2, heads, 1, d)), "key": (f, (2, kv, before, d)),
    }  # fmt: skip
    assert signature(graphs["select_0"].model.graph.outputs) == {
        "hidden_out": (f, (2, after, c)), "cos_out": (f, (2, after, half)), "sin_out": (f, (2, after, half)),
        "last_out": (i, (2,)), "indices": (i, (2, 8)), "scores": (f, (2, 16)),
    }  # fmt: skip
    assert signature(graphs["head"].model.graph.outputs) == {"logits": (f, (2, vocab))}
    decode = graphs["decode"].model.graph
    caches = {}
    for layer, image in enumerate(plan.tokens_per_layer()):
        shape = (2, kv, PREFIX + image + TEXT + NEW, d)
        caches |= {f"past_key_{layer}": (f, shape), f"past_value_{layer}": (f, shape)}
    assert signature(decode.inputs) == {
        "hidden": (f, (2, 1, c)), "cos": (f, (2, 1, half)), "sin": (f, (2, 1, half)),
        **{f"length_{index}": (i, (2,)) for index in range(5)}, **caches,
    }  # fmt: skip
    rows = {f"{kind}_{layer}": (f, (2, kv, 1, d)) for layer in range(5) for kind in ("key", "value")}
    assert signature(decode.outputs) == {"logits": (f, (2, vocab)), **rows}


@pytest.mark.parametrize(  # every pair of two settings is there, half of all combinations
    ("importance", "opset", "precision"),
    [
        ("last-token", 18, "float32"), ("last-token", 23, "float16"), ("last-token", 23, "bfloat16"),
        ("similar-text", 23, "float32"), ("similar-text", 18, "float16"), ("similar-text", 18, "bfloat16"),
    ],
)  # fmt: skip
def test_every_value_is_static_and_the_checker_agrees(importance, opset, precision, models, tmp_path):
    sample = sample_model("mistral-gqa", models)
    graphs = build(sample, sample.plan(*STAGES, importance=importance), opset=opset, precision=precision)
    paths = write_graphs(graphs, sample.checkpoint, tmp_path)
    for graph in graphs:
        for value in values_of(graph.model.graph):
            assert value.dtype is not None, value
            assert value.shape is not None and value.shape.is_static(), value
            assert " " not in value.name
        onnx.checker.check_model(str(paths[graph.name]), full_check=True)
        model = onnx.load(paths[graph.name], load_external_data=False)
        typed = {info.name for info in [*model.graph.value_info, *model.graph.output]}
        assert all(name in typed for node in model.graph.node for name in node.output)
        check_against_inference(model)


def values_of(graph):
    return [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]


def check_against_inference(model):
    """onnx's own shape inference, started from the inputs alone, finds the shapes that we declared."""
    declared = {info.name: info.type for info in [*model.graph.value_info, *model.graph.output]}
    bare = onnx.ModelProto.FromString(model.SerializeToString())
    del bare.graph.value_info[:]
    operators = {node.op_type for node in bare.graph.node}
    if "BtpSelectTokens" in operators:
        return  # the kept length is not inferable
    inferred = onnx.shape_inference.infer_shapes(bare, strict_mode=True)
    for info in inferred.graph.value_info:
        assert info.type == declared[info.name], info.name


@pytest.mark.parametrize("opset", [18, 23])
def test_onnxruntime_loads_without_a_word(opset, models, tmp_path, capfd):
    sample = sample_model("qwen2-gqa", models)
    paths = write_graphs(build(sample, sample.plan(*STAGES), opset=opset), sample.checkpoint, tmp_path)
    capfd.readouterr()
    Runner(paths)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_the_cache_is_not_copied(models, tmp_path):
    """After ONNX Runtime's optimisation no node but the attention products (and the mask) touches a cache."""
    import onnxruntime

    sample = sample_model("mistral-gqa", models)
    path = write_graphs(build(sample, sample.plan(*STAGES)), sample.checkpoint, tmp_path)["decode"]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(path, options)
    model = onnx.load(tmp_path / "optimised.onnx", load_external_data=False)
    readers = {node.op_type for node in model.graph.node for name in node.input if name.startswith("past_")}
    assert readers == {"FusedMatMul", "MatMul"}


@pytest.mark.parametrize("decoder", DECODERS)
def test_same_inputs_same_bytes(decoder, models):
    sample = sample_model(decoder, models)
    family = family_for(sample.checkpoint.config)
    again = open_checkpoint(sample.checkpoint.folder, family.renames)
    plan = sample.plan(*STAGES)
    first, second = (
        build_decoder_graphs(sample.spec, checkpoint, plan, sample.profile())
        for checkpoint in (sample.checkpoint, again)
    )
    assert [serialize(graph) for graph in first] == [serialize(graph) for graph in second]
    assert all(str(sample.checkpoint.folder).encode() not in serialize(graph) for graph in first)


def test_weights_are_pointers_into_the_shards(models, monkeypatch):
    sample = sample_model("mistral-gqa", models)
    monkeypatch.setattr(TensorRef, "read", lambda self: pytest.fail("a weight was read"))
    graphs = build(sample, sample.plan(*STAGES))
    used = set()
    for graph in graphs:
        for name, value in graph.model.graph.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                ref = sample.checkpoint[name]
                assert (tensor.location, tensor.offset, tensor.length) == (
                    "weights/model.safetensors", ref.offset, ref.nbytes
                )  # fmt: skip
                used.add(name)
            else:
                assert tensor.nbytes < 4096
    decoder = {name for name in sample.checkpoint.tensors if name.startswith(("language_model.", "lm_head."))}
    assert used == decoder - {"language_model.embed_tokens.weight"}


def test_weights_of_another_precision_get_one_cast_each(models):
    sample = sample_model("llama-bias-tied", models)
    graphs = build(sample, sample.plan(), precision="float16")
    decode = next(graph for graph in graphs if graph.name == "decode").model.graph
    external = [v for v in decode.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
    assert all([use.node.op_type for use in value.uses()] == ["Cast"] for value in external)
    assert {value.dtype for value in decode.inputs} == {ir.DataType.FLOAT16, ir.DataType.INT32}
    assert signature(decode.outputs)["logits"][0] == "FLOAT"


@pytest.mark.parametrize("opset", [18, 23])
def test_float16_runs_near_float32(opset, models, tmp_path):
    sample = sample_model("mistral-gqa", models)
    plan = sample.plan(STAGES[0])
    rng = np.random.default_rng(3)
    profile = sample.profile()
    hidden = rng.standard_normal((1, profile.total_tokens, 128)).astype(np.float32)
    cos, sin = (table[None] for table in rope_tables(sample.checkpoint.config, profile.total_tokens))
    last = np.array([profile.total_tokens - 1], np.int32)
    results = {}
    for precision, dtype in (("float32", np.float32), ("float16", np.float16)):
        graphs = build(sample, plan, opset=opset, precision=precision)
        run = Runner(write_graphs(graphs[:2], sample.checkpoint, tmp_path / precision))
        stream = {"hidden": hidden.astype(dtype), "cos": cos.astype(dtype), "sin": sin.astype(dtype), "last": last}
        segment = run("prefill_0", **stream)
        assert segment["hidden_out"].dtype == dtype
        stage = run(
            "select_0", **stream | {"hidden": segment["hidden_out"]}, query=segment["query"], key=segment["key_0"]
        )
        results[precision] = segment["hidden_out"], stage["scores"]
    for half, full in zip(results["float16"], results["float32"], strict=True):
        assert np.abs(half - full).max() < 0.01 * np.abs(full).max()


@pytest.fixture(scope="module")
def whole(models):
    """Segments and the whole graph of a plan whose stages need different forms of the operator, run on one picture."""
    sample = sample_model("mistral-gqa", models)
    module = family_for(sample.checkpoint.config).vision_module(sample.checkpoint)
    return sample, module, Remembered(capture_vision)


FIRST = (Stage(layer=0, keep=9, attention_quota=9, pool=9),)


@pytest.mark.parametrize(
    ("opset", "batch", "importance", "stages"),
    [
        (18, 2, "last-token", STAGES),
        (23, 1, "random", STAGES),
        (23, 2, "similar-text", STAGES),
        (23, 1, "pivot-distance", FIRST),
        (18, 1, "last-token", ()),
    ],
)
def test_whole_equals_the_segments(opset, batch, importance, stages, whole, tmp_path, capfd):
    sample, module, captured = whole
    plan, profile = sample.plan(*stages, importance=importance), sample.profile(batch)
    vision, weights = captured(module, batch=batch, image_size=(16, 16), opset=opset)
    graphs = build(sample, plan, batch=batch, opset=opset)
    joined = assemble_whole(vision, sample.spec, sample.checkpoint, plan, profile, opset=opset, precision="float32")
    again = assemble_whole(vision, sample.spec, sample.checkpoint, plan, profile, opset=opset, precision="float32")
    assert serialize(joined) == serialize(again)
    (tmp_path / "weights").mkdir()
    write_tensors(tmp_path / "weights" / VISION_FILE, weights)
    paths = write_graphs([vision, *graphs, joined], sample.checkpoint, tmp_path)
    onnx.checker.check_model(str(paths["prefill"]), full_check=True)
    assert all(value.shape.is_static() for value in values_of(joined.model.graph))
    capfd.readouterr()
    run = Runner(paths)
    assert capfd.readouterr().err == ""
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((batch, 3, 16, 16)).astype(np.float32)
    prefix, text = (rng.standard_normal((batch, n, 128)).astype(np.float32) for n in (PREFIX, TEXT))
    cos, sin = (np.repeat(t[None], batch, 0) for t in rope_tables(sample.checkpoint.config, profile.total_tokens))
    last = np.array([profile.total_tokens - 1, profile.total_tokens - 2][:batch], np.int32)
    got = run("prefill", pixel_values=pixels, prefix=prefix, text=text, cos=cos, sin=sin, last=last)
    wanted = chain(run, plan, pixels, prefix, text, cos, sin, last)
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, atol=1e-5, err_msg=name)


def chain(run, plan, pixels, prefix, text, cos, sin, last):
    """The segments one after another, collected under the whole graph's output names."""
    features = run("vision", pixel_values=pixels)["image_features"]
    stream = {"hidden": np.concatenate([prefix, features, text], 1), "cos": cos, "sin": sin, "last": last}
    results, query, key = {}, None, None
    for segment in plan.segments():
        if segment.stage is not None:
            name = f"select_{segment.stage}"
            looks = "query" in {value.name for value in run.sessions[name].get_inputs()}
            out = run(name, **stream, **({"query": query, "key": key} if looks else {}))
            stream = {part: out[f"{part}_out"] for part in stream}
            if "indices" in out:
                results[f"indices_{segment.stage}"] = out["indices"]
        results[f"last_{segment.index}"] = stream["last"]
        out = run(f"prefill_{segment.index}", **stream)
        results |= {name: value for name, value in out.items() if name not in ("query", "hidden_out")}
        query, key = out.get("query"), out[f"key_{segment.stop - 1}"]
        stream["hidden"] = out["hidden_out"]
    results["logits"] = run("head", hidden=stream["hidden"], last=stream["last"])["logits"]
    return results


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 6}, "decoder layers: 6"),
        ({"image_tokens": 25, "grid": (5, 5)}, "image tokens: 25"),
        ({"model_type": "other"}, "model type: other"),
    ],
)
def test_refuses_a_plan_for_another_model(change, message, models):
    sample = sample_model("llama", models)
    with pytest.raises(InputError, match=message):
        build(sample, sample.plan().model_copy(update=change))


def test_refuses_a_sequence_longer_than_the_model(models):
    sample = sample_model("llama", models)
    profile = sample.profile().model_copy(update={"text_tokens": 600})
    with pytest.raises(InputError, match="positions"):
        build_decoder_graphs(sample.spec, sample.checkpoint, sample.plan(), profile)


def test_refuses_a_config_that_does_not_fit_the_weights(models):
    sample = sample_model("llama", models)
    decoder = sample.spec.decoder.model_copy(update={"intermediate_size": 161})
    with pytest.raises(InputError, match="gate_proj"):
        build_decoder_graphs(
            sample.spec.model_copy(update={"decoder": decoder}), sample.checkpoint, sample.plan(), sample.profile()
        )


def test_refuses_an_unknown_opset(models):
    with pytest.raises(InputError, match="opset 19"):
        build(sample_model("llama", models), sample_model("llama", models).plan(), opset=19)


def test_prefix_may_be_empty(models, tmp_path):
    """A template that starts with the picture."""
    sample = sample_model("llama", models)
    spec = sample.spec.model_copy(update={"prefix_tokens": 0})
    profile = sample.profile().model_copy(update={"prefix_tokens": 0})
    plan = sample.plan(STAGES[0], STAGES[3])
    graphs = build_decoder_graphs(spec, sample.checkpoint, plan, profile)
    run = Runner(write_graphs(graphs, sample.checkpoint, tmp_path))
    tokens = 8 + TEXT
    hidden = torch.arange(tokens * 128, dtype=torch.float32).reshape(1, tokens, 128)
    cos = torch.arange(tokens * 32, dtype=torch.float32).reshape(1, tokens, 32)
    got = run("select_1", hidden=hidden, cos=cos, sin=cos, last=np.array([tokens - 1], np.int32))
    np.testing.assert_array_equal(got["hidden_out"], hidden[:, 8:])
    assert math.prod(got["cos_out"].shape) == TEXT * 32
