"""Attention in other nodes on a CPU: what the definition gives, wherever they stand in, and left alone elsewhere."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import NodeProto, TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument, RuntimeException

from engines.runners.on_cpu.causal_attention import NODE, OWN, for_cpu
from tests.engines.native import builds
from tests.engines.runners.native_cpu import here
from tests.engines.runners.sessions import opened

BATCH, HEADS, KV_HEADS, TOKENS, SIZE = 2, 4, 2, 37, 16
QUERY, KEY = (BATCH, HEADS, TOKENS, SIZE), (BATCH, KV_HEADS, TOKENS, SIZE)

BY_TOKEN = {"query": (BATCH, TOKENS, HEADS, SIZE), "key": (BATCH, TOKENS, KV_HEADS, SIZE)}


def attention_model(
    before: list[NodeProto],
    inputs: dict[str, tuple[int, ...]],
    more: tuple[str, ...] = (),
    *,
    element: int = TensorProto.FLOAT,
    **settings: Any,
) -> onnx.ModelProto:
    """`before` makes what of query, key and value is no input; `more`: outputs beside the context."""
    shapes = {"query": QUERY, "key": KEY, "value": KEY, "context": QUERY}

    def tensor(name: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, element, shape)

    node = helper.make_node("Attention", ["query", "key", "value"], ["context"], **{"is_causal": 1} | settings)
    graph = helper.make_graph(
        [*before, node],
        "attention",
        [tensor(name, shape) for name, shape in inputs.items()],
        [tensor(name, shapes[name]) for name in ("context", *more)],
        value_info=[tensor(name, shape) for name, shape in shapes.items() if name not in (*inputs, "context", *more)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def causal(query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float) -> np.ndarray:
    """The definition, in float64, one query at a time."""
    context = np.zeros(query.shape)
    for b, h, i in np.ndindex(*query.shape[:3]):
        group = h // (query.shape[1] // key.shape[1])
        scores = key[b, group, : i + 1].astype(np.float64) @ query[b, h, i] * scale
        weights = np.exp(scores - scores.max())
        context[b, h, i] = weights / weights.sum() @ value[b, group, : i + 1]
    return context


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Halves of D turned by [B,S,D/2], x [B,n,S,D]."""
    a, b = np.split(x.astype(np.float64), 2, axis=3)
    c, s = cos[:, None], sin[:, None]
    return np.concatenate([a * c - b * s, b * c + a * s], axis=3)


def run(
    model: onnx.ModelProto, folder: Path, inputs: dict[str, np.ndarray], *, native: bool = False
) -> dict[str, np.ndarray]:
    """As bundles are run on a CPU; native: with btp_ort."""
    return opened(model, folder, **({} if native else {"custom_ops": None})).run(inputs)


def rows_of_tokens(x: np.ndarray) -> np.ndarray:
    """[B,n,S,D] as [B,S,n*D]."""
    return x.transpose(0, 2, 1, 3).reshape(len(x), x.shape[2], -1)


def native(query: np.ndarray, key: np.ndarray, value: np.ndarray, threads: int = 1) -> np.ndarray:
    """The context [B,H,S,D] by btp_ort's operator itself."""
    given_rows = {n: rows_of_tokens(x) for n, x in (("query", query), ("key", key), ("value", value))}
    heads = {"num_heads": query.shape[1], "kv_num_heads": key.shape[1]}
    node = helper.make_node(OWN, list(given_rows), ["context"], domain="btp", **heads)
    shapes = {name: x.shape for name, x in given_rows.items()} | {"context": given_rows["query"].shape}
    tensors = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    graph = helper.make_graph([node], "attention", [tensors[name] for name in given_rows], [tensors["context"]])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("btp", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(builds.ort_library()))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, given_rows)
    batch, heads_, tokens, size = query.shape
    return np.asarray(found).reshape(batch, tokens, heads_, size).transpose(0, 2, 1, 3)


