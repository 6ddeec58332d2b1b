"""Streaming text never takes anything back and adds up to what the tokenizer decodes in one go."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from btp_export.demo import checkpoint_path
from btp_export.preprocess.tokens import Tokens
from btp_export.running.detokenise import REPLACEMENT, Detokeniser


def byte_level() -> Any:
    """Like Qwen2's: every byte is a token, printed as a stand-in character."""
    vocabulary = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return finished(tokenizer)


def byte_fallback() -> Any:
    """Like Llama's: words, and bytes for what no word covers."""
    pieces = ["▁the", "▁cat", "▁don", "'", "t", "▁,", "▁"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return finished(tokenizer)


def words_with_clean_up() -> Any:
    """Like the demo's, and spaces before punctuation go away when text is decoded."""
    pieces = ["do", "n't", "n", "'", "t", "'s", "'ve", "'re", "'m", ".", ",", "!", "?", "a", "longer"]
    tokenizer = Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(pieces)}, "a"))
    return finished(tokenizer, clean_up_tokenization_spaces=True)


def finished(tokenizer: Any, **settings: Any) -> Any:
    """With tokens added as checkpoints add them: special and not, and special ones in no list of special tokens."""
    tokenizer.add_special_tokens([AddedToken("<|vision_pad|>"), AddedToken("<|vision_end|>")])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("日本", special=False)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **settings)
    assert made.convert_tokens_to_ids("<|vision_pad|>") not in made.all_special_ids
    return made


TOKENIZERS = {
    "byte-level": byte_level(),
    "byte-fallback": byte_fallback(),
    "words with clean-up": words_with_clean_up(),
    "demo": AutoTokenizer.from_pretrained(checkpoint_path()),
}


def stream(tokenizer: Any, ids: list[int]) -> tuple[list[str], str]:
    clean_up = tokenizer.clean_up_tokenization_spaces and type(tokenizer.backend_tokenizer.model).__name__ != "BPE"
    detokeniser = Detokeniser(Tokens(tokenizer.backend_tokenizer, clean_up=clean_up))
    pieces = [detokeniser.add(token) for token in ids] + [detokeniser.finish()]
    assert detokeniser.text == "".join(pieces)
    return pieces, tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_pieces_add_up(name: str, data: Any) -> None:
    tokenizer = TOKENIZERS[name]
    added = st.sampled_from(sorted(tokenizer.get_added_vocab().values()))
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1) | added, max_size=30))
    pieces, text = stream(tokenizer, ids)
    assert "".join(pieces) == text


def test_special_tokens_between_bytes_lose_nothing() -> None:
    """An "A", a special token that is in no list of them, and half a character: only the whole run decides."""
    tokenizer = TOKENIZERS["byte-fallback"]
    ids = tokenizer.convert_tokens_to_ids(["<0x41>", "<|vision_pad|>", "<0xE2>"])
    pieces, text = stream(tokenizer, ids)
    assert "".join(pieces) == text == REPLACEMENT * 2


@pytest.mark.parametrize("name", ["byte-level", "byte-fallback"])
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
