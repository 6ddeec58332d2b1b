"""Changed tokens, dropping and spread, on hand-made cases and against the whole model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibrate.measure.statistics import bootstrap_spread, changed_tokens, measure
from calibrate.place.counts import Shape
from calibrate.reference.streamed_model import StreamedReference
from graphs.records.plan import Stage
from tests.calibrate.models import IMAGE_TOKEN, PREFIX, checkpoint, make_input, make_llava

LAYERS, SIDE = 5, 4
SHAPE = Shape("llava", LAYERS, SIDE * SIDE, (SIDE, SIDE))


def test_changed_tokens_by_hand() -> None:
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    angles = torch.tensor([0.0, 0.3, 0.5])  # cosines 1, 0.955, 0.878
    after = torch.cat([torch.stack([angles.cos(), angles.sin()], 1) * 7.0, torch.tensor([[0.0, -1.0]])])
    assert changed_tokens(before, after, [0.93, 0.96, 0.5, -1.0]) == [2, 3, 1, 0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("llava")
    model = make_llava(folder, layers=LAYERS, side=SIDE)
    collected = [make_input(model, text=3 + seed, seed=seed) for seed in range(3)]
    inputs = [one for one, _ in collected]
    reference = StreamedReference(checkpoint(folder))
    result = measure(reference, inputs, SHAPE.plan(()), taus=(0.93, 0.5), dropped=2)
    return {"model": model, "made": collected, "inputs": inputs, "reference": reference, "found": result}


def test_counts_and_attention_are_the_whole_models(run: dict[str, Any]) -> None:
    run["model"].set_attn_implementation("eager")
    for number, (given, pixels) in enumerate(run["made"]):
        with torch.no_grad():
            whole = run["model"](
                input_ids=given.input_ids[None], pixel_values=pixels, output_hidden_states=True, output_attentions=True
            )
        image = slice(PREFIX, PREFIX + SIDE * SIDE)
        for layer in range(LAYERS - 1):  # transformers norms the last hidden state
            before, after = whole.hidden_states[layer][0, image], whole.hidden_states[layer + 1][0, image]
            cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
            assert run["found"].counts_at(0.93)[number, layer] == int((cosine < 0.93).sum())
        np.testing.assert_allclose(run["found"].logits[number], whole.logits[0, -1].numpy(), atol=1e-4)
        for layer in range(LAYERS):
            attention = whole.attentions[layer][0, :, -1, image].mean(0)
            assert run["found"].attention[number, layer] == pytest.approx(float(attention.sum()), abs=1e-5)
    assert len(set(run["found"].counts_at(0.93).ravel().tolist())) > 2, "all counts alike: no test"


def test_top_shares_rise_to_one(run: dict[str, Any]) -> None:
    shares = np.array(list(run["found"].mean_top_shares().values()))
    assert (np.diff(shares, axis=0) >= 0).all() and shares.min() > 0 and shares.max() <= 1
    assert (shares[-1] >= 0.5).all(), "the better half holds at least half"


def test_dropping_is_what_a_plan_that_drops_does(run: dict[str, Any]) -> None:
    few = run["inputs"][:2]
    full = run["reference"].run(few, SHAPE.plan(()))
    for layer in range(1, LAYERS):
        dropped = run["reference"].run(few, SHAPE.plan((Stage(layer=layer, keep=0),)))
        for number in range(2):
            p, q = (torch.log_softmax(torch.tensor(r[number].logits[0]).double(), 0) for r in (full, dropped))
            wanted = float((p.exp() * (p - q)).sum())
            assert run["found"].divergence[number, layer] == pytest.approx(wanted, abs=1e-6)
            same = full[number].next_tokens == dropped[number].next_tokens
            assert bool(run["found"].agreement[number, layer]) == same
    assert run["found"].divergence.shape == (2, LAYERS)
    assert run["found"].divergence.max() > 1e-3, "the picture does not matter: no test"


def test_dropping_before_layer_0_is_no_picture_at_all(run: dict[str, Any]) -> None:
    given = run["inputs"][0]
    text = given.input_ids != IMAGE_TOKEN
    decoder = run["model"].model.language_model
    with torch.no_grad():
        hidden = decoder.embed_tokens(given.input_ids[text])[None]
        states = decoder(inputs_embeds=hidden, position_ids=torch.nonzero(text).T).last_hidden_state
        q = torch.log_softmax(run["model"].lm_head(states[0, -1]).double(), 0)
    full = run["reference"].run([given], SHAPE.plan(()))[0]
    p = torch.log_softmax(torch.tensor(full.logits[0]).double(), 0)
    assert run["found"].divergence[0, 0] == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-6)


def test_dropping_is_measured_at_every_token_of_the_answer(run: dict[str, Any]) -> None:
    """The mean over the answer's tokens, and agreement only where all of them stay."""
    inputs = [replace(run["inputs"][0], new_tokens=(7, 9, 11)), replace(run["inputs"][1], new_tokens=(3,))]
    result = measure(run["reference"], inputs, SHAPE.plan(()), taus=(0.93,), dropped=2)
    assert result.lengths.tolist() == [4, 2] and [len(logits) for logits in result.logits_of()] == [4, 2]
    assert result.answered([replace(one, new_tokens=()) for one in inputs])[0].new_tokens == (7, 9, 11)
    full = run["reference"].run(inputs, SHAPE.plan(()))
    for layer in (1, 3):
        dropped = run["reference"].run(inputs, SHAPE.plan((Stage(layer=layer, keep=0),)))
        for number in range(2):
            p, q = (torch.log_softmax(torch.tensor(r[number].logits).double(), -1) for r in (full, dropped))
            wanted = float((p.exp() * (p - q)).sum(-1).mean())
            assert result.divergence[number, layer] == pytest.approx(wanted, abs=1e-6)
            assert bool(result.agreement[number, layer]) == (full[number].next_tokens == dropped[number].next_tokens)


def test_bootstrap_spread_shrinks_with_the_sample() -> None:
    counts = np.random.default_rng(0).normal(100, 20, (64, 3)).astype(int)
    spread = bootstrap_spread(counts, seed=1)
    for layer in range(3):
        by_size = [spread[size][layer] for size in ("16", "64", "256")]
        assert by_size == sorted(by_size, reverse=True)
        assert by_size[0] == pytest.approx(counts[:, layer].std() / 4, rel=0.2)  # sigma / sqrt(16)
    assert spread == bootstrap_spread(counts, seed=1)
