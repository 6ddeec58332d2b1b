"""All that lies between two attentions as one operator of btp_ort: the definition, and what has another form stays."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from engines.runners.on_cpu import Native, decoder_layers, decoder_rows, for_cpu, layers_at_once
from engines.runners.onnxruntime import OrtLoader
from graphs.files.onnx_file import read_graph
from tests.engines.native import builds
from tests.engines.runners.native_cpu import here, run
from tests.plans import PLAN

Array = np.ndarray[Any, np.dtype[Any]]
WIDTH, INNER, HEADS, KV_HEADS, SIZE, EPSILON = 40, 56, 5, 1, 8, 1e-5  # nothing a multiple of what is done at once
COUNTS = {"q": HEADS * SIZE, "k": KV_HEADS * SIZE, "v": KV_HEADS * SIZE}


def weights(*, biased: bool) -> dict[str, Array]:
    """Numbers that float16 holds."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {name: (count, WIDTH) for name, count in COUNTS.items()}
    shapes |= {"out": (WIDTH, 24), "gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
    shapes |= {"norm": (WIDTH,), "feed_norm": (WIDTH,)}
    shapes |= {f"{name}_bias": (count,) for name, count in COUNTS.items() if biased}
    return {name: rng.standard_normal(shape).astype(np.float16) * np.float16(0.5) for name, shape in shapes.items()}


def nodes_of(batch: int, tokens: int, *, biased: bool) -> list[NodeProto]:
    """What follows one attention and precedes the next, as decoder layers have it."""
    make = helper.make_node
    nodes = [
        make("Gemm", ["context", "out"], ["projected"], transB=1),
        make("Add", ["rows", "projected"], ["attended"]),
        make("RMSNormalization", ["attended", "feed_norm"], ["fed"], axis=-1, epsilon=EPSILON),
        make("Gemm", ["fed", "gate"], ["gate_rows"], transB=1),
        make("Sigmoid", ["gate_rows"], ["sigmoid"]),
        make("Mul", ["gate_rows", "sigmoid"], ["silu"]),
        make("Gemm", ["fed", "up"], ["up_rows"], transB=1),
        make("Mul", ["silu", "up_rows"], ["gated"]),
        make("Gemm", ["gated", "down"], ["down_rows"], transB=1),
        make("Add", ["attended", "down_rows"], ["rows_out"]),
        make("RMSNormalization", ["rows_out", "norm"], ["normal"], axis=-1, epsilon=EPSILON),
    ]
    for name in COUNTS:
        nodes.append(make("Gemm", ["normal", name, *([f"{name}_bias"] if biased else [])], [f"{name}_rows"], transB=1))
        turned = f"{name}_heads" if name == "v" else f"{name}_unrotated"
        if tokens == 1:
            nodes.append(make("Reshape", [f"{name}_rows", f"{name}_by_head"], [turned]))
        else:
            nodes.append(make("Reshape", [f"{name}_rows", f"{name}_by_token"], [f"{name}_split"]))
            nodes.append(make("Transpose", [f"{name}_split"], [turned], perm=[0, 2, 1, 3]))
        if name != "v":
            nodes.append(make("RotaryEmbedding", [turned, "cos", "sin"], [f"{name}_heads"]))
    return nodes


def layer_model(
    batch: int, tokens: int, stored: dict[str, Array], *, half: bool, nodes: list[NodeProto] | None = None
) -> onnx.ModelProto:
    """half: weights are stored in float16 and cast, as those of a checkpoint in half precision are."""
    rows, by_head = batch * tokens, {n: (batch, c // SIZE, tokens, SIZE) for n, c in COUNTS.items()}
    shapes: dict[str, tuple[int, ...]] = {
        "rows": (rows, WIDTH), "context": (rows, 24),
        "cos": (batch, tokens, SIZE // 2), "sin": (batch, tokens, SIZE // 2),
    }  # fmt: skip
    out: dict[str, tuple[int, ...]] = {"rows_out": (rows, WIDTH), **{f"{n}_heads": s for n, s in by_head.items()}}
    inner: dict[str, tuple[int, ...]] = {
        n: (rows, WIDTH) for n in ("projected", "attended", "fed", "down_rows", "normal")
    }
    inner |= {n: (rows, INNER) for n in ("gate_rows", "sigmoid", "silu", "up_rows", "gated")}
    for name, count in COUNTS.items():
        inner |= {f"{name}_rows": (rows, count), f"{name}_unrotated": by_head[name]}
        inner |= {f"{name}_split": (batch, tokens, count // SIZE, SIZE)}
    sizes: dict[str, tuple[int, ...]] = {f"{n}_by_head": shape for n, shape in by_head.items()} | {
        f"{n}_by_token": (batch, tokens, c // SIZE, SIZE) for n, c in COUNTS.items()
    }
    kept = [numpy_helper.from_array(np.array(shape, np.int64), name) for name, shape in sizes.items()]
    casts = []
    for name, array in stored.items():
        kept.append(
            numpy_helper.from_array(array if half else array.astype(np.float32), f"{name}.half" if half else name)
        )
        casts += [helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT)] if half else []

    def infos(of: Mapping[str, tuple[int, ...]]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in of.items()]

    chosen = nodes_of(batch, tokens, biased="q_bias" in stored) if nodes is None else nodes
    graph = helper.make_graph([*casts, *chosen], "layer", infos(shapes), infos(out), kept, value_info=infos(inner))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def inputs_of(batch: int, tokens: int) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    angles = rng.uniform(0, 6, (batch, tokens, SIZE // 2))
    given = {"rows": rng.standard_normal((batch * tokens, WIDTH)), "context": rng.standard_normal((batch * tokens, 24))}
    given["rows"][0] *= 100  # gates far from 0
    return {
        name: array.astype(np.float32)
        for name, array in (given | {"cos": np.cos(angles), "sin": np.sin(angles)}).items()
    }


def definition(given: dict[str, Array], stored: dict[str, Array]) -> dict[str, Array]:
    """In float64."""
    w = {name: array.astype(np.float64) for name, array in stored.items()}
    batch, tokens, half = given["cos"].shape

    def norm(x: Array, scale: Array) -> Array:
        normal: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * scale
        return normal

    attended = given["rows"] + given["context"].astype(np.float64) @ w["out"].T
    fed = norm(attended, w["feed_norm"])
    gate = fed @ w["gate"].T
    made = {"rows_out": attended + (gate / (1 + np.exp(-gate)) * (fed @ w["up"].T)) @ w["down"].T}
    normal = norm(made["rows_out"], w["norm"])
    for name, count in COUNTS.items():
        rows = normal @ w[name].T + w.get(f"{name}_bias", np.zeros(count))
        heads = rows.reshape(batch, tokens, count // SIZE, SIZE).transpose(0, 2, 1, 3)
        if name != "v":
            a, b = heads[..., :half], heads[..., half:]
            c, s = given["cos"][:, None], given["sin"][:, None]
            heads = np.concatenate([a * c - b * s, b * c + a * s], -1)
        made[f"{name}_heads"] = heads
    return made


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@here
@pytest.mark.parametrize(
    ("batch", "tokens", "half", "biased", "threads"),
    [
        (2, 37, True, True, 1),
        (1, 443, False, False, 2),
        (1, 1, True, False, 1),
        (3, 1, False, True, 1),
        (7, 1, True, True, 1),
    ],
)
def test_is_the_definition(batch: int, tokens: int, half: bool, biased: bool, threads: int, tmp_path: Path) -> None:
    stored, given = weights(biased=biased), inputs_of(batch, tokens)
    model = layer_model(batch, tokens, stored, half=half)
    found = run(model, tmp_path, given, threads)
    wanted = definition(given, stored)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4, err_msg=name)
    decoder_rows.for_cpu(model)
    assert [kind for kind in kinds(model) if kind != "Cast"] == [decoder_rows.ROWS]


@here
def test_a_row_does_not_depend_on_the_others(tmp_path: Path) -> None:
    """Nor on how weights are kept for few rows."""
    stored, given = weights(biased=False), inputs_of(27, 1)
    whole = run(layer_model(27, 1, stored, half=True), tmp_path, given)
    for first, count in ((0, 1), (5, 2), (8, 3), (11, 4), (3, 6), (10, 11)):
        part = {name: array[first : first + count] for name, array in given.items()}
        found = run(layer_model(count, 1, stored, half=True), tmp_path, part)
        for name, value in found.items():
            np.testing.assert_array_equal(value, whole[name][first : first + count], err_msg=name)


@here
@pytest.mark.parametrize("graph", ["prefill_0", "prefill_1", "decode"])
def test_in_a_bundle(graph: str, tiny_bundle: Any) -> None:
    """Beside attention, which reads by token, caches by head, and the last query, which the next selection reads."""
    bundle = tiny_bundle(PLAN, batch=2)
    (record,) = [one for one in bundle.graphs(bundle.manifest.profiles[0].name) if one.name == graph]
    path = bundle.root / record.file
    runner = OrtLoader(threads=1, custom_ops=builds.ort_library())(path)
    rng = np.random.default_rng(0)
    given = {name: rng.standard_normal(spec.shape).astype(spec.dtype) for name, spec in runner.inputs.items()}
    given |= {name: np.array([3, 9], np.int32) for name in given if name.startswith(("length", "last"))}
    plain = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in plain.get_outputs()]
    found = runner.run(given)
    for name, value in zip(names, plain.run(names, given), strict=True):
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=2e-5, err_msg=name)
    model = read_graph(path)
    layers = kinds(model).count("Attention") or bundle.spec.decoder.num_layers
    for_cpu(model, Native(**{field.name: True for field in fields(Native)}))  # no other replacement is in the way
    rows, whole = kinds(model).count(decoder_rows.ROWS), kinds(model).count(layers_at_once.LAYERS)
    assert (rows, whole) == ((layers + 1, 0) if graph == "decode" else (0, 1))
    assert not {"Gemm", "RotaryEmbedding", "RMSNormalization"} & set(kinds(model)[:-2])  # before the output projection


@pytest.mark.parametrize("changed", ["unrotated", "scaled", "read", "bias", "precise"])
def test_other_forms_stay(changed: str) -> None:
    """Each changes one of the two halves; the other is replaced."""
    nodes = nodes_of(2, 37, biased=False)
    by_output = {node.output[0]: node for node in nodes}
    projects = changed in ("unrotated", "bias", "precise")
    if changed == "unrotated":  # a key that is turned with other tables
        by_output["k_heads"].input[1] = "sin"
    elif changed == "bias":
        by_output["v_rows"].input.append("norm")  # not of the products' size
    elif changed == "precise":
        by_output["normal"].attribute.append(helper.make_attribute("stash_type", 11))
    elif changed == "scaled":
        by_output["gate_rows"].attribute.append(helper.make_attribute("alpha", 2.0))
    else:  # the sum is wanted beside the layer
        nodes.append(helper.make_node("Mul", ["attended", "attended"], ["down_again"]))
    model = layer_model(2, 37, weights(biased=False), half=False, nodes=nodes)
    if changed == "read":
        model.graph.output.append(helper.make_tensor_value_info("down_again", TensorProto.FLOAT, (74, WIDTH)))
    decoder_rows.for_cpu(model)
    assert kinds(model).count(decoder_rows.ROWS) == 1
    assert ("gate_rows" in _made(model), "q_rows" in _made(model)) == (not projects, projects)


def test_large_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both halves together they may be too large where each is not."""
    project = sum(COUNTS.values()) * WIDTH
    feed = WIDTH * 24 + 3 * INNER * WIDTH
    for most, count in ((project + feed, 1), (feed, 2), (project, 1), (0, 0)):
        monkeypatch.setattr(decoder_layers, "MOST", most)
        model = layer_model(2, 37, weights(biased=False), half=False)
        decoder_rows.for_cpu(model)
        assert kinds(model).count(decoder_rows.ROWS) == count


def _made(model: onnx.ModelProto) -> set[str]:
    return {name for node in model.graph.node for name in node.output}