def values(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("scale", [None, 0.5])
def test_of_inputs(scale: float | None, tmp_path: Path) -> None:
    inputs = values({"query": QUERY, "key": KEY, "value": KEY})
    settings = {} if scale is None else {"scale": scale}
    model = attention_model([], {name: array.shape for name, array in inputs.items()}, **settings)
    wanted = causal(inputs["query"], inputs["key"], inputs["value"], scale or SIZE**-0.5)
    np.testing.assert_allclose(run(model, tmp_path, inputs)["context"], wanted, atol=2e-6)
    for_cpu(model)
    assert NODE in kinds(model) and "Attention" not in kinds(model)
    onnx.checker.check_model(model)


def test_of_projections_that_are_turned_and_rotated(tmp_path: Path) -> None:
    """As decoder layers have them: nothing is transposed before the node, and the key is rotated once."""
    before = [
        helper.make_node("Transpose", ["query_split"], ["query_unrotated"], perm=[0, 2, 1, 3]),
        helper.make_node("RotaryEmbedding", ["query_unrotated", "cos", "sin"], ["query"]),
        helper.make_node("Transpose", ["key_split"], ["key_unrotated"], perm=[0, 2, 1, 3]),
        helper.make_node("RotaryEmbedding", ["key_unrotated", "cos", "sin"], ["key"]),
        helper.make_node("Transpose", ["value_split"], ["value"], perm=[0, 2, 1, 3]),
    ]
    half = (BATCH, TOKENS, SIZE // 2)
    inputs = values(
        {"query_split": BY_TOKEN["query"], "key_split": BY_TOKEN["key"], "value_split": BY_TOKEN["key"], "cos": half,
         "sin": half}
    )  # fmt: skip
    model = attention_model(before, {name: array.shape for name, array in inputs.items()}, more=("key", "value"))
    found = run(model, tmp_path, inputs)
    query, key, value = (inputs[f"{name}_split"].transpose(0, 2, 1, 3) for name in ("query", "key", "value"))
    query, key = (rotated(x, inputs["cos"], inputs["sin"]) for x in (query, key))
    np.testing.assert_allclose(found["context"], causal(query, key, value, SIZE**-0.5), atol=1e-5)
    np.testing.assert_allclose(found["key"], key, atol=1e-5)
    np.testing.assert_array_equal(found["value"], value)
    for_cpu(model)
    assert kinds(model).count("RotaryEmbedding") == 2
    assert kinds(model).count("Transpose") == 3, "of key and value for the caches, and of the context"


@pytest.mark.parametrize("size", [1, 30])
def test_of_float16(size: int, tmp_path: Path) -> None:
    """Rounded once. Scores of thousands stay in float32, where the operator of the file has steps of 2."""
    inputs = values({"query": QUERY, "key": KEY, "value": KEY})
    inputs = {name: (x * (1 if name == "value" else size)).astype(np.float16) for name, x in inputs.items()}
    shapes = {name: array.shape for name, array in inputs.items()}
    model = attention_model([], shapes, element=TensorProto.FLOAT16, softmax_precision=TensorProto.FLOAT)
    found = run(model, tmp_path, inputs)["context"]
    assert found.dtype == np.float16
    query, key, value = (inputs[name].astype(np.float64) for name in ("query", "key", "value"))
    wanted = causal(query, key, value, SIZE**-0.5)
    rounding = np.spacing(np.abs(wanted).astype(np.float16)).astype(np.float64) / 2
    assert (np.abs(found - wanted) <= 2e-6 * size**2 + rounding).all()
    for_cpu(model)
    assert NODE in kinds(model) and "Attention" not in kinds(model)


@pytest.mark.parametrize("change", ["not causal", "bfloat16", "softcap", "softmax in float16"])
def test_others_stay(change: str) -> None:
    settings: dict[str, Any] = {
        "not causal": {"is_causal": 0}, "softcap": {"softcap": 2.0},
        "softmax in float16": {"softmax_precision": TensorProto.FLOAT16},
    }.get(change, {})  # fmt: skip
    element = TensorProto.BFLOAT16 if change == "bfloat16" else TensorProto.FLOAT
    model = attention_model([], {"query": QUERY, "key": KEY, "value": KEY}, element=element, **settings)
    before = model.SerializeToString()
    for_cpu(model)
    assert model.SerializeToString() == before


# -- by btp_ort -------------------------------------------------------------------------------------------------------


@here
@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2), heads=st.sampled_from([(1, 1), (3, 3), (4, 2), (6, 1)]), tokens=st.integers(1, 70),
    size=st.sampled_from([16, 32, 48, 80, 128]), threads=st.integers(1, 3), spread=st.sampled_from([1e-3, 1.0, 30.0]),
)  # fmt: skip
def test_native_is_the_definition(
    batch: int, heads: tuple[int, int], tokens: int, size: int, threads: int, spread: float
) -> None:
    rng = np.random.default_rng(tokens)
    query, key, value = (
        rng.standard_normal((batch, n, tokens, size)).astype(np.float32) for n in (heads[0], heads[1], heads[1])
    )
    query *= np.float32(spread)  # one key takes all, or all count alike
    wanted = causal(query, key, value, size**-0.5)
    np.testing.assert_allclose(native(query, key, value, threads), wanted, atol=3e-6 * max(1, spread))


