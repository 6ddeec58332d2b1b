"""Streaming text never takes anything back and adds up to what the tokenizer decodes in one go."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from btp_export.running.detokenise import REPLACEMENT, Detokeniser


def byte_level() -> Any:
    """Like Qwen2's: every byte is a token, printed as a stand-in character."""
    vocabulary = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def byte_fallback() -> Any:
    """Like Llama's: words, and bytes for what no word covers."""
    pieces = ["▁the", "▁cat", "▁don", "'", "t", "▁,", "▁"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


TOKENIZERS = {"byte-level": byte_level(), "byte-fallback": byte_fallback()}


def stream(tokenizer: Any, ids: list[int]) -> tuple[list[str], str]:
    detokeniser = Detokeniser(tokenizer)
    pieces = [detokeniser.add(token) for token in ids] + [detokeniser.finish()]
    assert detokeniser.text == "".join(pieces)
    return pieces, tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_pieces_add_up(name: str, data: Any) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    pieces, text = stream(tokenizer, ids)
    assert "".join(pieces) == text


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(max_size=12))
def test_no_half_characters(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    if name == "byte-level":
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]
    pieces, whole = stream(tokenizer, ids)
    assert "".join(pieces) == whole
    if REPLACEMENT not in text:
        assert all(REPLACEMENT not in piece for piece in pieces)


def test_special_tokens_do_not_show(demo_checkpoint: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_checkpoint)
    ids = [*tokenizer("red circle", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    pieces, text = stream(tokenizer, ids)
    assert "".join(pieces) == text == "red circle"
    assert pieces[0] == "red"
