"""Selection graphs against the reference: graphs/pruning/torch_scores.py for scores, the operators' references for the
rest."""

import numpy as np
import pytest
import torch

from graphs.building.decoder_graphs import build_decoder_graphs, stream_inputs
from graphs.building.graph_builder import BuiltGraph, GraphBuilder
from graphs.building.portable_bodies import embed_bodies
from graphs.building.selection import add_selection
from graphs.ops import gather_tokens, select_tokens
from graphs.pruning.spatial_set import stage_seeds
from graphs.pruning.torch_scores import cosine_similarity, importance_scores
from graphs.records.plan import Stage
from tests.graphs.models import PREFIX, Runner, sample_model, write_graphs

BALANCED = Stage(layer=2, keep=8, attention_quota=3, pool=6, boundary=8, diversity_quota=3, seeds=4)
SECOND = Stage(layer=4, keep=5, attention_quota=2, pool=3, boundary=5, diversity_quota=1)
ATTENTION = Stage(layer=3, keep=7, attention_quota=7, pool=9, boundary=6)
DIVERSE = Stage(layer=0, keep=8, diversity_quota=8)
FIRST = Stage(layer=0, keep=9, attention_quota=9, pool=9)
COVERING = Stage(layer=0, keep=9, importance="norm", diversity="coverage", features="centred", weights="scores")
LATER = Stage(
    layer=3, keep=5, attention_quota=2, pool=3, boundary=5, diversity_quota=1, diversity="coverage", weights="scores"
)
CLASS = Stage(layer=0, keep=8, importance="vision-cls", attention_quota=5, pool=6, boundary=4)
CLASS_COVERING = Stage(layer=0, keep=9, importance="vision-cls", diversity="coverage", weights="scores")
PLAIN_COVERAGE = Stage(layer=2, keep=8, importance="random", diversity_quota=3, diversity="coverage")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def stage_inputs(sample, plan, number, batch):
    """Random rows with a zero row and two equal ones, random query and key, one item with padding."""
    generator = torch.Generator().manual_seed(number + 5)
    spec, profile = sample.spec.decoder, sample.profile(batch)
    tokens = profile.tokens_with(plan.tokens_before(number))
    hidden = torch.randn(batch, tokens, spec.hidden_size, generator=generator)
    hidden[:, PREFIX + 1] = 0
    hidden[:, PREFIX + 4] = hidden[:, PREFIX + 2]
    cos, sin = (torch.randn(batch, tokens, spec.head_dim // 2, generator=generator) for _ in range(2))
    last = torch.tensor([tokens - 1, tokens - 3][:batch], dtype=torch.int32)
    rows = profile.text_tokens if plan.importance_of(number).endswith("-text") else 1
    query = torch.randn(batch, spec.num_heads, rows, spec.head_dim, generator=generator)
    key = torch.randn(batch, spec.num_kv_heads, tokens, spec.head_dim, generator=generator)
    inputs = {"hidden": hidden, "cos": cos, "sin": sin, "last": last, "query": query, "key": key}
    if plan.importance_of(number) == "vision-cls":
        inputs["class_attention"] = torch.rand(batch, plan.image_tokens, generator=generator)
    return inputs


def reference(plan, number, inputs):
    stage, count = plan.stages[number], plan.tokens_before(number)
    scores = importance_scores(
        plan,
        number,
        prefix_tokens=PREFIX,
        hidden=inputs["hidden"],
        last=inputs["last"],
        query=inputs["query"],
        key=inputs["key"],
        vision_cls=inputs.get("class_attention"),
    )
    image = inputs["hidden"][:, PREFIX : PREFIX + count]
    if stage.features == "centred":
        image = image - image.sum(1, keepdim=True) / count
    seeds = stage_seeds(plan, number)
    indices = select_tokens.reference(
        scores,
        cosine_similarity(image) if stage.needs_similarity else None,
        None if seeds is None else torch.from_numpy(seeds),
        **stage.attributes,
    )
    return scores, indices


CASES = [
    ("last-token", (BALANCED, SECOND)),
    ("mean-text", (BALANCED, SECOND)),
    ("similar-text", (BALANCED, SECOND)),
    ("random", (FIRST, SECOND)),
    ("pivot-distance", (FIRST,)),
    ("last-token", (DIVERSE,)),
    ("last-token", (ATTENTION,)),
    ("last-token", (COVERING, LATER)),
    ("mean-text", (PLAIN_COVERAGE, LATER)),
    ("last-token", (CLASS, SECOND)),
    ("last-token", (CLASS_COVERING, LATER)),
]


# Each case in both sets of operators and with both batches, and each set of operators with both batches: half of all.
SHAPES = [(18, 1), (23, 2), (18, 2), (23, 1)]
DRAWN = [
    (*case, *shape) for number, case in enumerate(CASES) for shape in (SHAPES[:2] if number % 2 == 0 else SHAPES[2:])
]


@pytest.mark.parametrize(("importance", "stages", "opset", "batch"), DRAWN)
def test_selection_is_the_references(importance, stages, opset, batch, models, tmp_path):
    sample = sample_model("mistral-gqa", models)
    plan = sample.plan(*stages, importance=importance)
    graphs = build_decoder_graphs(sample.spec, sample.checkpoint, plan, sample.profile(batch), opset=opset)
    run = Runner(write_graphs([g for g in graphs if g.name.startswith("select")], sample.checkpoint, tmp_path))
    for number, stage in enumerate(plan.stages):
        inputs = stage_inputs(sample, plan, number, batch)
        scores, indices = reference(plan, number, inputs)
        looks = stage.layer > 0 and (stage.importance or importance) in ("last-token", "mean-text", "similar-text")
        feeds = {name: value for name, value in inputs.items() if looks or name not in ("query", "key")}
        got = run(f"select_{number}", **feeds)
        np.testing.assert_allclose(got["scores"], scores, atol=1e-6, rtol=1e-5)
        assert got["indices"].dtype == np.int32
        np.testing.assert_array_equal(got["indices"], indices)
        for name in ("hidden", "cos", "sin"):
            count = plan.tokens_before(number)
            wanted = gather_tokens.reference(inputs[name], indices, start=PREFIX, count=count)
            np.testing.assert_array_equal(got[f"{name}_out"], wanted)
        np.testing.assert_array_equal(got["last_out"], inputs["last"] - (plan.tokens_before(number) - stage.keep))


def test_keep_0_drops_exactly_the_image(models, tmp_path):
    sample = sample_model("mistral-gqa", models)
    plan = sample.plan(BALANCED, Stage(layer=3, keep=0))
    graphs = build_decoder_graphs(sample.spec, sample.checkpoint, plan, sample.profile(2))
    drop = next(graph for graph in graphs if graph.name == "select_1")
    assert {node.op_type for node in drop.model.graph} <= {"Slice", "Concat", "Sub"}
    run = Runner(write_graphs([drop], sample.checkpoint, tmp_path))
    inputs = stage_inputs(sample, plan, 1, 2)
    got = run("select_1", **{name: inputs[name] for name in ("hidden", "cos", "sin", "last")})
    assert set(got) == {"hidden_out", "cos_out", "sin_out", "last_out"}
    for name in ("hidden", "cos", "sin"):
        wanted = torch.cat([inputs[name][:, :PREFIX], inputs[name][:, PREFIX + 8 :]], 1)
        np.testing.assert_array_equal(got[f"{name}_out"], wanted)
    np.testing.assert_array_equal(got["last_out"], inputs["last"] - 8)


def test_operator_nodes_carry_the_contract(models):
    sample = sample_model("mistral-gqa", models)
    plan = sample.plan(BALANCED)
    graphs = build_decoder_graphs(sample.spec, sample.checkpoint, plan, sample.profile())
    model = next(graph for graph in graphs if graph.name == "select_0").model
    nodes = [node for node in model.graph if node.domain == "btp"]
    assert [node.op_type for node in nodes] == ["BtpSelectTokens"] + ["BtpGatherTokens"] * 3
    attributes = [{name: attribute.value for name, attribute in node.attributes.items()} for node in nodes]
    plugin = {"plugin_version": "1", "plugin_namespace": ""}
    assert attributes[0] == {
        "keep": 8, "attention_quota": 3, "diversity_quota": 3, "pool": 6, "boundary": 8, **plugin
    }  # fmt: skip
    assert attributes[1:] == [{"start": PREFIX, "count": 16, **plugin}] * 3
    assert model.graph.opset_imports == {"": 23, "btp": 1}
    assert {name for _, name, _ in model.functions} == {"BtpSelectTokens", "BtpGatherTokens"}


# The rules of stages: one stage alone, and two stages of one graph.

BEFORE = Stage(layer=0, keep=9, attention_quota=2, pool=4, boundary=8, diversity_quota=3, seeds=2)
MIDDLE = Stage(layer=3, keep=5, diversity_quota=2)
FARTHEST, UNIFORM = {}, {"diversity": "coverage"}
WEIGHTED = {"diversity": "coverage", "weights": "scores"}


def chained(sample, plan, *, opset, batch=2) -> BuiltGraph:
    """One graph of all stages of a plan; outputs indices_<j>."""
    profile = sample.profile(batch)
    b = GraphBuilder("stages", opset=opset)
    stream = stream_inputs(b, sample.spec, profile, plan.image_tokens)
    for number in range(len(plan.stages)):
        selection = add_selection(b, plan, number, profile, stream, query=None, key=None)
        stream = selection.stream
        b.output(selection.indices, f"indices_{number}")
    for name in ("hidden", "cos", "sin", "last"):
        b.output(getattr(stream, name), f"{name}_out")
    embed_bodies(b)
    return b.build()


def ruled(sample, rules):
    """BEFORE and MIDDLE with those rules, scored by lot."""
    stages = [stage.model_copy(update=rule) for stage, rule in zip((BEFORE, MIDDLE), rules, strict=False)]
    return sample.plan(*stages, importance="random")


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize(
    ("rules", "bodies"),
    [
        ([UNIFORM], "exact"),
        ([WEIGHTED], "exact"),
        ([UNIFORM, WEIGHTED], "both"),
        ([WEIGHTED, FARTHEST], "both"),
        ([FARTHEST, FARTHEST], "farthest"),
    ],
)
def test_every_stage_picks_by_its_own_rule(rules, bodies, opset, models, tmp_path):
    sample = sample_model("mistral-gqa", models)
    plan, distant = ruled(sample, rules), ruled(sample, [FARTHEST] * len(rules))
    graph = chained(sample, plan, opset=opset)
    inputs = stage_inputs(sample, plan, 0, 2)
    run = Runner(write_graphs([graph], sample.checkpoint, tmp_path))
    got = run("stages", **{name: inputs[name] for name in ("hidden", "cos", "sin", "last")})
    by_distance = reference(distant, 0, inputs)[1].tolist()
    for number in range(len(rules)):
        indices = reference(plan, number, inputs)[1]
        np.testing.assert_array_equal(got[f"indices_{number}"], indices)
        count = plan.tokens_before(number)
        inputs["hidden"] = gather_tokens.reference(inputs["hidden"], indices, start=PREFIX, count=count)
    if rules[0] != FARTHEST:
        assert got["indices_0"].tolist() != by_distance, "this input does not tell the rules apart"
    body = next(body for (_, name, _), body in graph.model.functions.items() if name == "BtpSelectTokens")
    strings = [node for node in body.all_nodes() if node.op_type == "Unique"]
    assert bool(strings) == (bodies == "both")
    assert ("OptionalHasElement" in {node.op_type for node in body.all_nodes()}) == (bodies != "exact")


def test_nodes_carry_a_rule_that_is_not_the_default(models):
    sample = sample_model("mistral-gqa", models)
    graph = chained(sample, ruled(sample, [WEIGHTED, FARTHEST]), opset=23)
    nodes = [node for node in graph.model.graph if node.op_type == "BtpSelectTokens"]
    rules = [{name: node.attributes[name].value for name in ("diversity_rule", "weighted") if name in node.attributes}
             for node in nodes]  # fmt: skip
    assert rules == [{"diversity_rule": "coverage", "weighted": 1}, {}]
