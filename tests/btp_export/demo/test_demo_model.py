"""The shipped demo checkpoint: it loads as any LLaVA does, and it answers; and the code that trained it trains."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from btp_export.demo import checkpoint_path, model_files
from btp_export.demo.batches import BLOCK_TOKENS, IGNORE, Batches
from btp_export.demo.evaluate import evaluate, prompt, score
from btp_export.demo.forward import BlockForward
from btp_export.demo.optimiser import Muon, orthogonal
from btp_export.demo.train import ANSWERS, LOG, READING, Phase, Recipe, Trainer, patch_weight_at, rate_at
from calibrate.data import scenes, signs

TINY = Recipe(
    phases=(Phase(steps=4, cells=1, pictures=4, blocks=0), Phase(steps=6, cells=1, pictures=4, blocks=4)),
    warm_up=2,
    layers=2,
    hidden=32,
    fast=False,
    compiled=False,
)


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return AutoProcessor.from_pretrained(checkpoint_path(), local_files_only=True)


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(checkpoint_path(), dtype=torch.float32, local_files_only=True)


# The files


def test_weights_are_float16_and_small() -> None:
    path = checkpoint_path() / "model.safetensors"
    assert path.stat().st_size < 16e6
    with safe_open(path, "pt") as weights:
        names = list(weights.keys())
        assert {weights.get_tensor(name).dtype for name in names} == {torch.float16}
        assert all(weights.get_tensor(name).isfinite().all() for name in names)


def test_architecture_is_the_one_the_code_builds() -> None:
    shipped, built = AutoConfig.from_pretrained(checkpoint_path()), model_files.build_config()
    assert shipped.text_config.num_hidden_layers == 12
    assert shipped.text_config.to_dict().keys() == built.text_config.to_dict().keys()
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        assert getattr(shipped.text_config, key) == getattr(built.text_config, key)
    assert shipped.vision_feature_layer == -2
    assert shipped.vision_feature_select_strategy == "default"
    assert (shipped.vision_config.image_size // shipped.vision_config.patch_size) ** 2 == 576


def test_prompt_has_eight_tokens_before_576_image_tokens(processor: LlavaProcessor) -> None:
    text = prompt(processor, "what colour is the star ?")
    inputs = processor(text=text, images=Image.new("RGB", (200, 120)), return_tensors="pt")
    ids = inputs["input_ids"][0]
    places = (ids == processor.image_token_id).nonzero().flatten().tolist()
    assert places == list(range(8, 8 + 576))
    assert ids[0] == processor.tokenizer.bos_token_id
    assert (ids == processor.tokenizer.bos_token_id).sum() == 1
    assert processor.tokenizer.decode(ids[584:]) == "what colour is the star ? ASSISTANT:"
    assert inputs["pixel_values"].shape == (1, 3, 96, 96)


def test_chat_template_tokenizes_in_one_call(processor: LlavaProcessor) -> None:
    image = Image.new("RGB", (96, 96))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "where is the red star?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    by_hand = processor(text=prompt(processor, "where is the red star?"), images=image, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], by_hand["input_ids"])


@pytest.mark.parametrize(
    "typed", ["What colour is the circle?", "what color is the CIRCLE ?", "  what\tcolour is the circle?  "]
)
def test_tokenizer_forgives_how_a_question_is_typed(processor: LlavaProcessor, typed: str) -> None:
    tokenizer = processor.tokenizer
    wanted = tokenizer.encode("what colour is the circle ?", add_special_tokens=False)
    assert tokenizer.encode(typed, add_special_tokens=False) == wanted
    assert tokenizer.unk_token_id not in wanted


def test_unknown_words_become_unk(processor: LlavaProcessor) -> None:
    tokens = processor.tokenizer.tokenize("where is the zebra?")
    assert tokens == ["where", "is", "the", "<unk>", "?"]


def test_every_question_and_answer_is_in_the_vocabulary(processor: LlavaProcessor) -> None:
    for seed in range(50):
        for question in scenes.questions(scenes.make_scene(seed), seed):
            ids = processor.tokenizer.encode(f"{question.text} ASSISTANT: {question.answer}", add_special_tokens=False)
            assert processor.tokenizer.unk_token_id not in ids
            assert len(ids) <= BLOCK_TOKENS


# The answers


def test_answers_held_out_scenes() -> None:
    result = evaluate(checkpoint_path(), scenes.samples(45, seed=1, split="eval"), batch=15)
    assert result["samples"] == 45
    assert result["exact_match"] >= 0.9, result
    for kind, row in result["kinds"].items():
        assert row["exact_match"] >= row["majority"] + 0.2, (kind, row)


def test_score_counts_exact_matches_per_kind() -> None:
    samples = scenes.samples(10, seed=2)
    given = [sample.answer for sample in samples]
    given[0] = "nothing"
    result = score(samples, given)
    assert result["exact_match"] == 0.9
    assert result["kinds"][samples[0].kind]["exact_match"] == 0.5
    assert result["kinds"][samples[1].kind]["exact_match"] == 1.0


# The training


def test_training_forward_is_the_model_s_own(processor: LlavaProcessor, model: LlavaForConditionalGeneration) -> None:
    """Every question block behind a shared image gives the logits of the plain prompt with that question alone."""
    prefix = torch.tensor(processor.tokenizer.encode(model_files.PREFIX))
    batch = Batches(processor.tokenizer).make(5, 2, cells=4, blocks=3)
    forward = BlockForward(model, prefix, fast=False, compiled=False)
    with torch.inference_mode():
        out = forward(*(torch.from_numpy(array) for array in (batch.pixels, batch.patches, batch.tokens)))
        for i in range(2):
            for block in range(3):
                image = torch.full((model_files.IMAGE_TOKENS,), processor.image_token_id)
                ids = torch.cat([prefix, image, torch.from_numpy(batch.tokens[i, block])])[None]
                pixels = processor.image_processor(Image.fromarray(batch.pixels[i]), return_tensors="pt")[
                    "pixel_values"
                ]
                wanted = model(input_ids=ids, pixel_values=pixels).logits[0, -BLOCK_TOKENS:]
                torch.testing.assert_close(out.logits[i, block], wanted, atol=2e-3, rtol=1e-3)


def test_labels_follow_the_question(processor: LlavaProcessor) -> None:
    batch = Batches(processor.tokenizer).make(5, 1, cells=4, blocks=6)
    for tokens, labels in zip(batch.tokens[0], batch.labels[0], strict=True):
        first = int((labels != IGNORE).argmax())
        assert processor.tokenizer.convert_ids_to_tokens(int(tokens[first])) == "ASSISTANT:"
        assert labels[labels != IGNORE][-1] == processor.tokenizer.eos_token_id


def test_a_sign_in_a_rectangle_is_labelled_patch_by_patch() -> None:
    """Every character has patches, its turn goes from left to right, and no object lies under it."""
    batch = Batches(model_files.build_tokenizer()).make(9, 8, cells=2, blocks=8, signs=1.0)
    character, turn = batch.patch_labels[..., 5], batch.patch_labels[..., 6]
    assert ((character > 0) == (turn > 0)).all() and not ((character > 0) & (batch.patch_labels[..., 0] > 0)).any()
    tokenizer = model_files.build_tokenizer()
    for labels, turns, patches, answers, kinds in zip(
        character, turn, batch.patches, batch.labels, batch.kinds, strict=True
    ):
        (block,) = (kinds == scenes.QUESTION_KINDS.index(scenes.READING)).nonzero()[0]
        words = tokenizer.convert_ids_to_tokens(answers[block][answers[block] != IGNORE].tolist())
        for number, word in enumerate(words[:-1], start=1):
            on = turns == number
            assert on.sum() >= 4 and set(labels[on]) == {1 + signs.CHARACTERS.index(word)}
        columns = [(patches[turns == number] % 24).mean() for number in range(1, len(words))]
        assert columns == sorted(columns)


def test_pictures_with_several_signs_are_for_the_patch_loss() -> None:
    """Each has all its signs, on four times as many patches as one, and nothing is asked about them."""
    batches = Batches(model_files.build_tokenizer())
    one, four = (batches.make(9, 6, cells=4, blocks=16, signs=count) for count in (1.0, 4.0))
    on_one, on_four = ((batch.patch_labels[..., 5] > 0).sum() for batch in (one, four))
    assert 3 * on_one < on_four < 5 * on_one
    reading = scenes.QUESTION_KINDS.index(scenes.READING)
    assert (one.kinds == reading).sum() == 6 and not (four.kinds == reading).any()


def test_rectangles_keep_the_place_in_the_full_picture() -> None:
    batch = Batches(model_files.build_tokenizer()).make(9, 8, cells=2, blocks=4)
    assert batch.pixels.shape == (8, 48, 48, 3)
    assert batch.patches.shape == (8, 144)
    rows, columns = batch.patches // 24, batch.patches % 24
    assert (batch.patch_labels[..., 2] == rows // 6).all()
    assert (batch.patch_labels[..., 3] == columns // 6).all()
    assert (rows.max(1) - rows.min(1) == 11).all()


def test_training_is_reproducible_and_can_be_continued(tmp_path: Path) -> None:
    whole, again, first = Trainer(3, TINY), Trainer(3, TINY), Trainer(3, TINY)
    whole.run()
    again.run()
    first.run(until=7)
    first.save(tmp_path / "state.pt")
    second = Trainer(4, TINY)  # the seed of the weights must not matter: they are loaded
    second.seed = 3
    second.load(tmp_path / "state.pt")
    second.run()
    for name, wanted in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], wanted), name
        assert torch.equal(second.model.state_dict()[name], wanted), name


def test_training_reduces_the_loss() -> None:
    recipe = Recipe(
        phases=(Phase(steps=60, cells=1, pictures=8, blocks=4),),
        warm_up=4,
        layers=2,
        hidden=32,
        fast=False,
        compiled=False,
    )
    trainer = Trainer(0, recipe)
    trainer.run(report_every=15)
    losses = [entry["loss"] for entry in trainer.progress.log]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("recipe", [ANSWERS, READING], ids=["answers", "reading"])
def test_rates_warm_up_and_end_at_nothing(recipe: Recipe) -> None:
    first, count = recipe.answering
    assert rate_at(recipe, first) < rate_at(recipe, first + 10) < rate_at(recipe, first + recipe.warm_up)
    assert rate_at(recipe, recipe.steps - 1) < 0.01 * recipe.rate
    assert patch_weight_at(recipe, first) == recipe.patch_weight
    assert patch_weight_at(recipe, recipe.steps - 1) == 0
    assert recipe.decay[-1][0] == count


def test_the_log_belongs_to_the_recipes_and_says_what_is_shipped() -> None:
    last = json.loads((checkpoint_path() / LOG).read_text())
    kinds = set(scenes.QUESTION_KINDS)
    for record, recipe, asked in ((last["before"], ANSWERS, kinds - {scenes.READING}), (last, READING, kinds)):
        assert record["recipe"] == json.loads(json.dumps(asdict(recipe)))
        assert record["steps"] == recipe.steps == record["log"][-1]["step"]
        for entry in record["log"]:
            assert entry["rate"] == pytest.approx(rate_at(recipe, entry["step"] - 1), rel=1e-3)
        assert record["held_out"]["exact_match"] >= 0.9
        assert set(record["held_out"]["kinds"]) == asked
    assert last["before"]["scenes"] <= READING.first_scene, "no scene is seen twice"


def test_reading_starts_from_a_checkpoint_and_learns_new_words(tmp_path: Path) -> None:
    """The rows of the words that it knows are the checkpoint's; the new words' score as the mean of them at first."""
    first = Trainer(3, TINY)
    model_files.save_checkpoint(first.model, tmp_path)
    phases = (
        Phase(steps=1, cells=2, pictures=4, blocks=0, signs=1.0),
        Phase(2, cells=2, pictures=4, blocks=8, signs=1),
    )
    reading = replace(TINY, phases=phases, patch_tasks=READING.patch_tasks, reads=True)
    trainer = Trainer(0, reading, tmp_path)
    table, known = first.model.model.language_model.embed_tokens.weight, 61
    head = trainer.model.lm_head.weight.detach().clone()
    grown = trainer.model.model.language_model.embed_tokens.weight
    assert torch.equal(grown[:known], table.to(torch.float16).float()) and len(grown) == len(head) == 88
    assert grown[known:].std().item() == pytest.approx(table.std().item(), rel=0.2)
    torch.testing.assert_close(head[known:], head[:known].mean(0).expand(88 - known, -1))
    trainer.run(report_every=1)
    assert "reading" in trainer.progress.log[-1] and "patch character" in trainer.progress.log[-1]
    assert not torch.equal(trainer.model.lm_head.weight[known:], head[known:])


def test_matrices_without_a_gradient_only_decay() -> None:
    """Those that had one move as if the others were not there."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 8, 16, generator=generator)
    gradients = torch.randn(2, 2, 8, 16, generator=generator)
    moved, alone = [torch.nn.Parameter(m.clone()) for m in start], [torch.nn.Parameter(m.clone()) for m in start[:2]]
    muon, without = Muon(moved), Muon(alone)
    for step in gradients:
        for parameters in (moved, alone):
            for parameter, gradient in zip(parameters, step, strict=False):
                parameter.grad = gradient.clone()
        muon.step(0.1, decay=0.02)
        without.step(0.1, decay=0.02)
    for one, other in zip(moved, alone, strict=False):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(moved[2].detach(), start[2] * (1 - 0.1 * 0.02) ** 2)


def test_orthogonal_steps_have_singular_values_near_one() -> None:
    matrices = torch.randn(3, 48, 128, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.4
