"""The importance rules against transformers' own attention weights and against plain numpy."""

import numpy as np
import pytest
import torch

from graphs.building.rope import rope_tables
from graphs.pruning.spatial_set import random_scores, spatial_seeds
from graphs.pruning.torch_scores import cosine_similarity, importance_scores, stage_similarity, text_weights
from graphs.records.errors import InputError
from graphs.records.plan import Stage
from tests.graphs.models import sample_model
from tests.graphs.reference import embeddings, run_layers

STAGE = Stage(layer=2, keep=6, attention_quota=6, pool=6)
PREFIX, IMAGE, TEXT_START = 3, 16, 19


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return sample_model("mistral-gqa", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def state(sample):
    """What stage 0 sees after layers 0 and 1, and transformers' own attention weights [B,H,S,S] of layer 1."""
    _, hidden = embeddings(sample, 2)
    tables = rope_tables(sample.checkpoint.config, hidden.shape[1])
    cos, sin = (torch.from_numpy(table)[None].repeat(2, 1, 1) for table in tables)
    decoder = sample.module.model.language_model
    before = run_layers(sample, 0, 1, hidden, cos, sin).hidden
    after = run_layers(sample, 1, 2, before, cos, sin)
    layer = decoder.layers[1]
    mask = torch.full((hidden.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    full = (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))
    implementation = decoder.config._attn_implementation
    layer.self_attn.config._attn_implementation = "eager"
    _, weights = layer.self_attn(layer.input_layernorm(before), position_embeddings=full, attention_mask=mask)
    layer.self_attn.config._attn_implementation = implementation
    return after, weights


LAST = torch.tensor([24, 22], dtype=torch.int32)


def test_last_token_is_its_attention_mean_over_heads(sample, state):
    after, weights = state
    query = after.query[torch.arange(2), :, LAST.long()][:, :, None]
    got = importance_scores(
        sample.plan(STAGE), 0, prefix_tokens=PREFIX, hidden=after.hidden, last=LAST, query=query, key=after.keys[1]
    )
    wanted = torch.stack([weights[item, :, LAST[item], PREFIX:TEXT_START].mean(0) for item in range(2)])
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


def test_mean_text_averages_the_real_rows(sample, state):
    after, weights = state
    got = importance_scores(
        sample.plan(STAGE, importance="mean-text"),
        0,
        prefix_tokens=PREFIX,
        hidden=after.hidden,
        last=LAST,
        query=after.query[:, :, TEXT_START:],
        key=after.keys[1],
    )
    wanted = [weights[i, :, TEXT_START : LAST[i] + 1, PREFIX:TEXT_START].mean((0, 1)) for i in range(2)]
    torch.testing.assert_close(got, torch.stack(wanted), atol=1e-6, rtol=1e-5)


def test_similar_text_averages_the_rows_nearest_to_the_image(sample, state):
    after, weights = state
    got = importance_scores(
        sample.plan(STAGE, importance="similar-text"),
        0,
        prefix_tokens=PREFIX,
        hidden=after.hidden,
        last=LAST,
        query=after.query[:, :, TEXT_START:],
        key=after.keys[1],
    )
    for item in range(2):
        rows = after.hidden[item].double().numpy()
        image = rows[PREFIX:TEXT_START].mean(0)
        text = range(TEXT_START, int(LAST[item]) + 1)
        cosine = np.array([rows[t] @ image / np.linalg.norm(rows[t]) / np.linalg.norm(image) for t in text])
        chosen = [t for t, value in zip(text, cosine, strict=True) if value >= cosine.mean()]
        assert 0 < len(chosen) < len(text)
        wanted = weights[item][:, chosen, PREFIX:TEXT_START].mean((0, 1))
        torch.testing.assert_close(got[item], wanted, atol=1e-6, rtol=1e-5)


def test_text_weights_when_all_rows_are_equally_similar(sample):
    hidden = torch.ones(1, 25, 8)
    weights = text_weights("similar-text", hidden, torch.tensor([21]), PREFIX, TEXT_START)
    torch.testing.assert_close(weights, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0, 0, 0]]))


