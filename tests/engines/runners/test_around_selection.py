"""What stands around a selection as operators of btp_ort: what the file's nodes say, and other forms stay."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import ModelProto, NodeProto, helper

from engines.runners.on_cpu import around_selection
from engines.runners.on_cpu.around_selection import ROWS_AT, SCORES, STREAM
from graphs.building.decoder import Stream, last_query
from graphs.building.graph_builder import GraphBuilder
from graphs.dtypes import Precision
from graphs.pruning.torch_scores import importance_scores
from graphs.records.errors import BtpError
from graphs.records.plan import PruningPlan, Stage
from graphs.records.shapes import ShapeProfile
from tests.engines.runners.sessions import opened, with_selection

Array = np.ndarray[Any, np.dtype[Any]]
BATCH, PREFIX, TOKENS, WIDTH, SIZE, KV_HEADS = 2, 3, 12, 8, 20, 2  # more than a vector of numbers in a head
PROFILE = ShapeProfile(
    name="p", batch=BATCH, image_size=(28, 28), grid=(3, 4), prefix_tokens=PREFIX, image_tokens=TOKENS, text_tokens=5,
    new_tokens=1,
)  # fmt: skip
S = PROFILE.tokens_with(TOKENS)
BY_ATTENTION = Stage(layer=1, keep=5, attention_quota=5, pool=9)
BY_TEXT = Stage(layer=1, keep=5, attention_quota=5, pool=9, importance="mean-text")


def plan_of(stage: Stage) -> PruningPlan:
    return PruningPlan(model_type="llava", num_layers=4, image_tokens=TOKENS, grid=(3, 4), stages=(stage,))


def stage_model(
    stage: Stage, *, heads: int = KV_HEADS, opset: int = 23, precision: Precision = "float32"
) -> ModelProto:
    """The graph of a stage that looks from a row of the query, taken in it."""
    b = GraphBuilder("select_0", opset=opset, precision=precision)
    cos, sin = (b.input(name, (BATCH, S, SIZE // 2)) for name in ("cos", "sin"))
    last = b.input("last", (BATCH,), ir.DataType.INT32)
    query, key = b.input("query", (BATCH, heads, S, SIZE)), b.input("key", (BATCH, KV_HEADS, S, SIZE))
    rows = last_query(b, query, last) if stage is not BY_TEXT else b.slice(query, 2, S - 5, S, "text_query")
    stream = Stream(b.input("hidden", (BATCH, S, WIDTH)), cos, sin, last)
    return with_selection(b, plan_of(stage), PROFILE, stream, query=rows, key=key)


def inputs(heads: int) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    shapes = {"hidden": (S, WIDTH), "cos": (S, SIZE // 2), "sin": (S, SIZE // 2)}
    shapes |= {"query": (heads, S, SIZE), "key": (KV_HEADS, S, SIZE)}
    made = {name: rng.standard_normal((BATCH, *shape), np.float32) for name, shape in shapes.items()}
    return made | {"last": np.array([S - 1, S - 4], np.int32)}


def replaced(model: ModelProto) -> list[str]:
    """What nodes are left, as when a session is prepared."""
    around_selection.for_cpu(model)
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("heads", [KV_HEADS, 3 * KV_HEADS])
def test_is_what_the_nodes_say(heads: int, opset: int, tmp_path: Path) -> None:
    model, given = stage_model(BY_ATTENTION, heads=heads, opset=opset), inputs(heads)
    found = opened(model, tmp_path).run(given)
    wanted = opened(model, tmp_path, custom_ops=None).run(given)  # the file's own nodes
    rows = np.stack([given["query"][sample, :, [place]] for sample, place in enumerate(given["last"])])
    torch_inputs = {name: torch.from_numpy(given[name]) for name in ("hidden", "last", "key")}
    scores = importance_scores(
        plan_of(BY_ATTENTION), 0, prefix_tokens=PREFIX, query=torch.from_numpy(rows).transpose(1, 2), **torch_inputs
    )
    np.testing.assert_allclose(found["scores"], scores, rtol=1e-5)
    for name in ("indices", "hidden_out", "cos_out", "sin_out", "last_out"):
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
    assert sorted(replaced(model)) == sorted([ROWS_AT, SCORES, "BtpSelectTokens", STREAM])


def test_other_forms_stay() -> None:
    """Half precision, whose scores are in float32, rows of all the text, and a length that is another."""
    assert {ROWS_AT, SCORES, STREAM} & set(replaced(stage_model(BY_ATTENTION, precision="float16"))) == {SCORES}
    assert SCORES not in replaced(stage_model(BY_TEXT))
    model = stage_model(BY_ATTENTION)
    (gone,) = (stored for stored in model.graph.initializer if stored.name.endswith("dropped"))
    gone.raw_data = np.array([3], np.int32).tobytes()
    assert STREAM not in replaced(model)


def single(node: NodeProto, given: dict[str, Array], folder: Path) -> Any:
    kinds = {np.dtype(np.float32): 1, np.dtype(np.int32): 6}
    values = [helper.make_tensor_value_info(n, kinds[a.dtype], a.shape) for n, a in given.items()]
    kind = helper.make_tensor_value_info("out", 1, [1, 2] if node.op_type == SCORES else [1, 1, 1, 4])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("btp", 1)]
    model = helper.make_model(helper.make_graph([node], "g", values, [kind]), opset_imports=opsets, ir_version=10)
    return opened(model, folder).run(given)


def test_a_key_may_have_further_rows(tmp_path: Path) -> None:
    """As in a cache: what lies behind the last token is not read, whatever it is."""
    rng, settings = np.random.default_rng(1), {"start": 1, "count": 2, "scale": 0.5}
    given = {
        "query": rng.standard_normal((1, 1, 1, 4), np.float32),
        "key": rng.standard_normal((1, 1, 5, 4), np.float32),
    }
    given["last"] = np.array([3], np.int32)
    node = helper.make_node(SCORES, list(given), ["out"], domain="btp", **settings)
    short = single(node, given, tmp_path)["out"]
    given["key"] = np.concatenate([given["key"][:, :, :4], np.full((1, 1, 9, 4), np.nan, np.float32)], 2)
    np.testing.assert_array_equal(single(node, given, tmp_path)["out"], short)
    given["last"][:] = 1  # the second of the two tokens lies behind
    assert single(node, given, tmp_path)["out"][0, 1] == 0


@pytest.mark.parametrize("kind", [SCORES, ROWS_AT])
def test_a_place_that_is_none_is_refused(kind: str, tmp_path: Path) -> None:
    given: dict[str, Array] = {"query": np.zeros((1, 1, 1, 4), np.float32), "key": np.zeros((1, 1, 5, 4), np.float32)}
    given = {name: array for name, array in given.items() if kind == SCORES or name == "key"}
    given["last"] = np.array([5], np.int32)
    settings = {"start": 1, "count": 2, "scale": 0.5} if kind == SCORES else {}
    node = helper.make_node(kind, list(given), ["out"], domain="btp", **settings)
    with pytest.raises(BtpError, match=f"{kind}: last is 5, wanted 0 to 4"):
        single(node, given, tmp_path)
