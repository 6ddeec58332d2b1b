"""The loop and the checkpoint's generation settings: the same tokens as transformers' `generate`, in every command."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

import btp_export
from btp_export.families import family_for
from btp_export.measuring.verify import verify_bundle
from btp_export.running.generation import Answer, generate
from btp_export.running.memory_fit import Streaming
from graphs.files.checkpoint import open_checkpoint, read_config
from graphs.records.generation import GenerationSettings
from graphs.records.plan import Stage
from tests.btp_export.running.test_runtime import PROMPTS, transformers_inputs
from tests.conftest import unpruned
from tests.plans import tiny_plan

ROOM = 12
SETTINGS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.05},
    {"repetition_penalty": 1.3},
    {"encoder_repetition_penalty": 1.2},
    {"no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 1},
    {"bad_words_ids": [[31], [5, 48], [65]]},
    {"suppress_tokens": [51, 5, 31]},
    {"begin_suppress_tokens": [48, 64]},
    {"min_new_tokens": 6, "eos_token_id": [31, 51, 5, 70]},
    {"min_length": 58, "eos_token_id": [31, 51, 5, 70]},
    {"forced_eos_token_id": 2},
    {"eos_token_id": 51},
    {"eos_token_id": [51, 31]},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 4, "forced_eos_token_id": [2]},
]
WITHOUT_EFFECT: list[dict[str, Any]] = [{"forced_bos_token_id": 7}, {"eos_token_id": None}, {"eos_token_id": []}]


def with_settings(checkpoint: Path, folder: Path, **settings: Any) -> Path:
    """A copy of a checkpoint with these settings in its generation_config.json."""
    shutil.copytree(checkpoint, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def spec_of(folder: Path) -> Any:
    family = family_for(read_config(folder))
    return family.spec(open_checkpoint(folder, family.renames), "tiny")


def reference_ids(folder: Path, pictures: list[Image.Image], prompts: list[str], count: int = ROOM) -> list[list[int]]:
    """What `generate` gives with the settings that it finds in the folder."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        inputs = transformers_inputs(folder, picture, prompt)
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=count, do_sample=False)
        answers.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Path, pictures: list[Image.Image]) -> list[list[int]]:
    """Answers without any settings."""
    return reference_ids(tiny_checkpoint, pictures, PROMPTS)


@pytest.mark.parametrize("settings", [*SETTINGS, *WITHOUT_EFFECT], ids=str)
def test_tokens_are_those_of_generate(
    settings: dict[str, Any],
    tiny_checkpoint: Path,
    tiny_bundle: Any,
    pictures: list[Image.Image],
    plain: list[list[int]],
    tmp_path: Path,
) -> None:
    folder = with_settings(tiny_checkpoint, tmp_path / "model", **settings)
    model = btp_export.load(tiny_bundle(batch=2), threads=1)
    model.spec = spec_of(folder)
    wanted = reference_ids(folder, pictures, PROMPTS)
    assert [list(answer.token_ids) for answer in model.generate(pictures, PROMPTS)] == wanted
    # Else this says nothing. A begin token is never forced behind a prompt; no answer here comes to the end token.
    assert (wanted == plain) == (settings in WITHOUT_EFFECT)


@pytest.fixture(scope="module")
def penalised(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[str]]:
    """A checkpoint with settings, its bundle, and what was said at its export."""
    from btp_export.exporting import Options, export_bundle
    from btp_export.model.open_model import open_model

    root = tmp_path_factory.mktemp("penalised")
    settings = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "do_sample": True, "num_beams": 4, "top_k": 50}
    folder = with_settings(tiny_checkpoint, root / "model", **settings)
    model, notes = open_model(str(folder)), []
    options = Options(text_tokens=16, new_tokens=ROOM)
    bundle = export_bundle(model, unpruned(model.spec), root / "bundle", options, note=notes.append)
    return folder, bundle, notes


def test_settings_travel_in_the_bundle(
    penalised: tuple[Path, Any, list[str]], tiny_bundle: Any, pictures: list[Image.Image]
) -> None:
    folder, bundle, notes = penalised
    settings = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
    followed = GenerationSettings(**settings, not_followed=("do_sample=true", "num_beams=4", "top_k=50"))
    assert bundle.spec.generation == followed
    assert json.loads((bundle.root / "manifest.json").read_text())["spec"]["generation"]["repetition_penalty"] == 1.3
    assert any("do_sample=true, num_beams=4, top_k=50" in text for text in notes)
    plain = json.loads((tiny_bundle().root / "manifest.json").read_text())
    assert "generation" not in plain["spec"]
    one_beam = with_settings(folder, folder.parent / "greedy", num_beams=1)
    answers = btp_export.load(bundle, threads=1).generate(pictures, PROMPTS)
    assert [list(answer.token_ids) for answer in answers] == reference_ids(one_beam, pictures, PROMPTS)


@pytest.mark.parametrize("streamed", [False, True])
def test_verify_follows_them(
    streamed: bool, penalised: tuple[Path, Any, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the whole bundle and of the streamed one; without the rules on the reference's side nothing would be equal."""
    from graphs.building.derived_bundles import derive

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, bundle, _ = penalised
    stages = (Stage(layer=2, keep=12, attention_quota=6, pool=8, boundary=12, diversity_quota=6),)
    plan = tiny_plan(*stages)
    pruned = derive(bundle, plan, tmp_path / "pruned")
    result = verify_bundle(pruned, samples=2, tokens=8, threads=1, streaming=Streaming(above=0 if streamed else 2**40))
    assert result.passed and result.streamed == streamed
    assert not result.near_ties


def test_the_loop_ends_where_each_answer_does() -> None:
    """Sample n gets tokens n, n + 1, ...; 3 ends an answer, and one that is done keeps its last token in the batch."""
    fed: list[list[int]] = []

    def decode(ids: Any) -> Any:
        fed.append(list(ids))
        return np.zeros((3, 8), np.float32)

    answers = [
        Answer(lambda ids, logits, first=first: first + len(ids), frozenset({3}), room)
        for first, room in ((0, 9), (1, 9), (4, 2))
    ]
    generate(answers, np.zeros((3, 8), np.float32), decode)
    assert [answer.ids for answer in answers] == [[0, 1, 2, 3], [1, 2, 3], [4, 5]]
    assert [answer.without_end() for answer in answers] == [[0, 1, 2], [1, 2], [4, 5]]
    assert fed == [[0, 1, 4], [1, 2, 5], [2, 3, 5]]


def test_a_stopped_answer_leaves_the_others_alone() -> None:
    """One is stopped while its first token is chosen, one after its second."""

    def choose(ids: Any, logits: Any) -> int:
        answers[0].stopped = True
        return 5

    answers = [
        Answer(choose, frozenset(), 9),
        Answer(lambda ids, logits: len(ids), frozenset(), 9, on_token=lambda token, last: stop_second(token)),
        Answer(lambda ids, logits: 7, frozenset(), 4),
    ]

    def stop_second(token: int) -> None:
        answers[1].stopped = token == 1

    generate(answers, np.zeros((3, 8), np.float32), lambda ids: np.zeros((3, 8), np.float32))
    assert [answer.ids for answer in answers] == [[], [0, 1], [7, 7, 7, 7]]
