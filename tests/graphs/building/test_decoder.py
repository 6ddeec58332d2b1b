"""Segment, head and decode graphs against transformers' own layers, at random weights, both operator sets."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from graphs.building.decoder_graphs import build_decoder_graphs
from graphs.building.rope import rope_tables
from graphs.records.plan import PruningPlan, Stage
from tests.graphs.models import DECODERS, NEW, Runner, Sample, sample_model, write_graphs
from tests.graphs.reference import embeddings, logits_at, run_layers

KEEP = Stage(layer=2, keep=6, attention_quota=3, pool=5, boundary=8, diversity_quota=1)
DROP = Stage(layer=4, keep=0)


def close(got: np.ndarray, wanted: torch.Tensor) -> None:
    expected = wanted.numpy()
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() < 1e-4
    a, b = got.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    assert 1 - a @ b / np.sqrt((a @ a) * (b @ b)) < 1e-9


def tables(sample: Sample, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    pair = rope_tables(sample.checkpoint.config, sample.profile(batch).total_tokens)
    return tuple(torch.from_numpy(table)[None].repeat(batch, 1, 1) for table in pair)


def runner(sample: Sample, plan: PruningPlan, batch: int, opset: int, folder) -> Runner:
    graphs = build_decoder_graphs(sample.spec, sample.checkpoint, plan, sample.profile(batch), opset=opset)
    return Runner(write_graphs(graphs, sample.checkpoint, folder))


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("decoder", DECODERS)
def test_segments_and_head_match_transformers(decoder, opset, batch, models, tmp_path):
    sample = sample_model(decoder, models)
    plan = sample.plan(KEEP, DROP)
    run = runner(sample, plan, batch, opset, tmp_path)
    profile = sample.profile(batch)
    _, hidden = embeddings(sample, batch)
    cos, sin = tables(sample, batch)
    last = torch.tensor([profile.total_tokens - 1, profile.total_tokens - 4][:batch], dtype=torch.int32)
    for segment in plan.segments():
        if segment.stage == 0:  # any kept set will do here; selection has its own tests
            rows = [0, 1, 2, 5, 6, 9, 13, 14, 18, *range(19, profile.total_tokens)]
            hidden, cos, sin = (x[:, rows] for x in (hidden, cos, sin))
            last = last - 10
        elif segment.stage == 1:
            cut = run("select_1", hidden=hidden, cos=cos, sin=sin, last=last)
            hidden, cos, sin = (torch.cat([x[:, :3], x[:, 9:]], 1) for x in (hidden, cos, sin))
            last = last - 6
            np.testing.assert_array_equal(cut["hidden_out"], hidden)
            np.testing.assert_array_equal(cut["cos_out"], cos)
            np.testing.assert_array_equal(cut["sin_out"], sin)
            np.testing.assert_array_equal(cut["last_out"], last)
        got = run(f"prefill_{segment.index}", hidden=hidden, cos=cos, sin=sin, last=last)
        wanted = run_layers(sample, segment.start, segment.stop, hidden, cos, sin)
        close(got["hidden_out"], wanted.hidden)
        for layer in range(segment.start, segment.stop):
            close(got[f"key_{layer}"], wanted.keys[layer])
            close(got[f"value_{layer}"], wanted.values[layer])
        assert ("query" in got) == (segment.index == 0)
        if "query" in got:
            close(got["query"], wanted.query[torch.arange(batch), :, last.long()][:, :, None])
        hidden = wanted.hidden
    close(run("head", hidden=hidden, last=last)["logits"], logits_at(sample, hidden, last))


def test_text_rules_give_the_query_of_every_text_row(models, tmp_path):
    sample = sample_model("qwen2-gqa", models)
    run = runner(sample, sample.plan(KEEP, importance="mean-text"), 1, 23, tmp_path)
    _, hidden = embeddings(sample, 1)
    cos, sin = tables(sample, 1)
    got = run("prefill_0", hidden=hidden, cos=cos, sin=sin, last=np.array([20], np.int32))
    close(got["query"], run_layers(sample, 0, 2, hidden, cos, sin).query[:, :, 19:])


def test_padding_changes_nothing_for_real_tokens(models, tmp_path):
    sample = sample_model("llama", models)
    run = runner(sample, sample.plan(), 1, 23, tmp_path)
    _, hidden = embeddings(sample, 1)
    cos, sin = tables(sample, 1)
    last = np.array([21], np.int32)
    first = run("prefill_0", hidden=hidden, cos=cos, sin=sin, last=last)["hidden_out"]
    changed = hidden.clone()
    changed[:, 22:] = 100.0
    second = run("prefill_0", hidden=changed, cos=cos, sin=sin, last=last)["hidden_out"]
    np.testing.assert_allclose(first[:, :22], second[:, :22], atol=1e-6)
    assert np.abs(first[:, 22:] - second[:, 22:]).max() > 0.1


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("decoder", DECODERS)
def test_unpruned_chain_generates_what_transformers_generates(decoder, opset, models, tmp_path):
    """Prefill, then decode steps with caches whose padding rows hold rubbish, two items of different length."""
    sample = sample_model(decoder, models)
    batch, steps = 2, NEW
    run = runner(sample, sample.plan(), batch, opset, tmp_path)
    profile = sample.profile(batch)
    _, hidden = embeddings(sample, batch)
    cos, sin = tables(sample, batch)
    last = np.array([profile.total_tokens - 1, profile.total_tokens - 3], np.int32)
    got = run("prefill_0", hidden=hidden, cos=cos, sin=sin, last=last)
    logits = run("head", hidden=got["hidden_out"], last=last)["logits"]
    caches = {}
    for layer in range(sample.spec.decoder.num_layers):
        for kind in ("key", "value"):
            shape = (*got[f"{kind}_{layer}"].shape[:2], profile.total_tokens + NEW, sample.spec.decoder.head_dim)
            caches[f"past_{kind}_{layer}"] = cache = np.full(shape, 7.0, np.float32)
            cache[:, :, : profile.total_tokens] = got[f"{kind}_{layer}"]
    wanted = [_greedy(sample, hidden[item : item + 1, : last[item] + 1], steps) for item in range(batch)]
    table = rope_tables(sample.checkpoint.config, profile.max_positions)
    length = last + 1
    for step in range(steps):
        for item in range(batch):
            close(logits[item], wanted[item][step])
        token = torch.from_numpy(logits.argmax(-1))
        logits = _step(sample, run, caches, token, table, length)
        length = length + 1


def _greedy(sample: Sample, embedded: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """Logits [vocab] of each greedy step by transformers with its own cache."""
    cache, all_logits = DynamicCache(), []
    inputs = embedded
    for _ in range(steps):
        out = sample.module(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
        all_logits.append(out.logits[0, -1])
        inputs = sample.module.get_input_embeddings()(all_logits[-1].argmax()[None, None])
    return all_logits


def _step(sample, run, caches, token, table, length) -> np.ndarray:
    """One decode step; writes the new rows into the caches at `length`."""
    hidden = sample.module.get_input_embeddings()(token)[:, None]
    cos, sin = (half[length][:, None] for half in table)
    out = run("decode", hidden=hidden, cos=cos, sin=sin, length_0=length.astype(np.int32), **caches)
    for name, cache in caches.items():
        for item, row in enumerate(length):
            cache[item, :, row] = out[name.removeprefix("past_")][item, :, 0]
    return out["logits"]
