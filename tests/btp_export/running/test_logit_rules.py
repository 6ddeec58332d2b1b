"""Generation settings on logits: transformers' own processors, built by `generate`'s own list, are the reference."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

from btp_export.running.logit_rules import LogitRules
from graphs.records.generation import GenerationSettings

VOCABULARY = 12  # few tokens, so that n-grams repeat
ROOM = 6

ids = st.integers(0, VOCABULARY - 1)
some_ids = st.lists(ids, min_size=1, max_size=3)
settings_of = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([1.05, 1.3, 0.7]),
        "encoder_repetition_penalty": st.sampled_from([1.05, 1.3]),
        "no_repeat_ngram_size": st.integers(1, 3),
        "encoder_no_repeat_ngram_size": st.integers(1, 3),
        "bad_words_ids": st.lists(some_ids, min_size=1, max_size=3),
        "min_length": st.integers(1, 12),
        "min_new_tokens": st.integers(1, 4),
        "forced_eos_token_id": some_ids,
        "suppress_tokens": some_ids,
        "begin_suppress_tokens": some_ids,
    },
)


@pytest.fixture(scope="module")
def model(demo_checkpoint: Path) -> Any:
    """Any model that generates: only its list of processors is wanted."""
    with torch.device("meta"):
        return LlavaForConditionalGeneration(LlavaConfig.from_pretrained(demo_checkpoint))


def wanted(model: Any, settings: dict[str, Any], ends: list[int], prompt: list[int], new: list[int], row: Any) -> Any:
    config = GenerationConfig(**settings, eos_token_id=ends, max_length=len(prompt) + ROOM)
    model._prepare_special_tokens(config, device="cpu")
    given_ids = torch.tensor([prompt])
    processors = model._get_logits_processor(
        config, input_ids_seq_length=len(prompt), encoder_input_ids=given_ids, device="cpu"
    )
    return processors(torch.tensor([[*prompt, *new]]), torch.tensor(row)[None].clone())[0].numpy()


@given(
    settings=settings_of,
    ends=some_ids,
    prompt=st.lists(ids, min_size=3, max_size=9),
    new=st.lists(ids, max_size=ROOM - 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_rules_are_those_of_transformers(
    model: Any, settings: dict[str, Any], ends: list[int], prompt: list[int], new: list[int], seed: int
) -> None:
    # transformers refuses such settings itself.
    forced, suppressed = (set(settings.get(name, ())) for name in ("forced_eos_token_id", "suppress_tokens"))
    assume(not forced or not forced <= suppressed)
    row = np.random.default_rng(seed).normal(size=VOCABULARY).astype(np.float32) * 5
    before = row.copy()
    rules = LogitRules(GenerationSettings(**settings), ends, prompt, ROOM)
    for answer in (new[:1], new, new[::-1]):  # one that grows, then another
        expected = wanted(model, settings, ends, prompt, answer, row)
        np.testing.assert_array_equal(rules(answer, row), expected)
        seen = []
        assert rules.choose(answer, row, lambda scores: seen.append(scores.copy()) or 7) == 7  # noqa: B023
        np.testing.assert_array_equal(seen[0], expected)
    np.testing.assert_array_equal(row, before)


def test_without_settings_logits_stay_as_they_are() -> None:
    row = np.ones(4, np.float32)
    assert LogitRules(GenerationSettings(not_followed=("num_beams=4",)), [1], [0, 1], 3)([1], row) is row


def test_ids_beyond_the_vocabulary_are_no_error() -> None:
    """Image tokens may lie there: they are in the prompt, and can never be chosen."""
    settings = GenerationSettings(repetition_penalty=2.0, no_repeat_ngram_size=1, suppress_tokens=(9,))
    row = np.ones(4, np.float32)
    np.testing.assert_array_equal(LogitRules(settings, [9], [9, 2], 3)([], row), [1, 1, -np.inf, 1])
