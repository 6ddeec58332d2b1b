"""All layers of a segment as one operator of btp_ort: the definition, and chains with something else in them stay."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import NodeProto, TensorProto, helper, numpy_helper

from engines.runners.on_cpu import causal_attention, decoder_rows, layers_at_once
from engines.runners.onnxruntime import OrtLoader
from graphs.records.errors import BtpError, InputError
from tests.engines.native import builds
from tests.engines.runners.native_cpu import here, run
from tests.engines.runners.test_causal_attention import causal, rotated

Array = np.ndarray[Any, np.dtype[Any]]
WIDTH, INNER, HEADS, KV_HEADS, SIZE, EPSILON = 40, 56, 4, 2, 16, 1e-5
COUNTS = {"q": HEADS * SIZE, "k": KV_HEADS * SIZE, "v": KV_HEADS * SIZE}
LAYERS = 3


def weights(*, biased: bool) -> dict[str, Array]:
    """Of all layers, `<name>.<layer>`; numbers that float16 holds."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {name: (count, WIDTH) for name, count in COUNTS.items()}
    shapes |= {"out": (WIDTH, HEADS * SIZE), "gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
    shapes |= {"norm": (WIDTH,), "feed_norm": (WIDTH,)}
    shapes |= {f"{name}_bias": (count,) for name, count in COUNTS.items() if biased}
    return {
        f"{name}.{layer}": (rng.standard_normal(shape) * 0.4).astype(np.float16)
        for layer in range(LAYERS)
        for name, shape in shapes.items()
    }


def nodes_of(layer: int, *, biased: bool) -> list[NodeProto]:
    """A layer as graphs have it: rows.<layer> -> rows.<layer + 1>, and key and value by head."""

    def make(kind: str, inputs: str, output: str, **attributes: Any) -> NodeProto:
        names = [name if name in ("cos", "sin") else f"{name}.{layer}" for name in inputs.split()]
        return helper.make_node(kind, names, [f"{output}.{layer}"], **attributes)

    nodes = [make("RMSNormalization", "rows norm", "normal", axis=-1, epsilon=EPSILON)]
    for name in COUNTS:
        turned = f"{name}_heads" if name == "v" else f"{name}_unrotated"
        bias = f" {name}_bias" if biased else ""
        nodes += [make("Gemm", f"normal {name}{bias}", f"{name}_rows", transB=1)]
        nodes += [helper.make_node("Reshape", [f"{name}_rows.{layer}", f"{name}_sizes"], [f"{name}_split.{layer}"])]
        nodes += [make("Transpose", f"{name}_split", turned, perm=[0, 2, 1, 3])]
        nodes += [] if name == "v" else [make("RotaryEmbedding", f"{turned} cos sin", f"{name}_heads")]
    nodes += [
        make("Attention", "q_heads k_heads v_heads", "attended", is_causal=1),
        make("Transpose", "attended", "attended_split", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", [f"attended_split.{layer}", "context_sizes"], [f"context.{layer}"]),
        make("Gemm", "context out", "projected", transB=1),
        make("Add", "rows projected", "sum"),
        make("RMSNormalization", "sum feed_norm", "fed", axis=-1, epsilon=EPSILON),
        make("Gemm", "fed gate", "gate_rows", transB=1),
        make("Sigmoid", "gate_rows", "sigmoid"),
        make("Mul", "gate_rows sigmoid", "silu"),
        make("Gemm", "fed up", "up_rows", transB=1),
        make("Mul", "silu up_rows", "gated"),
        make("Gemm", "gated down", "down_rows", transB=1),
        helper.make_node("Add", [f"sum.{layer}", f"down_rows.{layer}"], [f"rows.{layer + 1}"]),
    ]
    return nodes


def stack_model(
    batch: int, tokens: int, stored: dict[str, Array], *, half: bool = False, more: tuple[str, ...] = ()
) -> onnx.ModelProto:
    """more: outputs beside the last rows, keys and values."""
    rows, heads = (batch * tokens, WIDTH), {n: (batch, c // SIZE, tokens, SIZE) for n, c in COUNTS.items()}
    shapes: dict[str, tuple[int, ...]] = {n: (batch, tokens, SIZE // 2) for n in ("cos", "sin")}
    sizes: dict[str, tuple[int, ...]] = {"context_sizes": (batch * tokens, HEADS * SIZE)}
    nodes = []
    for layer in range(LAYERS):
        nodes += nodes_of(layer, biased="q_bias.0" in stored)
        own: dict[str, tuple[int, ...]] = {n: rows for n in ("rows", "normal", "projected", "sum", "fed", "down_rows")}
        own |= {n: (rows[0], INNER) for n in ("gate_rows", "sigmoid", "silu", "up_rows", "gated")}
        own |= {"attended": heads["q"], "attended_split": (batch, tokens, HEADS, SIZE)}
        own |= {"context": (rows[0], HEADS * SIZE)}
        for name, count in COUNTS.items():
            own |= {f"{name}_rows": (rows[0], count), f"{name}_split": (batch, tokens, count // SIZE, SIZE)}
            own |= {f"{name}_unrotated": heads[name], f"{name}_heads": heads[name]}
            sizes[f"{name}_sizes"] = (batch, tokens, count // SIZE, SIZE)
        shapes |= {f"{name}.{layer}": shape for name, shape in own.items()}
    shapes |= {f"rows.{LAYERS}": rows, "again": heads["k"]}
    nodes += [helper.make_node("Identity", ["k_heads.1"], ["again"])] if "again" in more else []
    kept = [numpy_helper.from_array(np.array(shape, np.int64), name) for name, shape in sizes.items()]
    casts = []
    for name, array in stored.items():
        wide = array if half else array.astype(np.float32)
        kept.append(numpy_helper.from_array(wide, f"{name}.half" if half else name))
        casts += [helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT)] if half else []
    tensors = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in shapes.items()}
    given_, out = [tensors.pop(name) for name in ("rows.0", "cos", "sin")], [f"rows.{LAYERS}", *more]
    out += [f"{name}_heads.{layer}" for layer in range(LAYERS) for name in "kv"]
    outputs = [tensors.pop(name) for name in out]
    graph = helper.make_graph([*casts, *nodes], "layers", given_, outputs, kept, value_info=tensors.values())
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def inputs_of(batch: int, tokens: int) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    angles = rng.uniform(0, 6, (batch, tokens, SIZE // 2))
    made = {"rows.0": rng.standard_normal((batch * tokens, WIDTH)), "cos": np.cos(angles), "sin": np.sin(angles)}
    return {name: array.astype(np.float32) for name, array in made.items()}


def definition(inputs: dict[str, Array], stored: dict[str, Array]) -> dict[str, Array]:
    """In float64, one layer after another."""
    batch, tokens, _ = inputs["cos"].shape
    rows, made = inputs["rows.0"].astype(np.float64), {}

    def norm(x: Array, scale: Array) -> Array:
        normal: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * scale
        return normal

    for layer in range(LAYERS):
        w = {name.partition(".")[0]: a.astype(np.float64) for name, a in stored.items() if name.endswith(f".{layer}")}
        normal = norm(rows, w["norm"])
        heads = {}
        for name, count in COUNTS.items():
            whole = normal @ w[name].T + w.get(f"{name}_bias", np.zeros(count))
            split = whole.reshape(batch, tokens, count // SIZE, SIZE).transpose(0, 2, 1, 3)
            heads[name] = split if name == "v" else rotated(split, inputs["cos"], inputs["sin"])
            made[f"{name}_heads.{layer}"] = heads[name]
        context = causal(heads["q"], heads["k"], heads["v"], SIZE**-0.5)
        rows = rows + context.transpose(0, 2, 1, 3).reshape(batch * tokens, -1) @ w["out"].T
        fed = norm(rows, w["feed_norm"])
        gate = fed @ w["gate"].T
        rows = rows + (gate / (1 + np.exp(-gate)) * (fed @ w["up"].T)) @ w["down"].T
        made[f"rows.{layer + 1}"] = rows
    return made


def replaced(model: onnx.ModelProto) -> list[str]:
    """What nodes are left, as when a session is prepared."""
    causal_attention.for_cpu(model, native=True)
    decoder_rows.for_cpu(model)
    layers_at_once.for_cpu(model)
    return [node.op_type for node in model.graph.node if node.op_type not in ("Cast", "Reshape")]


@here
@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 3), tokens=st.integers(2, 140), threads=st.integers(1, 5), half=st.booleans(),
    biased=st.booleans(), query=st.booleans(),
)  # fmt: skip
def test_is_the_definition(
    tmp_path_factory: pytest.TempPathFactory,
    batch: int,
    tokens: int,
    threads: int,
    half: bool,
    biased: bool,
    query: bool,
) -> None:
    stored, inputs = weights(biased=biased), inputs_of(batch, tokens)
    more = (f"q_heads.{LAYERS - 1}",) if query else ()
    model = stack_model(batch, tokens, stored, half=half, more=more)
    found = run(model, tmp_path_factory.mktemp("layers"), inputs, threads)
    wanted = definition(inputs, stored)
    assert len(found) == 1 + len(more) + 2 * LAYERS
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted[name], rtol=2e-4, atol=2e-4, err_msg=name)
    assert replaced(model) == [layers_at_once.LAYERS]


@here
def test_nothing_depends_on_threads_later_tokens_or_other_samples(tmp_path: Path) -> None:
    """To the last bit; often enough that threads meet in different orders. More tokens than keys are summed at once."""
    stored, inputs = weights(biased=False), inputs_of(2, 300)
    model = stack_model(2, 300, stored)
    whole = run(model, tmp_path, inputs)
    for threads in (2, 3, 7):
        for _ in range(5):
            for name, value in run(model, tmp_path, inputs, threads).items():
                np.testing.assert_array_equal(value, whole[name], err_msg=name)
    part = {name: array.reshape(2, 300, -1)[1:, :85] for name, array in inputs.items()}
    part["rows.0"] = part["rows.0"].reshape(85, WIDTH)
    for name, value in run(stack_model(1, 85, stored), tmp_path, part, 2).items():
        same = whole[name].reshape(2, 300, -1)[1, :85] if name.startswith("rows") else whole[name][1, :, :85]
        np.testing.assert_array_equal(value.reshape(same.shape), same, err_msg=name)


@here
def test_keys_and_values_go_straight_into_caches(tmp_path: Path) -> None:
    """Of more rows, another number of them each; what lies behind the tokens' stays as it was."""
    inputs, path = inputs_of(2, 75), tmp_path / "layers.onnx"
    onnx.save(stack_model(2, 75, weights(biased=False)), path)
    loader = OrtLoader(threads=2, custom_ops=builds.ort_library())
    runner = loader(path)
    wanted, kind = runner.run(inputs), np.dtype(np.float32)
    roomy = [name for name, spec in runner.outputs.items() if spec.roomy]
    assert set(roomy) == set(wanted) - {f"rows.{LAYERS}"}
    caches = {name: loader.allocate(kind, (2, KV_HEADS, 75 + place, SIZE)) for place, name in enumerate(roomy)}
    given_ = {name: loader.allocate(kind, spec.shape) for name, spec in runner.inputs.items()}
    for name, buffer in given_.items():
        buffer.write(inputs[name])
    for cache in caches.values():
        cache.write(np.full(cache.shape, 7))
    rows = loader.allocate(kind, wanted[f"rows.{LAYERS}"].shape)
    runner.bind(given_, {**caches, f"rows.{LAYERS}": rows})()
    np.testing.assert_array_equal(rows.read(), wanted[f"rows.{LAYERS}"])
    for name, cache in caches.items():
        np.testing.assert_array_equal(cache.read()[:, :, :75], wanted[name], err_msg=name)
        assert (cache.read()[:, :, 75:] == 7).all(), name
    caches[roomy[0]] = loader.allocate(kind, (2, KV_HEADS, 74, SIZE))
    with pytest.raises(InputError, match=rf"{roomy[0]} is float32 .2, 2, 74, 16."):
        runner.bind(given_, {**caches, f"rows.{LAYERS}": rows})


def test_no_room_where_keys_are_read_in_the_graph() -> None:
    """By a selection inside a whole graph."""
    model = stack_model(2, 37, weights(biased=False), more=("again",))
    assert replaced(model) == [layers_at_once.LAYERS, "Identity"]
    assert not [value.name for value in model.graph.input if value.name.startswith(layers_at_once.ROOM)]


def test_is_two_nodes_where_something_else_is_read() -> None:
    """Rows, or a query, of a layer that is not the last; a key in the order of tokens."""
    own, rows = causal_attention.OWN, decoder_rows.ROWS
    for name in ("rows.1", "q_heads.1"):
        kinds = replaced(stack_model(2, 37, weights(biased=False), more=(name,)))
        assert kinds.count(rows) == LAYERS + 1 and kinds.count(own) == LAYERS, name


def test_is_two_nodes_where_tables_differ() -> None:
    model = stack_model(2, 37, weights(biased=False))
    model.graph.input.extend([helper.make_tensor_value_info("other", TensorProto.FLOAT, (2, 37, SIZE // 2))])
    for node in model.graph.node:
        if node.op_type == "RotaryEmbedding" and node.output[0].endswith(".1"):
            node.input[1] = "other"
    assert layers_at_once.LAYERS not in replaced(model)


@here
def test_refuses_layers_that_do_not_fit(tmp_path: Path) -> None:
    model = stack_model(1, 37, weights(biased=False))
    replaced(model)
    (node,) = (node for node in model.graph.node if node.op_type == layers_at_once.LAYERS)
    (layers,) = (attribute for attribute in node.attribute if attribute.name == "layers")
    layers.i = 0
    with pytest.raises(BtpError, match="there are 0 layers with heads of 16, wanted layers of the same sizes"):
        run(model, tmp_path, inputs_of(1, 37))