@here
def test_native_does_not_depend_on_threads_or_later_tokens() -> None:
    """More tokens than keys are summed at once."""
    query, key, value = values({"query": (1, 3, 330, 32), "key": (1, 3, 330, 32), "value": (1, 3, 330, 32)}).values()
    whole = native(query, key, value)
    np.testing.assert_allclose(whole, causal(query, key, value, 32**-0.5), atol=3e-6)
    np.testing.assert_array_equal(native(query, key, value, threads=3), whole)
    less = native(query[:, :, :301], key[:, :, :301], value[:, :, :301])
    np.testing.assert_array_equal(less, whole[:, :, :301])


@here
def test_native_nan_stays_behind_the_diagonal() -> None:
    query, key, value = values({"query": (1, 1, 50, 16), "key": (1, 1, 50, 16), "value": (1, 1, 50, 16)}).values()
    key[0, 0, 40, 3] = np.nan
    found = native(query, key, value)
    assert np.isfinite(found[:, :, :40]).all() and np.isnan(found[:, :, 40:]).all()


@here
@pytest.mark.parametrize("scale", [None, SIZE**-0.5, 0.5])
def test_native_of_inputs(scale: float | None, tmp_path: Path) -> None:
    """Other scales are ONNX Runtime's."""
    inputs = values({"query": QUERY, "key": KEY, "value": KEY})
    chosen = {} if scale is None else {"scale": scale}
    model = attention_model([], {name: array.shape for name, array in inputs.items()}, **chosen)
    wanted = causal(inputs["query"], inputs["key"], inputs["value"], scale or SIZE**-0.5)
    np.testing.assert_allclose(run(model, tmp_path, inputs, native=True)["context"], wanted, atol=2e-6)
    for_cpu(model, native=True)
    assert (OWN in kinds(model)) == (scale != 0.5) and (NODE in kinds(model)) == (scale == 0.5)


@here
def test_native_refuses_other_sizes() -> None:
    good = np.zeros((1, 2, 3, 16), np.float32)
    with pytest.raises(InvalidArgument, match=r"query has shape .1,3,16., wanted .B,S,H D., D a multiple of 16"):
        native(good[..., :8], good[..., :8], good[..., :8])
    with pytest.raises(InvalidArgument, match=r"key has shape .1,2,32., wanted .1,3,32."):
        native(good, good[:, :, :2], good)
    with pytest.raises(RuntimeException, match="num_heads is 3, wanted a multiple of kv_num_heads, 2"):
        native(np.zeros((1, 3, 3, 16), np.float32), good, good)