def test_similarity_is_cosine_and_survives_zero_rows():
    hidden = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).half()
    hidden[1, 3] = 0
    got = cosine_similarity(hidden)
    assert got.dtype == torch.float32
    x = hidden.double()
    norm = x.norm(dim=-1, keepdim=True)
    norm[1, 3] = 1
    torch.testing.assert_close(got.double(), (x / norm) @ (x / norm).transpose(1, 2), atol=1e-6, rtol=0)
    assert got[1, 3].abs().max() == 0


def test_pivot_distance(sample):
    hidden = torch.randn(1, 25, 8, generator=torch.Generator().manual_seed(2))
    plan = sample.plan(Stage(layer=0, keep=10, attention_quota=10, pool=10), importance="pivot-distance")
    got = importance_scores(plan, 0, prefix_tokens=PREFIX, hidden=hidden, last=torch.tensor([24]))[0]
    pivots = spatial_seeds((4, 4), 8, "euclidean").tolist()
    similarity = cosine_similarity(hidden[:, PREFIX:TEXT_START])[0]
    for token in range(IMAGE):
        wanted = float("inf") if token in pivots else min(1 - float(similarity[token, p]) for p in pivots)
        assert got[token] == pytest.approx(wanted, abs=1e-6)


def test_random_and_layer_0(sample):
    hidden, last = torch.zeros(2, 25, 8), torch.tensor([24, 24])
    plan = sample.plan(Stage(layer=0, keep=8, attention_quota=8, pool=8), importance="random")
    got = importance_scores(plan, 0, prefix_tokens=PREFIX, hidden=hidden, last=last)
    assert got[0].tolist() == got[1].tolist() == random_scores(16, 0).tolist()
    diverse = sample.plan(Stage(layer=0, keep=8, diversity_quota=8))
    assert importance_scores(diverse, 0, prefix_tokens=PREFIX, hidden=hidden, last=last).tolist() == [[0.0] * 16] * 2


def test_norm_and_centred_similarity_are_numpys(sample):
    """Centred: minus the mean of the picture's own tokens; a token that is that mean has no direction."""
    hidden = torch.randn(2, 25, 8, generator=torch.Generator().manual_seed(4)) * 5 + 3
    stage = Stage(layer=0, keep=6, importance="norm", diversity="coverage", features="centred", weights="scores")
    plan = sample.plan(stage)
    image = hidden[:, PREFIX:TEXT_START].double().numpy()
    wanted = image - image.mean(axis=1, keepdims=True)
    norms = np.sqrt((wanted**2).sum(-1))
    got = importance_scores(plan, 0, prefix_tokens=PREFIX, hidden=hidden, last=torch.tensor([24, 24]))
    np.testing.assert_allclose(got, norms, rtol=1e-5)
    unit = wanted / norms[..., None]
    similarity = stage_similarity(stage, hidden[:, PREFIX:TEXT_START])
    np.testing.assert_allclose(similarity, unit @ unit.transpose(0, 2, 1), atol=1e-5)
    raw = stage_similarity(Stage(layer=0, keep=6, diversity_quota=6), hidden[:, PREFIX:TEXT_START])
    unit = image / np.linalg.norm(image, axis=-1, keepdims=True)
    np.testing.assert_allclose(raw, unit @ unit.transpose(0, 2, 1), atol=1e-5)


def test_vision_cls_is_given(sample):
    plan = sample.plan(
        Stage(layer=0, keep=6, importance="vision-cls", attention_quota=6, pool=6),
        Stage(layer=2, keep=3, attention_quota=3, pool=3),
    )
    given, last = torch.rand(1, IMAGE), torch.tensor([24])
    got = importance_scores(plan, 0, prefix_tokens=PREFIX, hidden=torch.zeros(1, 25, 8), last=last, vision_cls=given)
    assert torch.equal(got, given)
    with pytest.raises(InputError, match="no attention of the vision tower"):
        importance_scores(plan, 0, prefix_tokens=PREFIX, hidden=torch.zeros(1, 25, 8), last=last)


def test_attention_rules_need_query_and_key(sample):
    with pytest.raises(InputError, match="no query and key"):
        importance_scores(
            sample.plan(STAGE), 0, prefix_tokens=PREFIX, hidden=torch.zeros(1, 25, 8), last=torch.tensor([24])
        )
